"""What an op is told: the terms of one slot and how a step's tokens fall into segments.

Plain tensors only; nothing here knows checkpoints or vLLM. Shape letters: T tokens, S slots (slot 0 is
"no adapter"), R rank, I in features, O out features of one slice (q, k and v are three slices of one layer).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch

from flora_vllm.ops.rare import RareTerm, placed


@dataclass(frozen=True, eq=False)
class SliceTerms:
    """One slot's terms for one slice of a layer: scales and gains folded, this TP rank's part, contiguous.

    y = plain_O ∘ W x  +  Σ_j b_RO[j] ∘ W(a_RI[j] ∘ x)  +  (down_RI x) up_RO  +  bias + offset_O

    `plain_O`: float32, (O,), or (1,) where all outputs have the same weight; None: the sum has no W x.
    a_RI, b_RO (R, I), (R, O) and down_RI, up_RO (L, I), (L, O): in the layer's dtype; pairs, each may be absent.
    `offset_O`: float32 (O,), added beside the bias; it knows nothing of the bias.
    `rare`: what kernels do not know; `ops.shell` does it around them.
    """

    plain_O: torch.Tensor | None = None
    a_RI: torch.Tensor | None = None
    b_RO: torch.Tensor | None = None
    down_RI: torch.Tensor | None = None
    up_RO: torch.Tensor | None = None
    offset_O: torch.Tensor | None = None
    rare: tuple["RareTerm", ...] = ()

    @property
    def products(self) -> int:
        """Base products per token on the stacked path; at least 1, for a row must be started by something."""
        scaled = 0 if self.a_RI is None else self.a_RI.shape[0]
        return max(scaled + (self.plain_O is not None), 1)

    def tensors(self) -> Iterator[torch.Tensor]:
        """This adapter's own: what its rare terms share with other adapters is not among them."""
        for tensor in (self.plain_O, self.a_RI, self.b_RO, self.down_RI, self.up_RO, self.offset_O):
            if tensor is not None:
                yield tensor
        for term in self.rare:
            yield from term.tensors()

    def to(self, device: torch.device) -> "SliceTerms":
        """The same with all tensors on `device`."""
        hot = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **hot, rare=tuple(placed(term, device) for term in self.rare))


@dataclass(frozen=True)
class SlotLimits:
    """What the slots of a layer may hold. `rank`: scaled products a token; `low_rank`: of low-rank terms."""

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

    @cached_property
    def runs(self) -> tuple[slice | None, ...]:
        """Of each segment whose rows are neighbours, where they are: a view of them costs less than a copy."""
        rows = self.rows_T.numpy()
        spans = [(int(rows[start]), int(rows[stop - 1]) + 1, stop - start) for start, stop in pairwise(self.starts)]
        return tuple(slice(first, stop) if stop - first == count else None for first, stop, count in spans)

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
