"""Variants of LoRA whose file holds packed factors: BD-LoRA (block diagonal) and QALoRA (arXiv 2309.14717, pooled).

Unpacked they are plain LoRA. Sources: `peft/tuners/lora/variants.py::BdLoraLinearVariant, QALoraLinearVariant`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import RANK, Key, is_rank, only
from flora_vllm.formats.families.family import ModuleFile, Part, Scope
from flora_vllm.formats.families.lora import (
    LORA,
    LORA_A,
    LORA_B,
    LORA_B_BIAS,
    LORA_KEYS,
    LORA_NAMES,
    bias_terms,
    lora_parts,
    lora_scale,
)
from flora_vllm.terms import Added, Offset, Term

_BLOCK_KEYS = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_blocks(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) <= _BLOCK_KEYS
        and is_rank(value.get("nblocks", 1))
        and all(_is_names(value.get(key)) for key in ("target_modules_bd_a", "target_modules_bd_b"))
    )


def _packed_side(config: Mapping[str, Any], module: str) -> str | None:
    """Which factor of `module` is packed: PEFT looks for the patterns anywhere in its path."""
    for side, key in ((LORA_A, "target_modules_bd_a"), (LORA_B, "target_modules_bd_b")):
        if any(pattern in module for pattern in config["use_bdlora"].get(key) or ()):
            return side
    return None


def _block_parts(scope: Scope) -> Mapping[str, Part]:
    parts = dict(lora_parts(scope))
    side = _packed_side(scope.config, scope.module)
    blocks = scope.config["use_bdlora"].get("nblocks", 1)
    if side == LORA_A:
        parts[LORA_A] = Part(("R", None if scope.in_features is None else scope.in_features // blocks))
    elif side == LORA_B:
        # The rank is then only the other factor's to tell; a block-diagonal layer has no bias.
        parts[LORA_B] = Part(("O", None))
        parts.pop(LORA_B_BIAS, None)
    return parts


def _block_terms(module: ModuleFile) -> tuple[Term, ...]:
    if LORA_A not in module:
        return bias_terms(module, 1.0)
    down, up = module[LORA_A], module[LORA_B]
    side = _packed_side(module.config, module.scope.module)
    blocks = module.config["use_bdlora"].get("nblocks", 1)
    packed = down if side == LORA_A else up
    if side is not None and packed.shape[0] % blocks:
        raise AdapterError(f"{side} has {packed.shape[0]} rows, which {blocks} blocks do not divide")
    if side == LORA_A:
        down = torch.block_diag(*down.chunk(blocks))
    elif side == LORA_B:
        up = torch.block_diag(*up.chunk(blocks))
    scale = lora_scale(module.scope, down.shape[0])
    return (Added(down, up, scale), *bias_terms(module, scale))


BDLORA = replace(
    LORA,
    name="BDLORA",
    title="BD-LoRA (block-diagonal LoRA)",
    peft_type="LORA",
    when=lambda config: bool(config.get("use_bdlora")),
    keys={
        **LORA_KEYS,
        "use_bdlora": Key(
            f"an object of {', '.join(sorted(_BLOCK_KEYS))}: lists of names, an integer of at least 1, anything",
            _is_blocks,
            required=True,
        ),
    },
    names=LORA_NAMES,
    parts=_block_parts,
    terms=_block_terms,
    kinds=(Added, Offset),
)


def _pooled_parts(scope: Scope) -> Mapping[str, Part]:
    groups = None if scope.in_features is None else scope.in_features // scope.config["qalora_group_size"]
    return {**lora_parts(scope), LORA_A: Part(("R", groups))}


def _pooled_terms(module: ModuleFile) -> tuple[Term, ...]:
    if LORA_A not in module:
        return bias_terms(module, 1.0)
    pooled, up = module[LORA_A], module[LORA_B]
    size = module.config["qalora_group_size"]
    scale = lora_scale(module.scope, pooled.shape[0])
    # The mean of each group of inputs, times the number of groups.
    down = pooled.repeat_interleave(size, 1)
    return (Added(down, up, scale * pooled.shape[1] / size), *bias_terms(module, scale))


QALORA = replace(
    LORA,
    name="QALORA",
    title="QALoRA",
    peft_type="LORA",
    when=lambda config: config.get("use_qalora") is True,
    keys={**LORA_KEYS, "use_qalora": only(True), "qalora_group_size": RANK, "lora_bias": only(False)},
    names=LORA_NAMES,
    parts=_pooled_parts,
    terms=_pooled_terms,
    kinds=(Added, Offset),
)
