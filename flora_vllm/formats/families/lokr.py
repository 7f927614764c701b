"""LoKr as PEFT 0.21 saves it: `scale · (w1 ⊗ w2) x`, scale = alpha/r; each factor whole or a product of two.

The shapes are the file's: PEFT splits each side of the layer in two as the config says (`peft/tuners/lokr/layer.py`).
"""

from collections.abc import Mapping

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, NUMBER, NUMBER_PATTERN, RANK, RANK_PATTERN, TUNER
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.terms import Kron, Term

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B = "lokr_w2", "lokr_w2_a", "lokr_w2_b"


def _parts(scope: Scope) -> Mapping[str, Part]:
    parts: dict[str, Part] = {}
    for whole, *factors in ((W1, W1_A, W1_B), (W2, W2_A, W2_B)):
        names = factors if scope.present & set(factors) else (whole,)
        parts |= {name: Part((None, None)) for name in names}
    return parts


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    for left, right in ((W1_A, W1_B), (W2_A, W2_B)):
        if left in module and module[left].shape[1] != module[right].shape[0]:
            shapes = f"{tuple(module[left].shape)} and {tuple(module[right].shape)}"
            raise AdapterError(f"{left!r} and {right!r} have shapes {shapes}, which no product has")
    config, scope = module.config, module.scope
    scale = scope.by_pattern("alpha_pattern", config["alpha"]) / scope.by_pattern("rank_pattern", config["r"])
    left = module[W1] if W1 in module else module[W1_A].float() @ module[W1_B].float()
    if W2 in module:
        return (Kron(left, module[W2], scale=scale),)
    return (Kron(left, module[W2_A], module[W2_B], scale),)


LOKR = Family(
    name="LOKR",
    title="LoKr",
    keys={
        **TUNER,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        "alpha": NUMBER,
        "alpha_pattern": NUMBER_PATTERN,
        # The file's shapes say how each side was split.
        "decompose_both": ANYTHING,
        "decompose_factor": ANYTHING,
        # Of convolutions, which are refused.
        "use_effective_conv2d": ANYTHING,
        # Used only while training.
        "rank_dropout": ANYTHING,
        "rank_dropout_scale": ANYTHING,
        "module_dropout": ANYTHING,
        "init_weights": ANYTHING,
    },
    names=(W1, W1_A, W1_B, W2, W2_A, W2_B),
    parts=_parts,
    terms=_terms,
    kinds=(Kron,),
    note="as two small products",
)
