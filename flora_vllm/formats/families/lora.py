"""LoRA as PEFT 0.21 saves it: `W + scale · lora_B @ lora_A`, scale = alpha/r, or alpha/√r with `use_rslora`.

Rank and alpha may differ by module (`rank_pattern`, `alpha_pattern`; `peft/tuners/lora/model.py`). Variants that
compute something else share the file format, so every field of LoraConfig is listed with the values that keep it LoRA.
"""

import math
from collections.abc import Mapping

import torch

from flora_vllm.adapter import LowRank, ModuleTerms
from flora_vllm.formats.config_keys import (
    ANYTHING,
    BOOKKEEPING,
    BOOLEAN,
    LAYER_SUBSET,
    NOTHING,
    NUMBER,
    NUMBER_PATTERN,
    RANK,
    RANK_PATTERN,
    TARGETS,
    only,
)
from flora_vllm.formats.families.family import Axes, Config, Family
from flora_vllm.formats.families.flora import pattern_rank
from flora_vllm.formats.matching import match_pattern

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


def _axes(_config: Config, _module: str) -> Mapping[str, Axes]:
    return {LORA_A: ("R", "I"), LORA_B: ("O", "R")}


def _terms(config: Config, module: str, parts: Mapping[str, torch.Tensor]) -> ModuleTerms:
    rank = parts[LORA_A].shape[0]
    alpha = match_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora", False) else rank)
    return ModuleTerms(low_rank=LowRank(parts[LORA_A], parts[LORA_B], scale=float(scale)))


LORA = Family(
    name="LORA",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        **LAYER_SUBSET,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        "lora_alpha": NUMBER,
        "alpha_pattern": NUMBER_PATTERN,
        "use_rslora": BOOLEAN,
        # Initialisations that leave the base weight as it was; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
        # change it, and the file then belongs to a base that nobody serves. PEFT can save those as plain LoRA.
        "init_lora_weights": only(True, False, None, "gaussian", "eva", "orthogonal"),
        # Used only while training, or only by a feature that is off.
        "lora_dropout": ANYTHING,
        "eva_config": ANYTHING,
        "megatron_core": ANYTHING,
        "qalora_group_size": ANYTHING,
        # Each of these changes what the layer computes, or adapts something that is not a linear layer.
        "bias": only("none"),
        "lora_bias": only(False),
        "use_dora": only(False),
        "use_qalora": only(False),
        "ensure_weight_tying": only(False),
        "use_bdlora": only(None, False),
        "alora_invocation_tokens": NOTHING,
        "arrow_config": NOTHING,
        "corda_config": NOTHING,
        "kasa_config": NOTHING,
        "layer_replication": NOTHING,
        "loftq_config": NOTHING,
        "lora_ga_config": NOTHING,
        "megatron_config": NOTHING,
        "monteclora_config": NOTHING,
        "target_parameters": NOTHING,
        "trainable_token_indices": NOTHING,
        "velora_config": NOTHING,
    },
    parts=(LORA_A, LORA_B),
    axes=_axes,
    ranks=pattern_rank,
    terms=_terms,
    limit="lora",
)
