"""Taking over the experts of a mixture: which of vLLM's can be adapted, and their weights as the CPU kernel packs them.

The fused call is the base's own and is left as it is. An adapter's rows need the experts' products one by one, so each
expert is two linear layers here (gate and up packed, down), over views of the packed weights: nothing is copied. How
the kernel packs is not said anywhere, so a known matrix is packed at start and compared; a packing that is not
recognised is refused, like everything else whose products could not be told exactly.
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import linear, pad
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from flora_vllm.adapter import ExpertsLayout
from flora_vllm.experts import ACTIVATIONS, AdaptedExperts, Expert, ExpertLinear
from flora_vllm.ops.dispatch import PathChoice
from flora_vllm.slots import LinearLayout, SliceLayout
from flora_vllm.step import Step

# Ways to pack W (O, I): tiles of so many outputs, in each the inputs in groups of so many.
_TILES = ((16, 1), (32, 1), (16, 2), (32, 2))
# Rows up to which float32 products run on the packed tiles; for more of them W is unpacked first. Half types always
# are: a product of many small tiles is no faster and may be summed in the half type.
_FEW_ROWS = 32
_REST = "; train attention and dense layers only"


@dataclass
class TakenExperts:
    """The experts of one layer: expert linear's path -> layer, layout, bias."""

    names: ExpertsLayout
    layers: dict[str, ExpertLinear] = field(default_factory=dict)
    layouts: dict[str, LinearLayout] = field(default_factory=dict)
    biases: dict[str, torch.Tensor | None] = field(default_factory=dict)


def why_not_adapted(runner: Any, path: PathChoice, device: torch.device) -> str | None:
    """Why the experts of a MoERunner cannot be adapted, or None."""
    if device.type != "cpu":
        return f"MoE experts can be adapted on a CPU only so far{_REST}"
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    experts, method = runner.routed_experts, runner.routed_experts.quant_method
    if type(method) is not UnquantizedFusedMoEMethod:
        return f"MoE experts with {type(method).__name__} cannot be adapted yet{_REST}"
    kernel = None if method.moe_kernel is None else method.moe_kernel.fused_experts
    if not isinstance(kernel, CPUUnquantizedExperts) or kernel._use_zentorch:
        return f"MoE experts that run on {type(kernel).__name__} cannot be adapted yet{_REST}"
    config, weight = experts.moe_config, experts.w13_weight
    parallel = config.moe_parallel_config
    if parallel.ep_size > 1:
        return f"vLLM's CPU kernel takes no part of the experts (--enable-expert-parallel){_REST}"
    if max(parallel.dp_size, parallel.pcp_size, parallel.sp_size) > 1 or parallel.enable_eplb:
        return f"MoE experts whose rows or weights move between ranks cannot be adapted yet{_REST}"
    if weight.shape[0] != experts.global_num_experts or experts.expert_map is not None:
        return f"MoE experts that are not all routed experts of the checkpoint cannot be adapted yet{_REST}"
    if experts.activation.value not in ACTIVATIONS:
        return f"MoE experts with activation {experts.activation.value} cannot be adapted yet{_REST}"
    inner = config.intermediate_size_per_partition_unpadded
    is_cut_evenly = inner * parallel.tp_size == config.intermediate_size
    if weight.shape[2] != config.hidden_dim_unpadded or method.mk_can_overlap_shared_experts or not is_cut_evenly:
        return f"MoE experts of this layout cannot be adapted yet{_REST}"
    if path == "modulated":
        return f"path 'modulated' needs each layer's weight, which packed MoE experts do not show{_REST}"
    if packing(kernel.isa, weight.dtype) is None:
        return f"MoE experts in {weight.dtype} are packed for {kernel.isa} in a way that is not known{_REST}"
    return None


def take_over(name: str, runner: Any, step: Step) -> TakenExperts:
    """Make `runner`'s experts adaptable; `why_not_adapted` has said that they can be. `name`: the runner's path."""
    experts, method = runner.routed_experts, runner.routed_experts.quant_method
    tile = packing(method.moe_kernel.fused_experts.isa, experts.w13_weight.dtype)
    assert tile is not None, "asked before"
    is_interleaved = experts.activation.value == "swigluoai"
    names = ExpertsLayout(
        experts.global_num_experts,
        experts.ckpt_gate_proj_name,
        experts.ckpt_up_proj_name,
        experts.ckpt_down_proj_name,
        is_interleaved,
    )
    users: Counter[int] = Counter()
    ranks, rank = experts.moe_config.moe_parallel_config.tp_size, experts.moe_config.moe_parallel_config.tp_rank
    hidden, inner = experts.w13_weight.shape[2], experts.moe_config.intermediate_size_per_partition_unpadded
    weights = Weights(experts, inner, tile, is_interleaved)
    down_biases = _summed(getattr(experts, "w2_bias", None), ranks)
    made: list[Expert] = []
    layers: dict[str, ExpertLinear] = {}
    layouts: dict[str, LinearLayout] = {}
    biases: dict[str, torch.Tensor | None] = {}
    for number in range(names.number):
        place = f"{name}.{number}"
        gate, up = (
            SliceLayout(f"{place}.{part}", inner, inner * rank, inner * (ranks * i + rank), inner * ranks)
            for i, part in enumerate(names.inputs)
        )
        down = SliceLayout(f"{place}.{names.down}", hidden, 0, 0, hidden)
        packed = f"{place}.{'+'.join(names.inputs)}"  # no checkpoint's name: its parts are addressed
        layouts[packed] = LinearLayout(packed, hidden, 0, hidden, (gate, up), 2 * inner * ranks)
        layouts[down.module] = LinearLayout(
            down.module, inner, inner * rank, inner * ranks, (down,), hidden, ranks > 1, rank == 0
        )
        biases[packed] = weights.gate_up_bias(number)
        biases[down.module] = None if down_biases is None else down_biases[number]
        for path, product_of, bias_O in (
            (packed, weights.gate_up, biases[packed]),
            (down.module, weights.down, weights.down_bias(number)),
        ):
            base = functools.partial(product_of, number)
            layers[path] = ExpertLinear(base, layouts[path].sizes, layouts[path].in_features, bias_O, users)
        made.append(Expert(layers[packed], layers[down.module]))
    fused = AdaptedExperts(
        _stock_call(experts, method),
        made,
        ACTIVATIONS[experts.activation.value],
        step,
        users,
        weighs_input=experts.apply_router_weight_on_input,
    )
    experts._flora_experts, experts._flora_handle = fused, fused.handle
    experts.quant_method = copy.copy(method)
    experts.quant_method.apply = _apply
    return TakenExperts(names, layers, layouts, biases)


def _summed(bias_EH: torch.Tensor | None, ranks: int) -> torch.Tensor | None:
    """What all ranks together add; it is one rank's, as their outputs are summed."""
    if bias_EH is None or ranks == 1:
        return bias_EH
    return tensor_model_parallel_all_reduce(bias_EH.clone())


def _stock_call(experts: Any, method: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    stock_apply = method.apply

    def stock(x_TH: torch.Tensor, weight_TK: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
        # Shared experts have run before, or will: this kernel does not overlap them.
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


class Weights:
    """Products with one expert's weights, read where the kernel has them at the time of the call.

    The kernel pads an expert's inner size with zeros; `inner` is the size without. Gate and up, which it may have
    interleaved, are told apart here.
    """

    def __init__(self, experts: Any, inner: int, tile: tuple[int, int], is_interleaved: bool) -> None:
        self._experts, self._inner, self._tile, self._is_interleaved = experts, inner, tile, is_interleaved

    def gate_up(self, number: int, x_NH: torch.Tensor) -> torch.Tensor:
        return self._gate_then_up(product(x_NH, self._experts.w13_weight[number], self._tile))

    def down(self, number: int, x_NM: torch.Tensor) -> torch.Tensor:
        weight = self._experts.w2_weight[number]
        return product(pad(x_NM, (0, weight.shape[1] - self._inner)), weight, self._tile)

    def gate_up_bias(self, number: int) -> torch.Tensor | None:
        bias = getattr(self._experts, "w13_bias", None)
        return None if bias is None else self._gate_then_up(bias[number])

    def down_bias(self, number: int) -> torch.Tensor | None:
        bias = getattr(self._experts, "w2_bias", None)
        return None if bias is None else bias[number]

    def _gate_then_up(self, both: torch.Tensor) -> torch.Tensor:
        half = both.shape[-1] // 2
        gate, up = (both[..., ::2], both[..., 1::2]) if self._is_interleaved else both.split(half, -1)
        return torch.cat([gate[..., : self._inner], up[..., : self._inner]], -1)


@functools.cache
def packing(isa: str, dtype: torch.dtype) -> tuple[int, int] | None:
    """Which of _TILES the kernel's `isa` packs weights of `dtype` in; None if none."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    known = torch.arange(64 * 128).view(1, 64, 128)
    # Two matrices of numbers that every dtype has exactly tell all places apart.
    parts = [part.to(dtype) for part in (known % 128, known // 128)]
    packed = [cpu_prepack_moe_weight(part, isa)[0] for part in parts]
    for tile in _TILES:
        if all(torch.equal(unpacked(p, tile), part[0]) for p, part in zip(packed, parts, strict=True)):
            return tile
    return None


def unpacked(packed_OI: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """W (O, I) of a packed matrix."""
    outputs, inputs = packed_OI.shape
    rows, group = tile
    tiles = packed_OI.reshape(outputs // rows, inputs // group, rows, group)
    return tiles.permute(0, 2, 1, 3).reshape(outputs, inputs)


def product(x_NI: torch.Tensor, packed_OI: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """y_NO = W x of a packed W, without bias."""
    outputs, inputs = packed_OI.shape
    rows, group = tile
    if group > 1 or packed_OI.dtype != torch.float32 or len(x_NI) > _FEW_ROWS:
        return linear(x_NI, unpacked(packed_OI, tile))
    y_BNR = x_NI @ packed_OI.view(outputs // rows, inputs, rows)
    return y_BNR.permute(1, 0, 2).reshape(len(x_NI), outputs)
