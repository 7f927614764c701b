"""What runs where: one row per implementation of the adapted linear, first fit wins, and the log says which and why.

    row         serves                                    needs
    native      CPU, bfloat16 and float32, W readable      a C++ compiler once, unless FLORA_NATIVE=0
    triton      NVIDIA GPUs, ranks to 32                   Triton, its driver, right results; TRITON_INTERPRET=1: a CPU
    torch       everything, also bases with no readable W  nothing

A further implementation is one more `_Row` above `torch`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from flora_vllm.ops.cpu import linear as native
from flora_vllm.ops.dispatch import RANKS_MEASURED, SLOTS_MEASURED, DispatchRule, PathChoice, calibrate
from flora_vllm.ops.gpu import check as triton_check
from flora_vllm.ops.gpu import linear as triton_linear
from flora_vllm.ops.gpu import tune as triton_tune
from flora_vllm.ops.gpu.opaque_linear import TritonOpaqueLinear
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.opaque_linear import OpaqueLinear
from flora_vllm.ops.terms import LayerTerms, Segments, SlotLimits
from flora_vllm.ops.torch_linear import TorchLinear

logger = logging.getLogger(__name__)

Base = Callable[[torch.Tensor], torch.Tensor]
GraphForm = Callable[[torch.Tensor, torch.Tensor | None, StepBuffers, int], torch.Tensor]


class LinearKernel(Protocol):
    """One layer's adapted linear: owns its form of W and its slots' terms, but for the rare ones (`shell`).

    A kernel may have three further members. `direct_form() -> DirectForm`: what compiled code calls without Python
    (`direct_calls`). `graph_form(x_TI, bias_O, buffers, rows) -> y_TO`: `forward` as launches that depend on no step,
    which a CUDA graph may capture; they read the step from `buffers` and are sized for `rows` stacked rows.
    `graph_rows(terms) -> int`: base products of a token with such terms in that form, NEVER if it does not serve them;
    without it, the most of any slice.
    """

    implementation: str

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None: ...

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor: ...


def direct_form_of(kernel: LinearKernel) -> native.DirectForm | None:
    """The kernel as compiled code calls it; None if only Python can."""
    form = getattr(kernel, "direct_form", None)
    return None if form is None else form()


def graph_form_of(kernel: LinearKernel) -> GraphForm | None:
    """The kernel's `forward` as a CUDA graph may hold it; None if it has no such form."""
    return getattr(kernel, "graph_form", None)


def graph_rows_of(kernel: LinearKernel, terms: LayerTerms) -> int:
    """Base products that a token with these terms needs of the kernel in a CUDA graph; NEVER: it cannot be in one."""
    own = getattr(kernel, "graph_rows", None)
    return max((1 if part is None else part.products for part in terms), default=1) if own is None else own(terms)


@dataclass(frozen=True)
class _Layer:
    """What a kernel is made from. `weight_OI` None: an opaque base, reached only through `base` (no bias)."""

    weight_OI: torch.Tensor | None
    base: Base
    sizes: Sequence[int]
    in_features: int
    device: torch.device
    limits: SlotLimits


@dataclass(frozen=True)
class _Row:
    name: str
    # (weight or None, device, limits) -> why it cannot serve this layer, or None if it can.
    refuses: Callable[[torch.Tensor | None, torch.device, SlotLimits], str | None]
    make: Callable[[_Layer, DispatchRule], LinearKernel]
    build: Callable[[], str]  # what a measurement of this row depends on beside shape and machine


def _native_refuses(weight_OI: torch.Tensor | None, device: torch.device, _limits: SlotLimits) -> str | None:
    if device.type != "cpu":
        return f"device is {device.type}"
    if weight_OI is None:
        return "the base does not show its weight"
    if weight_OI.dtype not in native.DTYPES:
        return f"dtype is {weight_OI.dtype}"
    return native.why_unavailable()


def _make_native(layer: _Layer, rule: DispatchRule) -> LinearKernel:
    weight_OI = layer.weight_OI
    assert weight_OI is not None, "chosen only for a readable weight"
    assert weight_OI.shape[1] == layer.in_features, f"W has {weight_OI.shape[1]} in features, not {layer.in_features}"
    return native.NativeLinear(weight_OI, layer.sizes, rule)


def _triton_refuses(weight_OI: torch.Tensor | None, device: torch.device, limits: SlotLimits) -> str | None:
    reason = triton_linear.why_refused(weight_OI, device, limits)
    if reason is None and device.type == "cuda":
        reason = triton_check.why_wrong(device, torch.bfloat16 if weight_OI is None else weight_OI.dtype)
    return reason


def _make_triton(layer: _Layer, rule: DispatchRule) -> LinearKernel:
    if layer.weight_OI is None:
        return TritonOpaqueLinear(layer.base, layer.sizes, rule, layer.in_features, layer.limits, layer.device)
    kernel = triton_linear.TritonLinear(layer.weight_OI, layer.base, layer.sizes, rule, layer.in_features, layer.limits)
    triton_tune.tune(kernel)
    return kernel


def _make_torch(layer: _Layer, rule: DispatchRule) -> LinearKernel:
    if layer.weight_OI is None:
        return OpaqueLinear(layer.base, layer.sizes, rule, layer.in_features, layer.device)
    return TorchLinear(layer.weight_OI, layer.base, layer.sizes, rule, layer.in_features, layer.device)


ROWS = (
    _Row("native", _native_refuses, _make_native, native.build_name),
    _Row("triton", _triton_refuses, _make_triton, triton_linear.build_name),
    _Row("torch", lambda *_: None, _make_torch, lambda: "torch"),
)


def make_linear(
    weight_OI: torch.Tensor | None,
    base: Base,
    sizes: Sequence[int],
    rule: DispatchRule,
    in_features: int,
    device: torch.device,
    limits: SlotLimits | None = None,
) -> LinearKernel:
    """The kernel object of one layer. `weight_OI` None: an opaque base, reached only through `base` (no bias).

    Raises ConfigError where FLORA_NATIVE=1 cannot be met or the rule asks for a path that the layer cannot take.
    """
    limits = SlotLimits() if limits is None else limits
    layer = _Layer(weight_OI, base, sizes, in_features, device, limits)
    return _choose(weight_OI, device, limits).make(layer, rule)


def calibrated_rule(
    path: PathChoice,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    limits: SlotLimits | None = None,
    *,
    readable: bool = True,
) -> DispatchRule:
    """The dispatch rule of this machine for a layer shape, measured on the implementation that will serve it.

    `readable` False: the base is opaque, so nothing can be modulated and nothing is measured.
    """
    if not readable:
        return DispatchRule(path)
    probe_OI = torch.empty(1, in_features, dtype=dtype, device=device)
    row = _choose(probe_OI, device, SlotLimits() if limits is None else limits)
    measured = SlotLimits(SLOTS_MEASURED, RANKS_MEASURED)

    def make(weight_OI: torch.Tensor, rule: DispatchRule) -> LinearKernel:
        def base(x_TI: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x_TI, weight_OI)

        return row.make(_Layer(weight_OI, base, (weight_OI.shape[0],), in_features, device, measured), rule)

    return calibrate(make, row.build(), in_features, out_features, dtype, device, path)


def implementation_of(weight_OI: torch.Tensor | None, device: torch.device, limits: SlotLimits | None = None) -> str:
    """Name of the row that serves such a layer."""
    return _choose(weight_OI, device, SlotLimits() if limits is None else limits).name


_said: set[str] = set()


def _choose(weight_OI: torch.Tensor | None, device: torch.device, limits: SlotLimits) -> _Row:
    reasons = []
    for row in ROWS:
        reason = row.refuses(weight_OI, device, limits)
        if reason is None:
            text = f"adapted linears run on the {row.name} op"
            text += f" ({'; '.join(reasons)})" if reasons else ""
            if text not in _said:
                _said.add(text)
                logger.info(text)
            return row
        reasons.append(f"not {row.name}: {reason}")
    raise AssertionError("the torch row serves everything")
