"""HiRA as PEFT 0.21 saves it: `W ∘ (1 + hira_B @ hira_A)`, no scale (`peft/tuners/hira/layer.py::_merge`)."""

from collections.abc import Mapping

import torch

from flora_vllm.adapter import Hadamard, ModuleTerms
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, LAYER_SUBSET, RANK, RANK_PATTERN, TARGETS
from flora_vllm.formats.families.family import Axes, Config, Family
from flora_vllm.formats.families.flora import pattern_rank

# Parameters of a ParameterDict, hence no `.weight`.
HIRA_A, HIRA_B = "hira_A", "hira_B"


def _axes(_config: Config, _module: str) -> Mapping[str, Axes]:
    return {HIRA_A: ("R", "I"), HIRA_B: ("O", "R")}


def _ranks(config: Config, module: str) -> tuple[int, ...]:
    # PEFT 0.21 builds plain linear layers with `r` whatever rank_pattern says (`hira/layer.py::dispatch_default`).
    return (*pattern_rank(config, module), config["r"])


def _terms(_config: Config, _module: str, parts: Mapping[str, torch.Tensor]) -> ModuleTerms:
    return ModuleTerms(hadamard=Hadamard(parts[HIRA_A], parts[HIRA_B], identity=True))


HIRA = Family(
    name="HIRA",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        **LAYER_SUBSET,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        # Used only while training.
        "hira_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    parts=(HIRA_A, HIRA_B),
    axes=_axes,
    ranks=_ranks,
    terms=_terms,
    limit="flora",
)
