"""The adapted linear over a base that shows no weight (quantised), on a GPU. The kernels have not run on hardware yet.

Low-rank terms alone need nothing of the base but one call of it with the tokens' own rows, so they take the Triton
kernels, and a CUDA graph may hold that. Everything else needs scaled rows in the call, gathered by indices from the
host: that is the torch op, and never in a graph.
"""

from collections.abc import Callable, Sequence

import torch

from flora_vllm.ops.dispatch import NEVER, DispatchRule
from flora_vllm.ops.gpu.linear import LowRankPair
from flora_vllm.ops.gpu.slots import SlotTable, changes_products
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.opaque_linear import OpaqueLinear
from flora_vllm.ops.terms import LayerTerms, Segments, SlotLimits


class TritonOpaqueLinear:
    """y = base(x) + bias with every slot's terms; one call of `base` a step.

    base: x_TI -> y_TO, W x without bias. sizes: out features of each slice, in order.
    Raises ConfigError where Triton is missing, or if the rule forces the modulated path: there is no W to modulate.
    """

    implementation = "triton"

    def __init__(
        self,
        base: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        rule: DispatchRule,
        in_features: int,
        limits: SlotLimits,
        device: torch.device,
    ) -> None:
        self._torch = OpaqueLinear(base, sizes, rule, in_features, device)
        self.slots = SlotTable(sizes, in_features, limits, rule, None, device)
        self._low = LowRankPair(None, self.slots)

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. Read by captured graphs too."""
        self._torch.write_slot(slot, self.slots.write(slot, terms))

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter."""
        if segments is None or x_TI.shape[0] == 0:
            return self._torch.forward(x_TI, bias_O, None)
        step = self._low.step_of(segments)
        if step.slot_bits & self.slots.product_bits:
            return self._torch.forward(x_TI, bias_O, segments)
        y_TO = self._torch.forward(x_TI, bias_O, None)
        if step.slot_bits & self.slots.low_bits:
            x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
            self._low.add(y_TO, x_TI, step, self._low.of_step(x_TI, step))
        return y_TO

    def graph_form(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, step: StepBuffers, _row_budget: int
    ) -> torch.Tensor:
        """y_TO of whatever step is in `step` when the launches run, if no slot of it needs more rows (`graph_rows`)."""
        y_TO = self._torch.forward(x_TI, bias_O, None)
        if self.slots.limits.low_rank:
            x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
            self._low.add(y_TO, x_TI, step, self._low.of_graph(x_TI, step))
        return y_TO

    @staticmethod
    def graph_rows(terms: LayerTerms) -> int:
        """Base products that a token with such terms needs in a graph; NEVER if `graph_form` does not serve them."""
        return NEVER if any(map(changes_products, terms)) else 1
