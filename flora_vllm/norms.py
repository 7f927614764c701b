"""The adapted norm: rows of an adapter that has a norm's weights of its own are normed by the very module with them.

Every row is first normed as it always is, so that nobody else's changes by a bit; those of such adapters are done
again. A norm is called directly until a slot has terms for it, and costs nothing until then. Compiled code keeps what
it saw: there a norm is an opaque torch op for everyone, where the operator asks for it. No CUDA graph holds the terms:
steps with an adapter that has some run eagerly.
"""

import threading
import types
from typing import Any

import torch

from flora_vllm.handles import Handles, define_op
from flora_vllm.ops.terms import LayerTerms, SliceTerms
from flora_vllm.step import Step


class AdaptedNorm:
    """One norm of the model with its slots.

    module: called with x (T, ...) and, where it adds to one, the residual; it gives a tensor or several, each by row.
    is_compiled: compiled code calls it.
    """

    def __init__(self, module: torch.nn.Module, step: Step, *, is_compiled: bool = False) -> None:
        self._module = module
        self._stock = module.forward
        self._step = step
        self._slots: dict[int, dict[str, torch.nn.Parameter]] = {}
        self._lock = threading.Lock()  # held while the module has an adapter's weights
        self._is_compiled = is_compiled
        if is_compiled:
            module._flora_handle = _norms.register(self)
            module.forward = types.MethodType(_compiled_forward, module)

    def fault(self, part: SliceTerms) -> str | None:
        """Why a slot cannot have these terms, or None."""
        held = self.base_values()
        if part.offset_O is not None and held.get("bias") is None:
            return "has a bias, which the base model's has none of; remove it"
        values = {"weight": part.plain_O, "bias": part.offset_O}
        for name, value in values.items():
            base = held.get(name)
            if value is not None and base is not None and not value.to(base.dtype).isfinite().all():
                return f"has values that leave the range of {base.dtype}, the model's dtype; serve it in another"
        return None

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on, `plain_O` the weight, `offset_O` the bias; None clears it."""
        self._slots.pop(slot, None)
        part = None if terms is None else terms[0]
        if part is not None:
            values = {"weight": part.plain_O, "bias": part.offset_O}
            self._slots[slot] = {
                name: torch.nn.Parameter(_like(value, self._module.get_parameter(name)), requires_grad=False)
                for name, value in values.items()
                if value is not None
            }
        if self._is_compiled:
            return
        if self._slots:
            self._module.forward = self.forward
        else:
            self._module.__dict__.pop("forward", None)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """What the module gives for x, and residual, with each row's own weights."""
        whole_inputs = (x,) if residual is None else (x, residual)
        # Linear layers say whether the step was served.
        segments = self._step.segments_for(len(x), serves=False)
        own = [(self._slots[slot], rows.to(x.device)) for slot, rows in segments or () if slot in self._slots]
        # The module may write into what it is given.
        given = [tuple(tensor[rows_N] for tensor in whole_inputs) for _, rows_N in own]
        found = self._stock(*whole_inputs)
        for (values, rows_N), inputs in zip(own, given, strict=True):
            outputs = self._with(values, inputs)
            for whole, part in zip(_all(found), _all(outputs), strict=True):
                whole[rows_N] = part
        return found

    def base_values(self) -> dict[str, torch.Tensor | None]:
        """The base's own weight and bias, also for who asks beside a step, in which the module may have others."""
        with self._lock:
            return dict(self._module._parameters)

    def _with(self, values: dict[str, torch.nn.Parameter], inputs: tuple[torch.Tensor, ...]) -> Any:
        with self._lock:
            held = {name: self._module._parameters[name] for name in values}
            self._module._parameters.update(values)
            try:
                return self._stock(*inputs)
            finally:
                self._module._parameters.update(held)


def _like(value: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    return value.to(held.device, held.dtype)


def _all(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


_norms: Handles[AdaptedNorm] = Handles()


def _compiled_forward(module: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    if residual is None:
        return torch.ops.flora.norm(x, module._flora_handle)
    return torch.ops.flora.norm_added(x, residual, module._flora_handle)


# An op's results may be none of its arguments, which a norm may write into and give back.
def _norm(x: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return _norms[handle].forward(x.clone()).contiguous()


def _norm_added(x: torch.Tensor, residual: torch.Tensor, handle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y, total = _norms[handle].forward(x.clone(), residual.clone())
    return y.contiguous(), total.contiguous()


define_op("norm", "(Tensor x, Tensor handle) -> Tensor", _norm, lambda x, _: x.new_empty(x.shape))
define_op(
    "norm_added",
    "(Tensor x, Tensor residual, Tensor handle) -> (Tensor, Tensor)",
    _norm_added,
    lambda x, residual, _: (x.new_empty(x.shape), residual.new_empty(residual.shape)),
)
