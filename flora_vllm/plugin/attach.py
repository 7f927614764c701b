"""Which linear layers of a vLLM model can be adapted, and taking over their base call.

A layer is taken over by giving its quant method another `apply`: every way vLLM runs a linear layer goes through it,
with any quantisation, so the model's own code, sharding and collectives stay as they are. A layer class that does not
go through it (found out by running each class once) is left alone, and adapters for it are refused.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from flora_vllm.adapter import ExpertsLayout
from flora_vllm.embedding import AdaptedEmbedding
from flora_vllm.layers import Adapted, AdaptedLinear
from flora_vllm.norms import AdaptedNorm
from flora_vllm.ops.dispatch import NEVER, DispatchRule, PathChoice
from flora_vllm.ops.table import calibrated_rule, make_linear
from flora_vllm.ops.terms import LayerTerms, SlotLimits
from flora_vllm.plugin import experts, feed_forward
from flora_vllm.plugin.packing import Origin, idle_modules, origins_by_mapper, origins_by_mapping, reordered_modules
from flora_vllm.slots import LinearLayout, SliceLayout
from flora_vllm.step import Step

logger = logging.getLogger(__name__)

UNKNOWN_ROWS = "vLLM does not count it to this multimodal model's language model, tower or connector; train without it"
LEFT_OUT = "the server's --lora-target-modules leaves it out"
ABSORBED = "MLA's kv_b_proj is absorbed into the attention weights and cannot be adapted yet; train without it"
POOLED_ROWS = (
    "it runs on pooled rows, one a request, which adapters cannot follow yet; train the layers below the head only"
)


@dataclass
class Attached:
    """The adapted layers of a model: module path in the engine -> layer and layout; `refused`: path -> reason."""

    layers: dict[str, Adapted] = field(default_factory=dict)
    embeddings: dict[str, AdaptedEmbedding] = field(default_factory=dict)
    norms: dict[str, AdaptedNorm] = field(default_factory=dict)
    layouts: dict[str, LinearLayout] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    rules: dict[str, DispatchRule] = field(default_factory=dict)  # of layers that can be modulated
    biases: dict[str, torch.Tensor | None] = field(default_factory=dict)  # this rank's, also where the caller adds it
    experts: dict[str, ExpertsLayout] = field(default_factory=dict)  # their linear layers are among those above
    elsewhere: list[LinearLayout] = field(default_factory=list)  # experts of other ranks, which adapters may address
    # Layers of feed-forward blocks that rows may be routed through -> transformers' names of what their activation is.
    blocks: dict[str, frozenset[str]] = field(default_factory=dict)

    def graph_rows(self, name: str, terms: LayerTerms) -> int:
        """Base products that a token with these terms of layer `name` needs in a CUDA graph; NEVER if none has it."""
        return self.layers[name].graph_rows(terms) if name in self.layers else NEVER

    def write_slot(self, slot: int, layers: Mapping[str, LayerTerms]) -> Counter[int]:
        """Slot `slot` (>= 1) has these contents from now on, layer by layer; the empty one clears it.

        Tokens from which a segment of that slot is modulated -> in how many of its layers that multiply weights.
        """
        modulated_from: Counter[int] = Counter()
        for name, layer in (*self.layers.items(), *self.embeddings.items(), *self.norms.items()):
            terms = layers.get(name)
            layer.write_slot(slot, terms)
            parts = [part for part in terms or () if part is not None]
            scaled = [(part.products, len(part.a_RI)) for part in parts if part.a_RI is not None]
            if scaled:
                rule = self.rules.get(name)
                # Of slices that are modulated from different numbers on, the first.
                first = NEVER if rule is None else min(rule.modulate_from(*numbers) for numbers in scaled)
                modulated_from[first] += 1
        return modulated_from


def attach(
    model: torch.nn.Module,
    packed_modules: Mapping[str, Sequence[str]],
    step_of: Callable[[str], Step | None],
    path: PathChoice,
    device: torch.device,
    limits: SlotLimits,
    only: Callable[[str], bool],
    elsewhere: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> Attached:
    """Take over every linear layer that adapters may change, but for the output layer (`head.py`).

    `packed_modules`: vLLM's packed layer name -> the checkpoint's names. `step_of`: the step that says whose a layer's
    rows are, None if nothing does. `only`: the operator's restriction to some modules. `elsewhere`: of some layers,
    those that do not run on a step's rows, with the reason.
    """
    attached = Attached()
    found: dict[str, Any] = {}
    mixtures: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    seen: set[int] = set()
    mapped = origins_by_mapper(model)
    apart = {id(module): ABSORBED for module in _absorbed(model)}
    apart |= {id(module): POOLED_ROWS for module in _heads(model)}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and id(module) not in seen:
            seen.add(id(module))
            step = step_of(name)
            reason = apart.get(id(module)) or (None if only(name) else LEFT_OUT)
            if step is None or reason is not None:
                attached.refused[name] = reason or UNKNOWN_ROWS
                _give_back(module)
            else:
                found[name], steps[name] = module, step
        elif isinstance(module, MoERunner):
            step = step_of(name)
            reason = UNKNOWN_ROWS if step is None else experts.why_not_adapted(module, path, device)
            if step is None or reason is not None:
                attached.refused[name] = reason or UNKNOWN_ROWS
            else:
                mixtures[name], steps[name] = module, step
    bypassing = _classes_that_bypass(found, device)
    tried = {name: module for name, module in found.items() if _kind(module) not in bypassing}
    others = elsewhere(tried | {name: module.routed_experts for name, module in mixtures.items()})
    for name, module in found.items():
        layout = others.get(name) or _layout(name, module, packed_modules, mapped)
        kind = _kind(module)
        if isinstance(layout, LinearLayout) and kind not in bypassing:
            attached.layouts[name] = layout
            attached.dtypes[name] = module.params_dtype
            attached.biases[name] = getattr(module, "bias", None)
            attached.layers[name], rule = _take_over(module, layout, steps[name], path, device, limits)
            if rule is not None:
                attached.rules[name] = rule
        else:
            attached.refused[name] = layout if isinstance(layout, str) else bypassing[kind]
            _give_back(module)
    for name, module in mixtures.items():
        if name in others:
            attached.refused[name] = others[name]
        else:
            _take_experts(attached, name, module, steps[name], device, only)
    attached.blocks |= dict(feed_forward.take_over(model, attached.layers, device))
    _name_parts(attached, packed_modules)
    attached.refused |= idle_modules(model)
    slices = [part.module for layout in attached.layouts.values() for part in layout.slices]
    attached.refused |= reordered_modules(model, slices)
    return attached


def _take_experts(
    attached: Attached, name: str, runner: Any, step: Step, device: torch.device, only: Callable[[str], bool]
) -> None:
    taken = experts.take_over(name, runner, step, device)
    if isinstance(taken, str):
        logger.error("%s: %s; adapters with experts are refused", name, taken)
        attached.refused[name] = taken
        return
    attached.layers |= taken.layers
    attached.layouts |= taken.layouts
    attached.biases |= taken.biases
    dtype: torch.dtype = runner.routed_experts.params_dtype
    attached.dtypes |= dict.fromkeys(taken.layers, dtype)
    attached.experts[name] = taken.names
    attached.elsewhere += taken.elsewhere
    for layout in (*taken.layouts.values(), *taken.elsewhere):
        left_out = [part.module for part in layout.slices if not (only(name) or only(part.module))]
        attached.refused |= dict.fromkeys(left_out, LEFT_OUT)


def _heads(model: Any) -> Iterator[torch.nn.Module]:
    """What a pooling model runs on pooled rows: its pooler's layers, and those beside its body."""
    if hasattr(model, "pooler"):
        yield from model.pooler.modules() if isinstance(model.pooler, torch.nn.Module) else ()
        yield from (child for child in model.children() if isinstance(child, LinearBase))


def _name_parts(attached: Attached, packed_modules: Mapping[str, Sequence[str]]) -> None:
    """What is refused of a packed layer is refused of each checkpoint module in it."""
    for name, reason in list(attached.refused.items()):
        parent, _, own = name.rpartition(".")
        for part in packed_modules.get(own, ()):
            attached.refused.setdefault(f"{parent}.{part}" if parent else part, reason)


def _absorbed(model: torch.nn.Module) -> Iterator[Any]:
    """MLA's kv_b_proj, where it is held by vLLM's attention layer, which makes other weights of it."""
    yield from (
        module.kv_b_proj
        for module in model.modules()
        if isinstance(module, AttentionLayerBase) and hasattr(module, "kv_b_proj")
    )


def _kind(module: Any) -> tuple[type, type]:
    return type(module), type(module.quant_method)


def _classes_that_bypass(found: Mapping[str, Any], device: torch.device) -> dict[tuple[type, type], str]:
    """Run one layer of each class on one zero row with a recording `apply`; the classes that do not call it."""
    bypassing: dict[tuple[type, type], str] = {}
    tested: set[tuple[type, type]] = set()
    for module in found.values():
        kind = _kind(module)
        if kind in tested:
            continue
        tested.add(kind)
        calls: list[int] = []

        def record(layer: Any, x: torch.Tensor, bias: Any = None, calls: list[int] = calls) -> torch.Tensor:
            calls.append(x.shape[-1])
            return x.new_zeros((*x.shape[:-1], sum(layer.output_partition_sizes)))

        method = module.quant_method
        module.quant_method = copy.copy(method)
        module.quant_method.apply = record
        split = isinstance(module, RowParallelLinear) and module.input_is_parallel
        width = module.input_size_per_partition if split else module.input_size
        try:
            with torch.no_grad():
                module(torch.zeros((1, width), dtype=module.params_dtype, device=device))
            failure = None if calls else "its forward does not go through its quant method"
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            failure = f"its forward could not be checked ({error})"
        finally:
            module.quant_method = method
        if failure is not None:
            bypassing[kind] = f"layers of class {kind[0].__name__} with {kind[1].__name__} cannot be adapted: {failure}"
            logger.warning("%s; adapters that target them are refused", bypassing[kind])
    return bypassing


def _layout(
    name: str,
    module: Any,
    packed_modules: Mapping[str, Sequence[str]],
    mapped: Callable[[str, int], list[Origin] | None],
) -> LinearLayout | str:
    """The layer's layout on this rank, or why it cannot be adapted."""
    row = isinstance(module, RowParallelLinear)
    if not (row or isinstance(module, (ColumnParallelLinear, ReplicatedLinear))):
        return f"linear layers of class {type(module).__name__} cannot be adapted yet"
    local_in = module.input_size_per_partition if row else module.input_size
    in_start = module.tp_rank * local_in if row else 0
    full_sizes, sizes, starts = _outputs(module)
    parent, _, own = name.rpartition(".")
    # A class that says its checkpoint packs the layer itself (Phi-3) means it: the mapper it inherits does not know.
    fused = list(packed_modules.get(own, ())) == [own]
    origins = (None if fused else mapped(name, len(sizes))) or origins_by_mapping(packed_modules, own, len(sizes))
    if isinstance(origins, str):
        return origins
    slices = []
    for i, origin in enumerate(origins):
        before = origin.span[: origin.span.index(i)]
        child = name if origin.name == own else f"{parent}.{origin.name}" if parent else origin.name
        start = sum(full_sizes[j] for j in before) + starts[i]
        fused_start = sum(full_sizes[:i]) + starts[i]
        slices.append(SliceLayout(child, sizes[i], start, fused_start, sum(full_sizes[j] for j in origin.span)))
    sums = row and module.tp_size > 1
    first = not sums or module.tp_rank == 0
    return LinearLayout(
        name,
        local_in,
        in_start,
        module.input_size,
        tuple(slices),
        sum(full_sizes),
        sums,
        first,
        isinstance(module, QKVParallelLinear),
    )


def _outputs(module: Any) -> tuple[list[int], list[int], list[int]]:
    """(whole out features, this rank's, this rank's first row) of each packed part."""
    if isinstance(module, QKVParallelLinear):
        q, kv = module.total_num_heads * module.head_size, module.total_num_kv_heads
        full = [q, kv * module.head_size, kv * module.v_head_size]
        sizes = list(module.output_partition_sizes)
        group = module.tp_rank // module.num_kv_head_replicas
        return full, sizes, [module.tp_rank * sizes[0], group * sizes[1], group * sizes[2]]
    if isinstance(module, (RowParallelLinear, ReplicatedLinear)):
        sizes = list(module.output_partition_sizes)  # pyright: ignore[reportArgumentType]
        return sizes, sizes, [0] * len(sizes)
    full = list(module.output_sizes) if isinstance(module, MergedColumnParallelLinear) else [module.output_size]
    sizes = list(module.output_partition_sizes)
    return full, sizes, [module.tp_rank * size for size in sizes]


def _take_over(
    module: Any, layout: LinearLayout, step: Step, path: PathChoice, device: torch.device, limits: SlotLimits
) -> tuple[AdaptedLinear, DispatchRule | None]:
    """The layer, and its rule if it can be modulated."""
    method = module.quant_method
    stock_apply = method.apply
    readable = isinstance(method, UnquantizedLinearMethod) and module.weight.ndim == 2 and module.weight.numel() > 0
    weight_OI = module.weight.data if readable else None

    def base(x_TI: torch.Tensor) -> torch.Tensor:
        return stock_apply(module, x_TI, None)

    shape = (layout.in_features, sum(layout.sizes))
    rule = calibrated_rule(path, *shape, module.params_dtype, device, limits, readable=readable)
    kernel = make_linear(weight_OI, base, layout.sizes, rule, layout.in_features, device, limits)
    if kernel.implementation == "native":
        # The kernel has its own packed copy, as vLLM's CPU kernels do.
        module.weight = torch.nn.Parameter(torch.empty(0, dtype=module.params_dtype), requires_grad=False)
    first_rank = not isinstance(module, RowParallelLinear) or module.tp_rank == 0
    hidden_bias = module.bias if module.skip_bias_add and first_rank else None
    layer = AdaptedLinear(kernel, step, layout.sizes, hidden_bias, device)
    module._flora_handle = layer.handle
    module._flora_out_features = layer.out_features  # pyright: ignore[reportArgumentType]
    module.quant_method = copy.copy(method)
    module.quant_method.apply = _apply
    return layer, rule if readable else None


def _apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.flora.linear(x, bias, layer._flora_handle, layer._flora_out_features)


def _give_back(module: Any) -> None:
    """Let vLLM repack a weight that was kept for us but will not be used."""
    pack = module.__dict__.pop("_flora_pack", None)
    if pack is not None:
        pack()
