"""LoKr as PEFT 0.21 saves it: `scale · (w1 ⊗ w2) x`, scale = alpha/r; each factor whole or a product of two.

PEFT splits each side of the layer in two, and stores a factor whole or as two, as the config says
(`peft/tuners/lokr/layer.py`). A file that holds others is one that PEFT cannot read, or reads a part of: refused.
"""

import math
from collections.abc import Mapping

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, NUMBER, NUMBER_PATTERN, RANK, RANK_PATTERN, TUNER, Key
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


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers of product `size`: `factor` and the rest, if it divides; else as near √size as `factor` (-1: any)
    lets the smaller one be."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = min(size if factor == -1 else factor, math.isqrt(size))
    smaller = max((number for number in range(1, most + 1) if size % number == 0), default=1)
    return smaller, size // smaller


def _expected(module: ModuleFile, rank: int) -> dict[str, tuple[int, int]]:
    """The tensors that PEFT has for this module with this config, and their shapes."""
    scope, config = module.scope, module.config
    rows = [module[W1 if W1 in module else W1_A].shape[0], module[W2 if W2 in module else W2_A].shape[0]]
    columns = [module[W1 if W1 in module else W1_B].shape[1], module[W2 if W2 in module else W2_B].shape[1]]
    factor = config.get("decompose_factor", -1)
    left, right = zip(
        split(scope.out_features or math.prod(rows), factor),
        split(scope.in_features or math.prod(columns), factor),
        strict=True,
    )
    found: dict[str, tuple[int, int]] = {}
    for names, (out, into), may_be_two in (
        ((W1, W1_A, W1_B), left, config.get("decompose_both", False)),
        ((W2, W2_A, W2_B), right, True),
    ):
        whole, first, second = names
        is_two = may_be_two and rank < max(out, into) / 2
        found |= {first: (out, rank), second: (rank, into)} if is_two else {whole: (out, into)}
    return found


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    config, scope = module.config, module.scope
    rank = scope.by_pattern("rank_pattern", config["r"])
    expected = _expected(module, rank)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.tensors.items()}
    if shapes != expected:
        raise AdapterError(
            f"it has {shapes}; with the config's r, decompose_both and decompose_factor PEFT reads {expected}: correct "
            "them to what it was trained with"
        )
    scale = scope.by_pattern("alpha_pattern", config["alpha"]) / rank
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
        "decompose_both": BOOLEAN,
        "decompose_factor": Key("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
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
