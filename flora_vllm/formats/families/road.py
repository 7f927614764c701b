"""RoAd (arXiv 2409.00119) as PEFT 0.21 saves it: pairs of output halves turned and scaled, the bias with them.

`road_theta` and `road_alpha` have a number for each pair (road_1), each output (road_2), or each output and column of
the rotation (road_4); an output's partner is half a `group_size` away (`peft/tuners/road/layer.py::_prepare_cols`).
"""

from collections.abc import Mapping

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, TARGETS, Key, is_rank
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.terms import Swap, Term

ROAD_THETA, ROAD_ALPHA = "road_theta", "road_alpha"
# Numbers of each tensor for two outputs.
_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


def _parts(scope: Scope) -> Mapping[str, Part]:
    size = None if scope.out_features is None else scope.out_features * _PER_PAIR[scope.config["variant"]] // 2
    return {ROAD_THETA: Part((size,)), ROAD_ALPHA: Part((size,))}


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    theta, alpha = module[ROAD_THETA].double(), module[ROAD_ALPHA].double()
    variant, group = module.config["variant"], module.config["group_size"]
    outputs = 2 * theta.shape[0] // _PER_PAIR[variant]
    if theta.shape != alpha.shape or group % 2 or outputs % group:
        raise AdapterError(
            f"{ROAD_THETA!r} and {ROAD_ALPHA!r} have lengths {theta.shape[0]} and {alpha.shape[0]}; they must be equal "
            f"and, of {variant}, fill groups of {group} outputs, an even number"
        )
    if variant == "road_1":
        theta, alpha = (t.reshape(-1, 1, group // 2).expand(-1, 2, -1).flatten() for t in (theta, alpha))
    if variant == "road_4":
        theta, alpha = (t.reshape(-1, 2, group) for t in (theta, alpha))
        first_O, second_O = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
    else:
        first_O, second_O = alpha * theta.cos(), alpha * theta.sin()
    return (Swap(first_O.flatten().float(), second_O.flatten().float(), group),)


ROAD = Family(
    name="ROAD",
    title="RoAd 1, 2 and 4",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        "variant": Key("'road_1', 'road_2' or 'road_4'", lambda value: value in tuple(_PER_PAIR), required=True),
        "group_size": Key("an integer of at least 1", is_rank, required=True),
        "init_weights": ANYTHING,
    },
    names=(ROAD_THETA, ROAD_ALPHA),
    parts=_parts,
    terms=_terms,
    kinds=(Swap,),
)
