"""What runs where: one row per implementation of the adapted linear, first fit wins, and the log says which and why.

    row         serves                                   needs
    native      CPU, bfloat16 and float32, W readable     a C++ compiler once, unless FLORA_NATIVE=0
    torch       everything, also bases with no readable W nothing

A further implementation is one more `_Row` above `torch`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from flora_vllm.ops import native
from flora_vllm.ops.dispatch import DispatchRule, PathChoice, calibrate
from flora_vllm.ops.terms import LayerTerms, Segments
from flora_vllm.ops.torch_linear import TorchLinear

logger = logging.getLogger(__name__)

Base = Callable[[torch.Tensor], torch.Tensor]


class LinearKernel(Protocol):
    """One layer's adapted linear: owns its form of W and its slots' terms."""

    implementation: str

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None: ...

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Row:
    name: str
    # (weight or None, device) -> why it cannot serve this layer, or None if it can.
    refuses: Callable[[torch.Tensor | None, torch.device], str | None]
    make: Callable[[torch.Tensor | None, Base, Sequence[int], DispatchRule, int], LinearKernel]
    build: Callable[[], str]  # what a measurement of this row depends on beside shape and machine


def _native_refuses(weight_OI: torch.Tensor | None, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"device is {device.type}"
    if weight_OI is None:
        return "the base does not show its weight"
    if weight_OI.dtype not in native.DTYPES:
        return f"dtype is {weight_OI.dtype}"
    return native.why_unavailable()


def _make_native(
    weight_OI: torch.Tensor | None, _base: Base, sizes: Sequence[int], rule: DispatchRule, in_features: int
) -> LinearKernel:
    assert weight_OI is not None, "chosen only for a readable weight"
    assert weight_OI.shape[1] == in_features, f"W has {weight_OI.shape[1]} in features, the layer {in_features}"
    return native.NativeLinear(weight_OI, sizes, rule)


def _refuses_nothing(_weight_OI: torch.Tensor | None, _device: torch.device) -> str | None:
    return None


ROWS = (
    _Row("native", _native_refuses, _make_native, native.build_name),
    _Row("torch", _refuses_nothing, TorchLinear, lambda: "torch"),
)


def make_linear(
    weight_OI: torch.Tensor | None,
    base: Base,
    sizes: Sequence[int],
    rule: DispatchRule,
    in_features: int,
    device: torch.device,
) -> LinearKernel:
    """The kernel object of one layer. `weight_OI` None: an opaque base, reached only through `base` (no bias).

    Raises ConfigError where FLORA_NATIVE=1 cannot be met or the rule asks for a path that the layer cannot take.
    """
    row = _choose(weight_OI, device)
    return row.make(weight_OI, base, sizes, rule, in_features)


def calibrated_rule(
    path: PathChoice, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> DispatchRule:
    """The dispatch rule of this machine for a layer shape, measured on the implementation that will serve it."""
    probe_OI = torch.empty(1, in_features, dtype=dtype, device=device)
    row = _choose(probe_OI, device)

    def make(weight_OI: torch.Tensor, rule: DispatchRule) -> LinearKernel:
        sizes = (weight_OI.shape[0],)
        return row.make(weight_OI, lambda x_TI: torch.nn.functional.linear(x_TI, weight_OI), sizes, rule, in_features)

    return calibrate(make, row.build(), in_features, out_features, dtype, device, path)


def implementation_of(weight_OI: torch.Tensor | None, device: torch.device) -> str:
    """Name of the row that serves such a layer."""
    return _choose(weight_OI, device).name


_said: set[str] = set()


def _choose(weight_OI: torch.Tensor | None, device: torch.device) -> _Row:
    reasons = []
    for row in ROWS:
        reason = row.refuses(weight_OI, device)
        if reason is None:
            text = f"adapted linears run on the {row.name} op"
            text += f" ({'; '.join(reasons)})" if reasons else ""
            if text not in _said:
                _said.add(text)
                logger.info(text)
            return row
        reasons.append(f"not {row.name}: {reason}")
    raise AssertionError("the torch row serves everything")
