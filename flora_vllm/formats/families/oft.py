"""OFT (arXiv 2306.07280, 2506.19847) as PEFT 0.21 saves it: `W (x · blockdiag(R))`, R the Cayley map of skew blocks.

`oft_R.weight` (blocks, B(B - 1)/2) holds the upper triangles. The two forms of the map turn in opposite directions:
the truncated Neumann series is that of (I + Q)(I - Q)⁻¹, with 1, not 2, before the last power; the exact one is
(I - Q)(I + Q)⁻¹ (`peft/tuners/oft/layer.py`). The series changed in PEFT 0.18.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, NUMBER, SERIES, TUNER, Key, only
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part
from flora_vllm.terms import FromBase, Offset, Probe, Term, Turn

OFT_R = "oft_R.weight"


def _is_since_0_18(version: object) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) >= (0, 18)


def skew(upper_DN: torch.Tensor) -> torch.Tensor:
    """(D, B, B) float64 from upper triangles (D, B(B - 1)/2). Raises AdapterError for any other length."""
    size = (1 + math.isqrt(1 + 8 * upper_DN.shape[1])) // 2
    if size * (size - 1) // 2 != upper_DN.shape[1]:
        raise AdapterError(f"{OFT_R!r} has {upper_DN.shape[1]} columns, which are no triangle B(B - 1)/2 of a block")
    rows, columns = torch.triu_indices(size, size, 1)
    q_DBB = torch.zeros(upper_DN.shape[0], size, size, dtype=torch.float64)
    q_DBB[:, rows, columns] = upper_DN.double()
    return q_DBB - q_DBB.transpose(1, 2)


def neumann(q_DBB: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2Q + … + 2Qᵗ⁻² + Qᵗ⁻¹; three terms are four, one is I (`OFTRotationModule._cayley_batch`)."""
    rotation = torch.eye(q_DBB.shape[-1], dtype=q_DBB.dtype).expand_as(q_DBB).clone()
    if terms > 1:
        rotation += 2 * q_DBB
    if terms > 2:
        power = q_DBB @ q_DBB
        rotation += 2 * power
        for _ in range(3, terms - 1):
            power = power @ q_DBB
            rotation += 2 * power
        rotation += power @ q_DBB
    return rotation


def cayley(q_DBB: torch.Tensor) -> torch.Tensor:
    """(I - Q)(I + Q)⁻¹."""
    eye = torch.eye(q_DBB.shape[-1], dtype=q_DBB.dtype)
    return torch.linalg.solve(eye + q_DBB, eye - q_DBB, left=False)


def _blocks(upper_DN: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    q_DBB = skew(upper_DN)
    if config.get("coft", False):
        # The freedom of rotation is spread over the blocks.
        limit = config.get("eps", 6e-5) / math.sqrt(q_DBB.shape[0])
        norm = q_DBB.norm(dim=(1, 2), keepdim=True)
        q_DBB = torch.where(norm <= limit, q_DBB, limit * q_DBB / norm)
    if config["use_cayley_neumann"]:
        return neumann(q_DBB, config.get("num_cayley_neumann_terms", 5)).float()
    return cayley(q_DBB).float()


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    upper_DN = module[OFT_R]
    blocks_DBB = _blocks(upper_DN, module.config)
    if not module.config.get("block_share", False):
        return (Turn(blocks_DBB),)

    def repeated(in_features: int) -> tuple[Term, ...]:
        count, rest = divmod(in_features, blocks_DBB.shape[1])
        if rest or upper_DN.shape[0] != 1:
            raise AdapterError(
                f"{OFT_R!r} has {upper_DN.shape[0]} blocks of {blocks_DBB.shape[1]} features; with block_share it must "
                f"be one whose size divides {in_features}"
            )
        return (Turn(blocks_DBB.repeat(count, 1, 1)),)

    if module.scope.in_features is not None:
        return repeated(module.scope.in_features)

    def build(probe: Probe) -> tuple[Term, ...]:
        return repeated(probe.shape[1])

    return (FromBase(build, (upper_DN,)),)


OFT = Family(
    name="OFT",
    title="OFT, both Cayley forms",
    keys={
        **TUNER,
        "bias": bias_key("oft"),
        # Blocks are counted and sized by the file; PEFT moves these to divisors of the layer.
        "r": ANYTHING,
        # Files of PEFT before 0.14 have none and mean something else.
        "oft_block_size": Key(
            "an integer of at least 0", lambda value: type(value) is int and value >= 0, required=True
        ),
        "coft": BOOLEAN,
        "eps": replace(NUMBER, required=False),
        "block_share": BOOLEAN,
        "use_cayley_neumann": replace(only(False), required=True),
        "num_cayley_neumann_terms": SERIES,
        # Used only while training.
        "module_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(OFT_R, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=lambda scope: {OFT_R: Part((None, None)), **bias_parts(scope)},
    terms=and_biases(_terms),
    kinds=(Turn, Offset),
)

OFT_NEUMANN = replace(
    OFT,
    name="OFT_NEUMANN",
    title="OFT with the Neumann series",
    peft_type="OFT",
    when=lambda config: config.get("use_cayley_neumann") is True,
    keys={
        **OFT.keys,
        "use_cayley_neumann": only(True),
        "peft_version": Key("0.18 or later: the Neumann series was another one before", _is_since_0_18, required=True),
    },
    note="of PEFT 0.18 or later",
)
