"""DeLoRA (arXiv 2503.18225) as PEFT 0.21 saves it: `W + B diag(λ / (r ‖A_k‖ ‖B_k‖)) A` by columns times their norms.

The norms of the base's columns are those at the start of training, which the file has
(`peft/tuners/delora/layer.py::_compute_delta`).
"""

from flora_vllm.formats.config_keys import ANYTHING, RANK, RANK_PATTERN, TUNER
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part, pattern_rank
from flora_vllm.terms import Added, Offset, Term

DELORA_A, DELORA_B, DELORA_LAMBDA, DELORA_NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_LEAST_NORM = 1e-4


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    down, up, bound, norms = (module[part].float() for part in (DELORA_A, DELORA_B, DELORA_LAMBDA, DELORA_NORM))
    sizes_R = down.norm(dim=1).clamp(min=_LEAST_NORM) * up.norm(dim=0).clamp(min=_LEAST_NORM)
    return (Added(down * norms, up, mid=bound / down.shape[0] / sizes_R),)


DELORA = Family(
    name="DELORA",
    title="DeLoRA",
    keys={
        **TUNER,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        "bias": bias_key("delora"),
        # Where λ starts; the file has where it ended.
        **dict.fromkeys(("delora_lambda", "lambda_pattern"), ANYTHING),
        # Used only while training.
        **dict.fromkeys(("module_dropout", "init_weights"), ANYTHING),
    },
    names=(DELORA_A, DELORA_B, DELORA_LAMBDA, DELORA_NORM, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=lambda scope: {
        DELORA_A: Part(("R", "I")),
        DELORA_B: Part(("O", "R")),
        DELORA_LAMBDA: Part((1,)),
        DELORA_NORM: Part(("I",)),
        **bias_parts(scope),
    },
    ranks=pattern_rank,
    terms=and_biases(_terms),
    kinds=(Added, Offset),
)
