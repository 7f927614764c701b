"""DEFT as PEFT 0.21 saves it: `(I − Q Vᵀ) W + alpha/r · Q R`, a part of W's outputs taken away and another put there.

`decomposition_method`: "relu" has Q = P, V = relu(P), "qr" the orthonormal factor of P for both; `para` puts nothing in
its place (`peft/tuners/deft/layer.py::_project, _delta_from_factor`).
"""

from collections.abc import Mapping

import torch

from flora_vllm.formats.config_keys import ANYTHING, BOOLEAN, NUMBER, RANK, TUNER, Key, only
from flora_vllm.formats.families.biases import BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.terms import Added, FromBase, Offset, Probe, Term

DEFT_P, DEFT_R = "deft_P", "deft_R"


def _parts(scope: Scope) -> Mapping[str, Part]:
    parts = {DEFT_P: Part(("O", "R")), **bias_parts(scope)}
    return parts if scope.config.get("para") else {**parts, DEFT_R: Part(("R", "I"))}


def _ranks(scope: Scope) -> tuple[int, ...]:
    rank = scope.config["r"]
    return (rank,) if scope.out_features is None else (min(rank, scope.out_features),)


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    p_OR = module[DEFT_P].float()
    if module.config.get("decomposition_method", "relu") == "qr":
        up = taken = torch.linalg.qr(p_OR)[0]
    else:
        up, taken = p_OR, torch.relu(p_OR)
    alpha, put = module.config.get("alpha"), module.get(DEFT_R)
    scale = alpha / p_OR.shape[1] if alpha else 1.0

    def build(probe: Probe) -> tuple[Term, ...]:
        down = -(taken.T @ probe.weight())
        return (Added(down if put is None else down + scale * put.float(), up),)

    tensors = (p_OR,) if put is None else (p_OR, put)
    return (FromBase(build, tensors, p_OR.shape[1], (p_OR.shape[0], None if put is None else put.shape[1])),)


DEFT = Family(
    name="DEFT",
    title="DEFT, relu and qr, PaRa",
    keys={
        **TUNER,
        "r": RANK,
        "alpha": Key("null or a finite number", lambda value: value is None or NUMBER.check(value)),
        "decomposition_method": only("relu", "qr"),
        "para": BOOLEAN,
        "bias": bias_key("deft"),
        # Used only while training.
        **dict.fromkeys(("deft_dropout", "init_scale", "init_weights"), ANYTHING),
    },
    names=(DEFT_P, DEFT_R, *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    ranks=_ranks,
    terms=and_biases(_terms),
    kinds=(Added, Offset),
    note="reads every base weight at load",
)
