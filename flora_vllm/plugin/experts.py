"""Taking over the experts of a mixture: which of vLLM's can be adapted, and as what.

The fused call is the base's own and is left as it is. An adapter's rows need the experts' products one by one, so each
expert is two linear layers here (gate and up packed, down), over views of the kernel's weights (`expert_weights`):
nothing is copied. What cannot be told exactly is refused; on a device whose kernel could not be looked into, a layer is
tried against the kernel when it is taken over.
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from flora_vllm.adapter import ExpertsLayout
from flora_vllm.experts import ACTIVATIONS, AdaptedExperts, Expert, ExpertLinear
from flora_vllm.ops.dispatch import PathChoice
from flora_vllm.plugin.expert_weights import Weights, packing
from flora_vllm.slots import LinearLayout, SliceLayout
from flora_vllm.step import Step

# Share of the outputs' norm: a wrong order of weights is off by all of it and more, a half type's rounding by 0.01.
_SAME = 0.05
_REST = "; train attention and dense layers only"


@dataclass
class TakenExperts:
    """The experts of one layer: expert linear's path -> layer, layout, bias; `elsewhere`: those of other ranks."""

    names: ExpertsLayout
    layers: dict[str, ExpertLinear] = field(default_factory=dict)
    layouts: dict[str, LinearLayout] = field(default_factory=dict)
    biases: dict[str, torch.Tensor | None] = field(default_factory=dict)
    elsewhere: list[LinearLayout] = field(default_factory=list)


def why_not_adapted(runner: Any, path: PathChoice, device: torch.device) -> str | None:
    """Why the experts of a MoERunner cannot be adapted, or None."""
    experts, method = runner.routed_experts, runner.routed_experts.quant_method
    if type(method) is not UnquantizedFusedMoEMethod:
        return f"MoE experts with {type(method).__name__} cannot be adapted yet{_REST}"
    if (reason := _why_not_readable(method, experts.w13_weight.dtype, device)) is not None:
        return reason
    config, weight = experts.moe_config, experts.w13_weight
    parallel = config.moe_parallel_config
    if parallel.ep_size > 1 and device.type == "cpu":
        return (
            "vLLM's CPU kernel cannot run some of the experts (--enable-expert-parallel); start the server without it"
        )
    if max(parallel.dp_size, parallel.pcp_size, parallel.sp_size) > 1 or parallel.enable_eplb:
        return f"MoE experts whose rows or weights move between ranks cannot be adapted yet{_REST}"
    if sorted(_places(experts).values()) != [*range(weight.shape[0])]:
        return f"MoE experts that are not all routed experts of the checkpoint cannot be adapted yet{_REST}"
    limits = (experts.swiglu_limit, experts.swiglu_alpha, experts.swiglu_beta)
    if experts.activation.value not in ACTIVATIONS or limits != (None,) * 3:
        own = "" if limits == (None,) * 3 else " and limits of its own"
        return f"MoE experts with activation {experts.activation.value}{own} cannot be adapted yet{_REST}"
    inner = config.intermediate_size_per_partition_unpadded
    is_cut_evenly = inner * parallel.tp_size == config.intermediate_size
    if weight.shape[2] != config.hidden_dim_unpadded or method.mk_can_overlap_shared_experts or not is_cut_evenly:
        return f"MoE experts of this layout cannot be adapted yet{_REST}"
    if path == "modulated":
        return f"path 'modulated' needs each layer's weight, which MoE experts do not show{_REST}"
    return None


def _why_not_readable(method: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the weights of the kernel that runs the experts cannot be read where they are."""
    if device.type not in ("cpu", "cuda"):
        return f"MoE experts can be adapted on CPUs and NVIDIA GPUs only{_REST}"
    kernel = None if method.moe_kernel is None else method.moe_kernel.fused_experts
    name = type(kernel).__name__
    if device.type == "cuda":
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

        if type(kernel) is TritonExperts and not method.is_monolithic:
            return None
        return f"{name} orders the weights of MoE experts in its own way; start the server with --moe-backend triton"
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    if not isinstance(kernel, CPUUnquantizedExperts) or kernel._use_zentorch:
        return f"MoE experts that run on {name} cannot be adapted yet{_REST}"
    if packing(kernel.isa, dtype) is None:
        return f"MoE experts in {dtype} are packed for {kernel.isa} in a way that is not known{_REST}"
    return None


def _places(experts: Any) -> dict[int, int]:
    """Number of each expert of this rank -> its place in this rank's weights."""
    if experts.expert_map is None:
        return {number: number for number in range(experts.global_num_experts)}
    return {number: place for number, place in enumerate(experts.expert_map.tolist()) if place >= 0}


def take_over(name: str, runner: Any, step: Step, device: torch.device) -> TakenExperts | str:
    """Make `runner`'s experts adaptable; `why_not_adapted` has said that they can be. `name`: the runner's path.

    A str says why they are left as they were: here they give something else than the kernel.
    """
    experts, method = runner.routed_experts, runner.routed_experts.quant_method
    on_host = device.type == "cpu"
    tile = packing(method.moe_kernel.fused_experts.isa, experts.w13_weight.dtype) if on_host else None
    is_interleaved = experts.activation.value == "swigluoai"
    names = ExpertsLayout(
        experts.global_num_experts,
        experts.ckpt_gate_proj_name,
        experts.ckpt_up_proj_name,
        experts.ckpt_down_proj_name,
        is_interleaved,
    )
    users: Counter[int] = Counter()
    ranks = experts.moe_config.moe_parallel_config.tp_size
    inner, places = experts.moe_config.intermediate_size_per_partition_unpadded, _places(experts)
    weights = Weights(experts, inner, tile, is_interleaved)
    down_biases = _summed(getattr(experts, "w2_bias", None), ranks)
    made: dict[int, Expert] = {}
    taken = TakenExperts(names)
    for number in range(names.number):
        gate_up, down = _layouts(f"{name}.{number}", names, experts)
        place = places.get(number)
        if place is None:
            taken.elsewhere += [gate_up, down]
            continue
        down_bias_O = None if down_biases is None else down_biases[place]
        for layout, product, own_bias_O, bias_O in (
            (gate_up, weights.gate_up, weights.gate_up_bias(place), weights.gate_up_bias(place)),
            (down, weights.down, weights.down_bias(place), down_bias_O),
        ):
            base = functools.partial(product, place)
            layer = ExpertLinear(base, layout.sizes, layout.in_features, own_bias_O, users, None if on_host else device)
            taken.layers[layout.module], taken.layouts[layout.module] = layer, layout
            taken.biases[layout.module] = bias_O
        made[number] = Expert(taken.layers[gate_up.module], taken.layers[down.module])
    fused = AdaptedExperts(
        _stock_call(experts, method),
        made,
        ACTIVATIONS[experts.activation.value],
        step,
        users,
        weighs_input=experts.apply_router_weight_on_input,
    )
    if not on_host and (reason := why_unlike(fused, experts, sorted(made), device)) is not None:
        return reason
    experts._flora_experts, experts._flora_handle = fused, fused.handle
    experts.quant_method = copy.copy(method)
    experts.quant_method.apply = _apply
    return taken


def _layouts(place: str, names: ExpertsLayout, experts: Any) -> tuple[LinearLayout, LinearLayout]:
    """Of gate and up, and of down, of the expert at `place`: ranks cut its inner size, or have it alone."""
    parallel = experts.moe_config.moe_parallel_config
    ranks, rank = parallel.tp_size, parallel.tp_rank
    hidden, inner = experts.w13_weight.shape[2], experts.moe_config.intermediate_size_per_partition_unpadded
    gate, up = (
        SliceLayout(f"{place}.{part}", inner, inner * rank, inner * (ranks * i + rank), inner * ranks)
        for i, part in enumerate(names.inputs)
    )
    out = SliceLayout(f"{place}.{names.down}", hidden, 0, 0, hidden)
    packed = f"{place}.{'+'.join(names.inputs)}"  # no checkpoint's name: its parts are addressed
    is_alone = parallel.ep_size > 1
    gate_up = LinearLayout(packed, hidden, 0, hidden, (gate, up), 2 * inner * ranks, is_alone=is_alone)
    down = LinearLayout(
        out.module,
        inner,
        inner * rank,
        inner * ranks,
        (out,),
        hidden,
        sums=ranks > 1,
        adds_bias=rank == 0,
        is_alone=is_alone,
    )
    return gate_up, down


def why_unlike(fused: AdaptedExperts, experts: Any, numbers: Sequence[int], device: torch.device) -> str | None:
    """Why `fused` must not serve: it is tried on a few rows for some of this rank's experts, without adapters."""
    rows, chosen = 4, min(experts.moe_config.experts_per_token, len(numbers))
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(rows, experts.w13_weight.shape[2], generator=generator)
    weight_TK = torch.rand(rows, chosen, generator=generator)
    expert_TK = torch.stack([torch.randperm(len(numbers), generator=generator)[:chosen] for _ in range(rows)])
    expert_TK = torch.tensor(numbers)[expert_TK].int()
    try:
        with torch.no_grad():
            error = fused.error(x_TH.to(device, experts.params_dtype), weight_TK.to(device), expert_TK.to(device))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError) as failure:
        return f"MoE experts could not be tried against their kernel ({failure}){_REST}"
    if error <= _SAME:
        return None
    return f"MoE experts one by one are {error:.2g} away from their kernel; please report this with the model's name"


def _summed(bias_EH: torch.Tensor | None, ranks: int) -> torch.Tensor | None:
    """What all ranks together add; it is one rank's, as their outputs are summed."""
    if bias_EH is None or ranks == 1:
        return bias_EH
    return tensor_model_parallel_all_reduce(bias_EH.clone())


def _stock_call(experts: Any, method: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    stock_apply = method.apply

    def stock(x_TH: torch.Tensor, weight_TK: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
        # Shared experts have run before, or will: these kernels do not overlap them.
        return stock_apply(
            layer=experts,
            x=x_TH,
            topk_weights=weight_TK,
            topk_ids=expert_TK,
            shared_experts=None,
            shared_experts_input=None,
        )

    return stock


def _apply(
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_experts: Any = None,
    shared_experts_input: torch.Tensor | None = None,
) -> torch.Tensor:
    del shared_experts, shared_experts_input
    if torch.compiler.is_compiling():
        return torch.ops.flora.experts(x, topk_weights, topk_ids, layer._flora_handle)
    return layer._flora_experts.forward(x, topk_weights, topk_ids)
