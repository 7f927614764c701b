"""Experts of a mixture as linear layers of their own, adapted by (token, expert).

A base computes all experts in one fused call, and nothing can be added in the middle of it. So the rows whose adapter
has terms for some expert of the layer are computed here, expert by expert, every product through the shell that serves
any other layer; all other rows, and every step without such an adapter, take the base's own call.
Shape letters: T tokens, K experts of a token, P pairs of a token and one of its experts, N pairs of one expert,
H hidden size, M inner size of an expert.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import gelu, silu

from flora_vllm.handles import Handles, define_op
from flora_vllm.ops.dispatch import NEVER, DispatchRule
from flora_vllm.ops.opaque_linear import OpaqueLinear
from flora_vllm.ops.shell import Shell
from flora_vllm.ops.terms import LayerTerms, Segments, group_by_slot
from flora_vllm.step import Step

# (gate_NM, up_NM) -> what the down projection reads; all float32.
Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (x_TH, weight_TK, expert_TK) -> y_TH: every token's experts, weighted and summed.
FusedCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def swiglu_oai(gate_NM: torch.Tensor, up_NM: torch.Tensor) -> torch.Tensor:
    """gpt-oss's: `(up + 1) * gate * sigmoid(1.702 * gate)`, clamped at 7 (transformers' `GptOssExperts`)."""
    gate_NM, up_NM = gate_NM.clamp(max=7.0), up_NM.clamp(-7.0, 7.0)
    return (up_NM + 1) * gate_NM * torch.sigmoid(1.702 * gate_NM)


ACTIVATIONS: dict[str, Activation] = {
    "silu": lambda gate_NM, up_NM: silu(gate_NM) * up_NM,
    "gelu": lambda gate_NM, up_NM: gelu(gate_NM) * up_NM,
    "gelu_tanh": lambda gate_NM, up_NM: gelu(gate_NM, approximate="tanh") * up_NM,
    "swigluoai": swiglu_oai,
}


class ExpertLinear:
    """One linear layer of one expert with its slots. A model has thousands: what serves it is made when first needed.

    base: x_NI -> y_NO, W x without bias, in memory of its own. sizes: out features of each slice. bias_O: the base's.
    users: slot -> how many of the layer's expert linears have terms in it; kept up to date here.
    device: where x is, for terms that come from the host.
    """

    def __init__(
        self,
        base: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        in_features: int,
        bias_O: torch.Tensor | None,
        users: Counter[int],
        device: torch.device | None = None,
    ) -> None:
        self._base, self._sizes, self._in_features, self._bias_O = base, tuple(sizes), in_features, bias_O
        self._users, self._device = users, device
        self._kernel: OpaqueLinear | None = None
        self._shell: Shell | None = None
        self._slots: set[int] = set()

    @property
    def kernel(self) -> OpaqueLinear:
        if self._kernel is None:
            rule = DispatchRule("stacked")
            self._kernel = OpaqueLinear(self._base, self._sizes, rule, self._in_features, self._device)
        return self._kernel

    def why_not_captured(self) -> str | None:
        """None: a graph holds the base's own call, which is right for steps without terms of experts."""
        return None

    def graph_rows(self, _terms: LayerTerms) -> int:
        """NEVER: which rows an expert gets is known in the step only, so steps with such terms run eager."""
        return NEVER

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it."""
        if terms is None and slot not in self._slots:
            return
        if self._shell is None:
            self._shell = Shell(self.kernel, self._sizes, device=self._device)
        # Noted first: a write that fails leaves a part of the terms, which is cleared by the same call as any slot.
        if slot not in self._slots:
            self._slots.add(slot)
            self._users[slot] += 1
        self._shell.write_slot(slot, terms)
        if terms is None:
            self._slots.remove(slot)
            self._users[slot] -= 1

    def forward(self, x_NI: torch.Tensor, segments: Segments) -> torch.Tensor:
        """y_NO with bias; `segments` are those of the N rows."""
        if self._shell is None:
            y_NO = self._base(x_NI)
            return y_NO if self._bias_O is None else y_NO.add_(self._bias_O)
        return self._shell.forward(x_NI, self._bias_O, segments)


@dataclass(frozen=True, eq=False)
class Expert:
    """gate_up: (N, H) -> (N, 2M), all of gate, then all of up; down: (N, M) -> (N, H)."""

    gate_up: ExpertLinear
    down: ExpertLinear


class AdaptedExperts:
    """The experts of one layer with their slots.

    stock: the base's own call. experts: those of this rank, by the number that `stock` is given; what the others say
    comes from other ranks. users: the one that all linears of `experts` were given.
    weighs_input: a token's weight multiplies what its experts read, not what they say (one expert a token).
    """

    def __init__(
        self,
        stock: FusedCall,
        experts: Mapping[int, Expert],
        activation: Activation,
        step: Step,
        users: Counter[int],
        *,
        weighs_input: bool,
    ) -> None:
        self._stock, self._experts, self._activation = stock, experts, activation
        self._step, self._users, self._weighs_input = step, users, weighs_input
        self.handle = _layers.register(self)

    def forward(self, x_TH: torch.Tensor, weight_TK: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
        """y_TH: of each token its K experts' outputs, weighted and summed."""
        segments = self._step.segments_for(x_TH.shape[0])
        mine = [] if segments is None else [(slot, rows) for slot, rows in segments if self._users[slot]]
        if segments is None or not mine:
            return self._stock(x_TH, weight_TK, expert_TK)
        y_TH = torch.empty_like(x_TH)
        others = [rows for slot, rows in segments if not self._users[slot]]
        if others:
            rest = torch.cat(others).to(x_TH.device)
            y_TH[rest] = self._stock(x_TH[rest], weight_TK[rest], expert_TK[rest])
        slots = torch.cat([torch.full_like(rows, slot) for slot, rows in mine])
        rows = torch.cat([rows for _, rows in mine]).to(x_TH.device)
        y_TH[rows] = self._by_expert(x_TH[rows], weight_TK[rows], expert_TK[rows], slots).to(y_TH.dtype)
        return y_TH

    def error(self, x_TH: torch.Tensor, weight_TK: torch.Tensor, expert_TK: torch.Tensor) -> float:
        """How far rows without adapter are from the base's own call when computed here, relative to that (norms)."""
        slot_T = torch.zeros(len(x_TH), dtype=torch.int64)
        stock_TH = self._stock(x_TH.clone(), weight_TK, expert_TK).float()
        difference = (self._by_expert(x_TH, weight_TK, expert_TK, slot_T) - stock_TH).norm()
        return float(difference / stock_TH.norm().clamp(min=torch.finfo(torch.float32).tiny))

    def _by_expert(
        self, x_TH: torch.Tensor, weight_TK: torch.Tensor, expert_TK: torch.Tensor, slot_T: torch.Tensor
    ) -> torch.Tensor:
        """The same in float32, for tokens with adapters, through each expert's own layers. `slot_T`: on the host."""
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        weight_P = weight_TK.float().flatten()
        expert_P = expert_TK.long().flatten().cpu()  # who gets what is decided on the host, where segments are
        pairs_P = torch.sort(expert_P, stable=True).indices
        used, counts = torch.unique_consecutive(expert_P[pairs_P], return_counts=True)
        for number, pairs_N in zip(used.tolist(), pairs_P.split(counts.tolist()), strict=True):
            expert = self._experts.get(number)
            if expert is None:
                continue
            token_N = pairs_N // expert_TK.shape[1]
            segments = group_by_slot(slot_T[token_N])
            token_N, weight_N1 = token_N.to(x_TH.device), weight_P[pairs_N.to(x_TH.device), None]
            x_NH = x_TH[token_N]
            if self._weighs_input:
                x_NH = x_NH * weight_N1.to(x_NH.dtype)
            gate_NM, up_NM = expert.gate_up.forward(x_NH, segments).float().chunk(2, -1)
            inner_NM = self._activation(gate_NM, up_NM).to(x_TH.dtype)
            y_NH = expert.down.forward(inner_NM, segments).float()
            y_TH.index_add_(0, token_N, y_NH if self._weighs_input else y_NH * weight_N1)
        return y_TH


_layers: Handles[AdaptedExperts] = Handles()


def _run(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return _layers[handle].forward(x, weights, experts)


def _run_fake(x: torch.Tensor, _weights: torch.Tensor, _experts: torch.Tensor, _handle: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


# The op of `layers` for experts: opaque to whatever traces the model, which layer it is told by a tensor.
experts_op = define_op(
    "experts", "(Tensor x, Tensor weights, Tensor experts, Tensor handle) -> Tensor", _run, _run_fake
)
