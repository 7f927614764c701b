"""GLoRA (arXiv 2306.07967) as PEFT 0.21 saves it: `W ∘ (1 + A) + B`, and where W has a bias, `b ∘ (1 + D) + E + W C`.

A and B are products of factors, a column, one number or nothing, C and D, E likewise, as the config says; what is
nothing is saved as a tensor of zeros (`peft/tuners/glora/layer.py`).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, RANK, TARGETS, only
from flora_vllm.formats.families.biases import BASE_BIAS, BIAS_NAMES, and_biases, bias_key, bias_parts
from flora_vllm.formats.families.family import Axes, Family, ModuleFile, Part, Scope
from flora_vllm.terms import Added, FromBase, Offset, Probe, Product, Term

_PATHS = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")
_KINDS = ("Xd", "Xu", "X", "zeros")


def _path_parts(name: str, kind: str, rows: str, columns: str | int | None) -> Mapping[str, Part]:
    """`columns`: None for a path that is a vector."""
    end: Axes = () if columns is None else (columns,)
    match kind:
        case "lora":
            return {f"{name}.Xd": Part((rows, "R")), f"{name}.Xu": Part(("R", *end))}
        case "vector":
            return {f"{name}.X": Part((rows,) if columns is None else (rows, 1))}
        case "constant":
            return {f"{name}.X": Part((1,))}
        case _:
            return {f"{name}.zeros": Part((rows, *end))}


def _parts(scope: Scope) -> Mapping[str, Part]:
    weights, coupled, biases = (scope.config[f"config_{path}"] for path in ("A_B", "C", "D_E"))
    kinds = (weights, weights, coupled, biases, biases)
    parts = dict(bias_parts(scope))
    for name, kind, columns in zip(_PATHS, kinds, ("I", "I", 1, None, None), strict=True):
        rows = "I" if name == "glora_C" else "O"
        # A layer without bias has nothing there, whatever the config says.
        nothing = columns != "I" and f"{name}.zeros" in scope.present
        parts |= _path_parts(name, "none" if nothing else kind, rows, columns)
    return parts


def _of_weight(module: ModuleFile) -> tuple[Term, ...]:
    if "glora_A.Xd" in module:
        return (
            Product(),
            Product(module["glora_A.Xu"], module["glora_A.Xd"]),
            Added(module["glora_B.Xu"], module["glora_B.Xd"]),
        )
    gain, shift = module.get("glora_A.X"), module.get("glora_B.X")
    if gain is None or shift is None:
        return ()
    out_features, in_features = module.scope.out_features, module.scope.in_features
    if out_features is None or in_features is None:
        return (FromBase(lambda probe: _by_output(gain, shift, *probe.shape), (gain, shift), 1),)
    return _by_output(gain, shift, out_features, in_features)


def _by_output(gain: torch.Tensor, shift: torch.Tensor, out_features: int, in_features: int) -> tuple[Term, ...]:
    """(O, 1) or (1,) each: a factor of each output and a number beside all weights of each output."""
    gain_O1, shift_O1 = (t.float().reshape(-1, 1).expand(out_features, 1).contiguous() for t in (gain, shift))
    return Product(output=1 + gain_O1), Added(torch.ones(1, in_features), shift_O1)


def _of_bias(module: ModuleFile, probe: Probe) -> tuple[Term, ...]:
    saved = module.get(BASE_BIAS)
    bias_O = probe.bias() if saved is None else saved.float()
    if bias_O is None:
        return ()
    offset_O = torch.zeros_like(bias_O)
    if "glora_C.Xd" in module:
        offset_O = offset_O + probe.product((module["glora_C.Xd"].float() @ module["glora_C.Xu"].float()).T)[0]
    elif "glora_C.X" in module:
        offset_O = offset_O + probe.product(module["glora_C.X"].float().T)[0]
    if "glora_D.X" in module:
        offset_O = offset_O + bias_O * module["glora_D.X"].float()
    if "glora_E.X" in module:
        offset_O = offset_O + module["glora_E.X"].float()
    return (Offset(offset_O),)


def _terms(module: ModuleFile) -> tuple[Term, ...]:
    for name in _PATHS:
        zeros = module.get(f"{name}.zeros")
        if zeros is not None and zeros.any():
            raise AdapterError(f"'{name}.zeros' stands for nothing and has values other than 0; save the adapter again")
    held = tuple(t for name, t in module.tensors.items() if name.startswith(("glora_C", "glora_D", "glora_E")))
    return (*_of_weight(module), FromBase(lambda probe: _of_bias(module, probe), held))


GLORA = Family(
    name="GLORA",
    title="GLoRA, all paths",
    keys={
        **BOOKKEEPING,
        **TARGETS,
        "bias": bias_key("glora"),
        "r": RANK,
        **{
            f"config_{path}": replace(only(*kinds), required=True)
            for path, kinds in (
                ("A_B", ("lora", "vector", "constant", "none")),
                ("C", ("lora", "vector", "none")),
                ("D_E", ("vector", "constant", "none")),
            )
        },
        "init_weights": ANYTHING,
    },
    names=(*(f"{name}.{kind}" for name in _PATHS for kind in _KINDS), *BIAS_NAMES),
    alone=frozenset(BIAS_NAMES),
    parts=_parts,
    ranks=lambda scope: (scope.config["r"],),
    terms=and_biases(_terms),
    kinds=(Product, Added, Offset),
    limit="lora",
)
