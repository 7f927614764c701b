"""PEANuT (arXiv 2410.01870) as PEFT 0.21 saves it: `W + scaling · (f(Wᵀ) Bᵀ)ᵀ`, f a small network over W's columns.

f(Wᵀ) is (I, r) and known once the weight is, so what is served is low rank
(`peft/tuners/peanut/layer.py::_compute_delta_weight`).
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import gelu, leaky_relu, mish, relu, relu6, selu, silu

from flora_vllm.formats.config_keys import ANYTHING, NUMBER, RANK, TUNER, Key, integer, only
from flora_vllm.formats.families.family import Family, ModuleFile, Part, Scope
from flora_vllm.terms import Added, FromBase, Probe, Term

PEANUT_A, PEANUT_B = "peanut_A.weight", "peanut_B.weight"
ENCODERS, DECODERS = "peanut_encoders.*.weight", "peanut_decoders.*.weight"

# transformers' names of activations without parameters.
_ACTIVATIONS = {
    "gelu": gelu,
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
    "leaky_relu": leaky_relu,
    "linear": lambda x: x,
    "mish": mish,
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
    "relu6": relu6,
    "selu": selu,
    "sigmoid": torch.sigmoid,
    "silu": silu,
    "swish": silu,
    "tanh": torch.tanh,
}


def _parts(scope: Scope) -> Mapping[str, Part]:
    depth = scope.config["depth"]
    inner = [pattern.replace("*", str(i)) for pattern in (ENCODERS, DECODERS) for i in range(depth)]
    return {PEANUT_A: Part(("R", "O")), PEANUT_B: Part(("O", "R")), **{name: Part(("R", "R")) for name in inner}}


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    first, up, depth = module[PEANUT_A].float(), module[PEANUT_B], module.config["depth"]
    encoders, decoders = (
        [module[pattern.replace("*", str(i))].float() for i in range(depth)] for pattern in (ENCODERS, DECODERS)
    )
    activation, scaling = _ACTIVATIONS[module.config["act_fn"]], module.config["scaling"]

    def build(probe: Probe) -> tuple[Term, ...]:
        state_IR = activation(probe.weight().T @ first.T)
        kept = []
        for encoder in encoders:
            kept.append(state_IR)
            state_IR = activation(state_IR @ encoder.T)
        for decoder in decoders:
            state_IR = activation(state_IR @ decoder.T) + kept.pop()
        return (Added(state_IR.T.contiguous(), up, scaling),)

    return (FromBase(build, (first, up, *encoders, *decoders), first.shape[0], (up.shape[0], None)),)


PEANUT = Family(
    name="PEANUT",
    title="PEANuT, any depth",
    keys={
        **TUNER,
        "r": RANK,
        "depth": integer(0, 256, required=True),
        "act_fn": Key(only(*sorted(_ACTIVATIONS)).allowed, only(*_ACTIVATIONS).check, required=True),
        "scaling": NUMBER,
        "init_weights": ANYTHING,  # used only while training
    },
    names=(PEANUT_A, PEANUT_B, ENCODERS, DECODERS),
    parts=_parts,
    ranks=lambda scope: (scope.config["r"],),
    terms=_terms,
    kinds=(Added,),
    note="reads every base weight at load",
)
