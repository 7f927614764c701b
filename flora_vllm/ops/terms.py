"""What an op is told: the terms of one slot and how a step's tokens fall into segments.

Plain tensors only; nothing here knows checkpoints or vLLM. Shape letters: T tokens, S slots (slot 0 is
"no adapter"), R rank, I in features, O out features of one slice (q, k and v are three slices of one layer).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class SliceTerms:
    """One slot's terms for one slice of a layer: scale folded, this TP rank's part, the layer's dtype, contiguous.

    y_slice = g ∘ [ Σ_j b_RO[j] ∘ W(a_RI[j] ∘ x)  +  W x if identity or a_RI is None  +  (down_RI x) up_RO ] + h ∘ bias

    with h = g if gain_bias else 1. The Hadamard rank and the low rank are independent.
    """

    a_RI: torch.Tensor | None = None
    b_RO: torch.Tensor | None = None
    identity: bool = False
    down_RI: torch.Tensor | None = None
    up_RO: torch.Tensor | None = None
    gain_O: torch.Tensor | None = None
    gain_bias: bool = False

    @property
    def rank(self) -> int:
        """Rows the stacked path needs per token for this slice's base products (1 for plain `W x`)."""
        return 1 if self.a_RI is None else self.a_RI.shape[0] + int(self.identity)

    def tensors(self) -> Iterator[torch.Tensor]:
        for tensor in (self.a_RI, self.b_RO, self.down_RI, self.up_RO, self.gain_O):
            if tensor is not None:
                yield tensor


@dataclass(frozen=True)
class SlotLimits:
    """What the slots of a layer may hold. `rank`: of Hadamard terms, without identity; `low_rank`: of the others."""

    slots: int = 32  # beside slot 0
    rank: int = 16
    low_rank: int = 16


# One entry per slice; None is a slice the adapter leaves alone. A whole layer left alone is None itself.
LayerTerms = tuple[SliceTerms | None, ...]


@dataclass(frozen=True, eq=False)
class Segments:
    """The tokens of a step grouped by slot: segment i has slot `slots[i]` and rows `rows_T[starts[i]:starts[i+1]]`.

    Segments are in ascending slot order, so slot 0 (no adapter), if present, comes first; within a segment rows
    ascend. Built on the host once per step, shared by all layers.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]  # len(slots) + 1 entries
    rows_T: torch.Tensor  # (T,) int64, host

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def packed(self) -> torch.Tensor:
        """All of it as compiled code reads it, int64: number of segments, slots, starts, rows."""
        head = torch.tensor((len(self.slots), *self.slots, *self.starts), dtype=torch.int64)
        return torch.cat([head, self.rows_T])

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for i, slot in enumerate(self.slots):
            yield slot, self.rows_T[self.starts[i] : self.starts[i + 1]]


def group_by_slot(slot_of_token: Sequence[int] | torch.Tensor) -> Segments:
    """Segments of a step whose token t uses slot `slot_of_token[t]` (0 = no adapter)."""
    slot_T = torch.as_tensor(slot_of_token, dtype=torch.int64)
    rows_T = torch.sort(slot_T, stable=True).indices
    slots, counts = torch.unique_consecutive(slot_T[rows_T], return_counts=True)
    starts = [0, *torch.cumsum(counts, 0).tolist()]
    return Segments(tuple(slots.tolist()), tuple(starts), rows_T)
