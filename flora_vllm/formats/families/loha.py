"""LoHa (arXiv 2108.06098) as PEFT 0.21 saves it: `W + alpha/r · (w1_a w1_b) ∘ (w2_a w2_b)`, of rank r².

Entry (o, i) is Σ_jk w1_a[o,j] w2_a[o,k] · w1_b[j,i] w2_b[k,i]: low rank with a pair (j, k) for each of the r² ranks.
"""

from flora_vllm.formats.config_keys import ANYTHING, NUMBER, NUMBER_PATTERN, RANK, RANK_PATTERN, TUNER
from flora_vllm.formats.families.family import Family, ModuleFile, Part, pattern_rank
from flora_vllm.terms import Added, Term

W1_A, W1_B, W2_A, W2_B = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    left1, right1, left2, right2 = (module[part].float() for part in (W1_A, W1_B, W2_A, W2_B))
    up = (left1[:, :, None] * left2[:, None, :]).flatten(1)
    down = (right1[:, None, :] * right2[None, :, :]).flatten(0, 1)
    alpha = module.scope.by_pattern("alpha_pattern", module.config["alpha"])
    return (Added(down, up, alpha / left1.shape[1]),)


LOHA = Family(
    name="LOHA",
    title="LoHa",
    keys={
        **TUNER,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        "alpha": NUMBER,
        "alpha_pattern": NUMBER_PATTERN,
        # Used only while training, or only by convolutions.
        **dict.fromkeys(("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"), ANYTHING),
    },
    names=(W1_A, W1_B, W2_A, W2_B),
    parts=lambda _scope: {
        W1_A: Part(("O", "R")),
        W1_B: Part(("R", "I")),
        W2_A: Part(("O", "R")),
        W2_B: Part(("R", "I")),
    },
    ranks=pattern_rank,
    terms=_terms,
    kinds=(Added,),
    note="rank r² at run time",
)
