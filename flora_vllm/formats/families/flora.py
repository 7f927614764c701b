"""FLoRA on disk (arXiv 2312.05677): `W_s = c · W ∘ (flora_B @ flora_A)`, c = 1/r for mean, 1 for sum."""

from collections.abc import Mapping

import torch

from flora_vllm.adapter import Hadamard, ModuleTerms
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, LAYER_SUBSET, RANK, RANK_PATTERN, TARGETS, only
from flora_vllm.formats.families.family import Axes, Config, Family
from flora_vllm.formats.matching import match_pattern

FLORA_A, FLORA_B = "flora_A.weight", "flora_B.weight"


def _axes(_config: Config, _module: str) -> Mapping[str, Axes]:
    return {FLORA_A: ("R", "I"), FLORA_B: ("O", "R")}


def pattern_rank(config: Config, module: str) -> tuple[int, ...]:
    """The one rank a module may have: its `rank_pattern` entry, else `r`."""
    return (match_pattern(config.get("rank_pattern") or {}, module, config["r"]),)


def _terms(config: Config, _module: str, parts: Mapping[str, torch.Tensor]) -> ModuleTerms:
    a_RI, b_OR = parts[FLORA_A], parts[FLORA_B]
    scale = 1.0 / a_RI.shape[0] if config.get("reduction", "mean") == "mean" else 1.0
    return ModuleTerms(hadamard=Hadamard(a_RI, b_OR, scale=scale))


FLORA = Family(
    name="FLORA",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        **LAYER_SUBSET,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        "reduction": only("mean", "sum"),
        # Used only while training.
        "flora_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    parts=(FLORA_A, FLORA_B),
    axes=_axes,
    ranks=pattern_rank,
    terms=_terms,
    limit="flora",
)
