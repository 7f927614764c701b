"""Slot contents that no kernel knows: plain tensors and their torch form, done around the kernels by `ops.shell`.

Each is cut to this rank's part of one slice and in the dtype it is computed in. T tokens, I in, O out features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


class RareTerm(Protocol):
    """A kind of rare term; `stage` says when the shell calls `apply`.

    "input": x_TI -> the rows that the products see, for one slice. "added": x_TI -> what is added to y (T, O), float32.
    "output": y_TO with its bias -> y_TO.
    """

    stage: str

    def apply(self, rows: torch.Tensor) -> torch.Tensor: ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """The adapter's own tensors; not those that adapters share."""
        ...


@dataclass(frozen=True, eq=False)
class Turned:
    """x' = x with blocks of features turned: row vector x[order] times blockdiag(blocks), put back in place."""

    blocks_DBB: torch.Tensor  # (D, B, B)
    order_I: torch.Tensor | None = None  # int64; None: as they are
    stage = "input"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        blocks, size, _ = self.blocks_DBB.shape
        x_TI = rows if self.order_I is None else rows[:, self.order_I]
        turned = torch.einsum("tdb,dbc->tdc", x_TI.reshape(-1, blocks, size).to(self.blocks_DBB.dtype), self.blocks_DBB)
        turned_TI = turned.reshape(rows.shape).to(rows.dtype)
        if self.order_I is None:
            return turned_TI
        placed_TI = torch.empty_like(turned_TI)
        placed_TI[:, self.order_I] = turned_TI
        return placed_TI

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.blocks_DBB
        if self.order_I is not None:
            yield self.order_I


@dataclass(frozen=True, eq=False)
class Swapped:
    """z -> first ∘ z + second ∘ (-v, u) for the halves (u, v) of each group of outputs (RoAd, arXiv 2409.00119)."""

    first_O: torch.Tensor
    second_O: torch.Tensor
    group: int
    stage = "output"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        z = rows.float()
        halves = z.reshape(z.shape[0], -1, 2, self.group // 2)
        swapped = torch.stack((-halves[:, :, 1], halves[:, :, 0]), 2).reshape(z.shape)
        return (self.first_O * z + self.second_O * swapped).to(rows.dtype)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.first_O, self.second_O)


@dataclass(frozen=True, eq=False)
class SharedLow:
    """out ∘ up(mid · down(inner ∘ x)) over factors that adapters share (VeRA, FourierFT, TinyLoRA); float32.

    down (L, I) and up (O, L): one copy an engine; mid: (L,), (L, L) or None; out (O,) or None.
    """

    down_LI: torch.Tensor
    up_OL: torch.Tensor
    mid: torch.Tensor | None = None
    out_O: torch.Tensor | None = None
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        middle = (rows.to(self.down_LI.dtype) @ self.down_LI.T).float()
        if self.mid is not None:
            middle = middle * self.mid if self.mid.ndim == 1 else middle @ self.mid.T
        added = (middle.to(self.up_OL.dtype) @ self.up_OL.T).float()
        return added if self.out_O is None else added * self.out_O

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (t for t in (self.mid, self.out_O) if t is not None)


@dataclass(frozen=True, eq=False)
class DenseAdded:
    """matrix x, a whole matrix of the adapter's own."""

    matrix_OI: torch.Tensor
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows.to(self.matrix_OI.dtype) @ self.matrix_OI.T).float()

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.matrix_OI
