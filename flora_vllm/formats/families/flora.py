"""FLoRA on disk (arXiv 2312.05677): `W_s = c · W ∘ (flora_B @ flora_A)`, c = 1/r for mean, 1 for sum."""

from flora_vllm.formats.config_keys import ANYTHING, RANK, RANK_PATTERN, TUNER, only
from flora_vllm.formats.families.family import Family, ModuleFile, Part, pattern_rank
from flora_vllm.terms import Product, Term

FLORA_A, FLORA_B = "flora_A.weight", "flora_B.weight"


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    a_RI, b_OR = module[FLORA_A], module[FLORA_B]
    scale = 1.0 / a_RI.shape[0] if module.config.get("reduction", "mean") == "mean" else 1.0
    return (Product(a_RI, b_OR, scale),)


FLORA = Family(
    name="FLORA",
    title="FLoRA, any rank, mean or sum",
    keys={
        **TUNER,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        "reduction": only("mean", "sum"),
        # Used only while training.
        "flora_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(FLORA_A, FLORA_B),
    parts=lambda _scope: {FLORA_A: Part(("R", "I")), FLORA_B: Part(("O", "R"))},
    ranks=pattern_rank,
    terms=_terms,
    kinds=(Product,),
    limit="flora",
    by_structure=True,
    note="this project's PEFT method",
)
