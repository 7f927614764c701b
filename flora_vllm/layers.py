"""The adapted linear layer: it owns the base call, and one opaque torch op makes it reachable from compiled code.

`flora::linear` takes the layer's identity as a tensor handle, never as a Python number: tracers freeze numbers, so a
number would tie a compiled graph to one layer and to the moment it was traced. What a step needs is read inside the op.
Calls of layers whose kernel has a direct form are taken in C++ (`direct_calls`); what is not plain comes back here.
"""

import ctypes
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from flora_vllm import direct_calls
from flora_vllm.handles import Handles
from flora_vllm.ops.dispatch import NEVER
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.table import LinearKernel, direct_form_of, graph_form_of, graph_rows_of
from flora_vllm.ops.terms import LayerTerms, Segments
from flora_vllm.step import GraphSteps, Step


class Adapted(Protocol):
    """A linear layer of the model with its slots, whatever runs it."""

    @property
    def kernel(self) -> LinearKernel: ...

    def why_not_captured(self) -> str | None:
        """Why this layer cannot be part of a CUDA graph that serves adapters, or None."""
        ...

    def graph_rows(self, terms: LayerTerms, /) -> int:
        """Base products that a token with these terms needs in a CUDA graph; NEVER if one cannot serve them."""
        ...

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it."""
        ...


class Block(Protocol):
    """Several layers of which some slots want more than each layer for itself (`feed_forward`)."""

    @property
    def slots(self) -> Collection[int]:
        """Those slots."""
        ...

    def write_slot(self, layer: "AdaptedLinear", slot: int, terms: LayerTerms | None, /) -> None:
        """As the layer's own, of one of its layers."""
        ...

    def finish(
        self, layer: "AdaptedLinear", x_TI: torch.Tensor, y_TO: torch.Tensor, bias_O: torch.Tensor | None,
        segments: Segments, /,
    ) -> None:  # fmt: skip
        """One of its layers has just made y of x: what those slots want besides is done to y, in place."""
        ...


class AdaptedLinear:
    """One linear layer of the model with its slots.

    `sizes`: out features of each slice. `hidden_bias`: the bias of a layer whose caller adds it later (skip_bias_add)
    on this rank; terms that act on the whole sum must know it. `device`: where x is; None where that is the host.
    """

    def __init__(
        self,
        kernel: LinearKernel,
        step: Step,
        sizes: Sequence[int],
        hidden_bias: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._kernel = kernel
        self._graph_form = graph_form_of(kernel)
        self._step = step
        self._shell = Shell(kernel, sizes, hidden_bias, device)
        self._has_rare = ctypes.c_int64(0)  # read by compiled code
        self._block: Block | None = None
        self.sizes = tuple(sizes)
        self._out_features = sum(sizes)
        self.handle = _layers.register(self)
        form = direct_form_of(kernel)
        if form is not None:
            direct_calls.connect(self, int(self.handle), form, step.words, self._has_rare)

    @property
    def kernel(self) -> LinearKernel:
        return self._kernel

    def why_not_captured(self) -> str | None:
        """Why this layer cannot be part of a CUDA graph that serves adapters, or None."""
        return None if self._graph_form is not None else f"it runs on the {self._kernel.implementation} op"

    def graph_rows(self, terms: LayerTerms) -> int:
        """Base products that a token with these terms needs in a CUDA graph; NEVER if one cannot serve them."""
        has_rare = any(part is not None and part.rare for part in terms)
        return NEVER if has_rare else graph_rows_of(self._kernel, terms)

    @property
    def out_features(self) -> int:
        return self._out_features

    def join(self, block: Block) -> None:
        """The layer is one of `block`'s from now on."""
        self._block = block

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        self._shell.write_slot(slot, terms)
        if self._block is not None:
            self._block.write_slot(self, slot, terms)
        self.note_rare()

    def note_rare(self) -> None:
        """Compiled code learns whether some slot needs Python."""
        self._has_rare.value = bool(self._shell.rare_slots or (self._block is not None and self._block.slots))

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
        y_TO = self._shell.forward(x_TI, bias, segments)
        if self._block is not None and self._block.slots and segments is not None:
            self._block.finish(self, x_TI, y_TO, bias, segments)
        return y_TO if is_flat else y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _captured_form(self, x_TI: torch.Tensor, bias: torch.Tensor | None, graphs: GraphSteps) -> torch.Tensor:
        assert self._graph_form is not None, "why_not_captured is asked before graphs are captured"
        tokens = x_TI.shape[0]
        y_TO = self._graph_form(x_TI, bias, graphs.buffers, graphs.rows(tokens))
        graphs.note_launches(tokens)
        return y_TO


_layers: Handles[AdaptedLinear] = Handles()


# The two share a signature: `out_features` is for the fake, which may not look the layer up.
def _linear(x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, _out_features: int) -> torch.Tensor:
    return _layers[handle].forward(x, bias)


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
