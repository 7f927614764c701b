"""Experts that a checkpoint holds as two parameters of one layer, as transformers 5 does and PEFT adapts them.

LoraConfig's `target_parameters` gives each parameter (E experts, O, I) factors of all experts in one: lora_A is
(E·R, I) with the ranks of expert 0 first, lora_B is (O, R·E) with rank 0 of all experts first
(`peft/tuners/lora/layer.py::ParamWrapper.get_delta_factors`). They are read as LoRAs of each expert's own layers.
Of two parameters of one module the second wraps the first, whose tensors have `base_layer` in their names.

Who trains with other tools writes what vLLM's LoRA reads, and no `target_parameters`: the same two, or both with an
axis for the experts, lora_A (E, R, I) and lora_B (O, R, E); and, for `--enable-moe-shared-loras`, each projection alone
as `experts.w1` (gate), `w3` (up) and `w2` (down), lora_A (E, R, I) and lora_B (E, O, R), with 1 in place of E in what
all experts share.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flora_vllm.adapter import ExpertsLayout, ModelLayout
from flora_vllm.formats.config_keys import EXPERTS_WHOLE, CheckedConfig
from flora_vllm.formats.families.family import Axes, Part, pattern_rank
from flora_vllm.formats.families.lora import LORA_A, LORA_B, lora_scale
from flora_vllm.formats.module_faults import Records, refusal, scope_of, tensor_faults
from flora_vllm.formats.names import PREFIX
from flora_vllm.terms import Added, Term

_BASE_LAYER, _EXPERTS = ".base_layer", ".experts"
# Gate, up and down of all experts, in vLLM's names.
_STACKED = ("w1", "w3", "w2")


@dataclass(frozen=True, eq=False)
class Parameter:
    """One adapted parameter. `path`: the experts'; `name`: one of EXPERTS_WHOLE or _STACKED; `saved_as`: the module in
    the file."""

    path: str
    name: str
    saved_as: str
    records: Records

    @property
    def full(self) -> str:
        return f"{self.path}.{self.name}"

    @property
    def is_stacked(self) -> bool:
        return self.name in _STACKED


def take_parameters(
    config: Mapping[str, Any], modules: Mapping[str, Records], *, unsaid: bool
) -> tuple[dict[str, Records], tuple[Parameter, ...], list[str]]:
    """The modules that are modules, the parameters among them, and the faults of how they are named.

    `unsaid`: the family adapts parameters, also where the config has none and the tensors' names say so.
    """
    targets = config.get("target_parameters") or []
    others: dict[str, Records] = {}
    parameters, faults = [], []
    nested: dict[str, dict[str, Records]] = {}

    def names_of(path: str) -> list[str]:
        are_both = unsaid and path.endswith(_EXPERTS) and {path, path + _BASE_LAYER} <= modules.keys()
        return [*EXPERTS_WHOLE] if are_both and not targets else _targeted(path, targets)

    for module, records in modules.items():
        holder, _, own = module.rpartition(".")
        if unsaid and own in _STACKED and holder.endswith(_EXPERTS):
            parameters.append(Parameter(holder, own, module, records))
            continue
        path = module
        while (targets or unsaid) and path.endswith(_BASE_LAYER):
            path = path.removesuffix(_BASE_LAYER)
        if names_of(path):
            nested.setdefault(path, {})[module] = records
        else:
            others[module] = records
    for path, found in nested.items():
        names = names_of(path)
        places = {path + _BASE_LAYER * depth: name for depth, name in enumerate(reversed(names))}
        for module, name in places.items():
            if module in found:
                parameters.append(Parameter(path, name, module, found.pop(module)))
            else:
                faults.append(
                    f"parameter '{path}.{name}' is selected by target_parameters but '{PREFIX}{module}' has no "
                    "tensors; the file is incomplete"
                )
        faults += [f"module {module!r} lies in no more parameters than {' and '.join(names)}" for module in found]
    return others, tuple(parameters), faults


def _targeted(path: str, targets: Sequence[str]) -> list[str]:
    """The parameters of `path` that PEFT adapts (`tuners_utils.py::_inject_parameters`), in the model's order."""
    if path.rpartition(".")[2] != "experts":  # a target may be `down_proj` alone, which every path could end in
        return []
    full = ((name, f"{path}.{name}") for name in EXPERTS_WHOLE)
    return [name for name, key in full if any(key == target or key.endswith(f".{target}") for target in targets)]


def parameter_faults(
    config: CheckedConfig, parameters: Sequence[Parameter], layout: ModelLayout | None
) -> Iterator[str]:
    """Faults of every parameter, and of those that the model has and the file has not."""
    for parameter in parameters:
        yield from _one_parameter_faults(config, parameter, layout)
    if layout is None or not parameters:
        return
    present = {(layout.rename(parameter.path), parameter.name) for parameter in parameters}
    for path in layout.experts:
        for name in _targeted(path, config.values.get("target_parameters") or []):
            if (path, name) not in present:
                yield f"parameter '{path}.{name}' is selected by target_parameters but has no tensors"


def _one_parameter_faults(config: CheckedConfig, parameter: Parameter, layout: ModelLayout | None) -> Iterator[str]:
    reason = refusal(parameter.path, layout)
    if reason is not None:
        yield f"parameter {parameter.full!r} cannot be adapted: {reason}"
        return
    experts = None if layout is None else layout.experts.get(layout.rename(parameter.path))
    if layout is not None and experts is None:
        yield f"parameter {parameter.full!r} is not in the base model; was the adapter trained on another model?"
        return
    for name in {LORA_A, LORA_B} - parameter.records.keys():
        yield f"tensor '{PREFIX}{parameter.saved_as}.{name}' is missing; the file is incomplete"
    if config.bad & {"r", "rank_pattern"}:
        return
    rank = _rank(parameter, config.values)
    sizes: dict[str, int] = {}
    number = None if experts is None else experts.number
    if layout is not None and experts is not None:
        if reason := next(filter(None, (refusal(m, layout) for m in _names(parameter, experts))), None):
            yield f"parameter {parameter.full!r} cannot be adapted: {reason}"
            return
        shapes = [layout.shapes[layout.rename(module)] for module in _names(parameter, experts)]
        sizes = {"O": sum(rows for rows, _ in shapes), "I": shapes[0][1]}
    counts: dict[str, int] = {}
    for name, record in parameter.records.items():
        if name not in (LORA_A, LORA_B):
            yield f"tensor {record.name!r} has no place in a parameter's adapter; correct the config or remove it"
            continue
        is_flat = len(record.shape) != 3 and not parameter.is_stacked
        part = Part(_axes(parameter, name, record.shape, rank, number))
        yield from tensor_faults(record, part, () if number is None else (rank * number,), sizes)
        if number is None and is_flat and (len(record.shape) != 2 or record.shape[name == LORA_B] % rank):
            yield f"tensor {record.name!r} has shape {record.shape}; it must have rank {rank} of each expert"
        elif number is None and len(record.shape) in (2, 3):  # any other is a fault already
            counts[record.name] = _count(parameter, name, record.shape, rank)
    if len({*counts.values()} - ({1} if parameter.is_stacked else set())) > 1:
        yield f"the tensors of parameter {parameter.full!r} disagree about the number of experts: {counts}"


def _axes(parameter: Parameter, name: str, shape: Sequence[int], rank: int, number: int | None) -> Axes:
    """What the axes of lora_A or lora_B are, of `number` experts if that is known."""
    if parameter.is_stacked:
        of_each = 1 if tuple(shape[:1]) == (1,) else number
        return (of_each, rank, "I") if name == LORA_A else (of_each, "O", rank)
    if len(shape) == 3:
        return (number, rank, "I") if name == LORA_A else ("O", rank, number)
    return ("R", "I") if name == LORA_A else ("O", "R")


def _count(parameter: Parameter, name: str, shape: Sequence[int], rank: int) -> int:
    """The number of experts that lora_A or lora_B has, of a shape without faults; 1 of what they share."""
    is_first = parameter.is_stacked or name == LORA_A
    size = shape[0] if is_first else shape[-1]
    return size if len(shape) == 3 else size // rank


def expert_modules(
    parameter: Parameter, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], layout: ModelLayout | None
) -> Iterator[tuple[str, tuple[Term, ...]]]:
    """(module path, terms) of each expert's layers; the parameter has no faults."""
    rank = _rank(parameter, config)
    scale = lora_scale(scope_of(config, parameter.full, None, parameter.records), rank)
    experts = None if layout is None else layout.experts[layout.rename(parameter.path)]
    down, up = tensors[LORA_A], tensors[LORA_B]
    found = max(_count(parameter, name, tensors[name].shape, rank) for name in (LORA_A, LORA_B))
    if parameter.is_stacked:
        downs, ups = [*down], [*up]
    else:
        downs = [*down.view(found, rank, down.shape[-1])]
        ups = [*up.view(len(up), rank, found).permute(2, 0, 1)]
    for number in range(found if experts is None else experts.number):
        down_RI, up_OR = (each[0 if len(each) == 1 else number] for each in (downs, ups))
        # How a model orders gate and up is not in the file: without the model they stay together.
        names = [f"{parameter.path}.{number}.{parameter.name}"]
        if experts is not None:
            names = _names(parameter, experts, number)
        if experts is not None and experts.is_interleaved:
            parts = [up_OR[i :: len(names)] for i in range(len(names))]
        else:
            parts = up_OR.chunk(len(names))
        for name, part_OR in zip(names, parts, strict=True):
            yield name, (Added(down_RI, part_OR, scale),)


def _names(parameter: Parameter, experts: ExpertsLayout, number: int = 0) -> list[str]:
    """The modules of one expert that the parameter holds, in its order."""
    alone = {"w1": experts.gate, "w3": experts.up}
    parts = experts.inputs if parameter.name == "gate_up_proj" else (alone.get(parameter.name, experts.down),)
    return [f"{parameter.path}.{number}.{part}" for part in parts]


def _rank(parameter: Parameter, config: Mapping[str, Any]) -> int:
    return pattern_rank(scope_of(config, parameter.full, None, parameter.records))[0]
