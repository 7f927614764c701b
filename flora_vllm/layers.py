"""The adapted linear layer: it owns the base call, and one opaque torch op makes it reachable from compiled code.

`flora::linear` takes the layer's identity as a tensor handle, never as a Python number: tracers freeze numbers, so a
number would tie a compiled graph to one layer and to the moment it was traced. What a step needs is read inside the op.
Calls of layers on the native op are taken in C++ (ops/cpu/csrc/torch_op.cpp); what is not plain comes back here.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence

import torch

from flora_vllm.ops.cpu.linear import NativeLinear
from flora_vllm.ops.gpu.linear import TritonLinear
from flora_vllm.ops.table import LinearKernel
from flora_vllm.ops.terms import LayerTerms
from flora_vllm.step import GraphSteps, Step


class AdaptedLinear:
    """One linear layer of the model with its slots.

    `hidden_bias`: the bias of a layer whose caller adds it later (skip_bias_add) on this rank. The kernel never sees
    that bias, so where a gain scales it too, the difference is added here.
    """

    def __init__(
        self, kernel: LinearKernel, step: Step, sizes: Sequence[int], hidden_bias: torch.Tensor | None = None
    ) -> None:
        self._kernel = kernel
        self._step = step
        self._sizes = tuple(sizes)
        self._hidden_bias = hidden_bias
        self._bias_gain: dict[int, torch.Tensor] = {}  # slot -> (O,) gain - 1 where it scales the hidden bias
        self.handle = _register(self)
        if isinstance(kernel, NativeLinear):
            kernel.take_calls(self, int(self.handle), step.words, only_base=hidden_bias is not None)

    @property
    def kernel(self) -> LinearKernel:
        return self._kernel

    def why_not_captured(self) -> str | None:
        """Why this layer cannot be part of a CUDA graph that serves adapters, or None."""
        if not isinstance(self._kernel, TritonLinear):
            return f"it runs on the {self._kernel.implementation} op"
        return None if self._hidden_bias is None else "its bias is added by its caller"

    @property
    def out_features(self) -> int:
        return sum(self._sizes)

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        self._kernel.write_slot(slot, terms)
        self._bias_gain.pop(slot, None)
        if self._hidden_bias is None or terms is None:
            return
        gains = [part.gain_O if part is not None and part.gain_bias else None for part in terms]
        if any(gain is not None for gain in gains):
            parts = [
                torch.zeros(size) if gain is None else gain.float() - 1.0
                for size, gain in zip(self._sizes, gains, strict=True)
            ]
            self._bias_gain[slot] = torch.cat(parts).to(self._hidden_bias.device)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., I) -> (..., O)."""
        # Once a layer and step: a small model on a CPU feels each microsecond here.
        is_flat = x.ndim == 2
        x_TI = x if is_flat else x.reshape(-1, x.shape[-1])
        tokens = x_TI.shape[0]
        graphs = self._step.captured_form(tokens)
        if graphs is not None:
            return self._captured_form(x_TI, bias, graphs).view(*x.shape[:-1], self.out_features)
        segments = self._step.segments_for(tokens)
        y_TO = self._kernel.forward(x_TI, bias, segments)
        if segments is not None and self._hidden_bias is not None:
            for slot, rows in segments:
                if slot in self._bias_gain:
                    y_TO[rows] += (self._bias_gain[slot] * self._hidden_bias).to(y_TO.dtype)
        return y_TO if is_flat else y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _captured_form(self, x_TI: torch.Tensor, bias: torch.Tensor | None, graphs: GraphSteps) -> torch.Tensor:
        assert isinstance(self._kernel, TritonLinear), "why_not_captured is asked before graphs are captured"
        tokens = x_TI.shape[0]
        y_TO = self._kernel.graph_form(x_TI, bias, graphs.buffers, graphs.rows(tokens))
        graphs.note_launches(tokens)
        return y_TO


_layers: "weakref.WeakValueDictionary[int, AdaptedLinear]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _register(layer: AdaptedLinear) -> torch.Tensor:
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, dtype=torch.int64)


# The two share a signature: `out_features` is for the fake, which may not look the layer up.
def _linear(x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, _out_features: int) -> torch.Tensor:
    return _layers[int(handle)].forward(x, bias)


def _linear_fake(x: torch.Tensor, _bias: torch.Tensor | None, _handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _define_op() -> Callable[..., torch.Tensor]:
    for name in ("linear", "linear_in_python"):
        _library.define(f"{name}(Tensor x, Tensor? bias, Tensor handle, int out_features) -> Tensor")
        _library.impl(name, _linear, "CompositeExplicitAutograd")
    torch.library.register_fake("flora::linear", _linear_fake, lib=_library)
    return torch.ops.flora.linear


# Kept for the life of the process: the op disappears with the library that defines it.
_library = torch.library.Library("flora", "DEF")
linear = _define_op()
