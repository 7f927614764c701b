"""HiRA as PEFT 0.21 saves it: `W ∘ (1 + hira_B @ hira_A)`, no scale (`peft/tuners/hira/layer.py::_merge`)."""

from flora_vllm.formats.config_keys import ANYTHING, RANK, RANK_PATTERN, TUNER
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope, pattern_rank
from flora_vllm.terms import Product, Term

# Parameters of a ParameterDict, hence no `.weight`.
HIRA_A, HIRA_B = "hira_A", "hira_B"


def _ranks(scope: Scope) -> tuple[int, ...]:
    # PEFT 0.21 builds plain linear layers with `r` whatever rank_pattern says (`hira/layer.py::dispatch_default`).
    return (*pattern_rank(scope), scope.config["r"])


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    return (Product(), Product(module[HIRA_A], module[HIRA_B]))


HIRA = Family(
    name="HIRA",
    title="HiRA",
    keys={
        **TUNER,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        # Used only while training.
        "hira_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(HIRA_A, HIRA_B),
    parts=lambda _scope: {HIRA_A: Part(("R", "I")), HIRA_B: Part(("O", "R"))},
    ranks=_ranks,
    terms=_terms,
    kinds=(Product,),
    limit="flora",
    by_structure=True,
)
