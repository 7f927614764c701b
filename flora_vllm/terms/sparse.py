"""A few entries beside the base's: SHiRA, SuperTuning, WaveFT without its transform."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import SparseAdded
from flora_vllm.terms.kind import Draft, Kind, Merging


@dataclass(frozen=True, eq=False)
class Sparse:
    """`scale · S x`, S of `shape` (O, I) with `values[e]` at (`rows[e]`, `columns[e]`); equal places add up."""

    values: torch.Tensor  # (E,)
    rows: torch.Tensor  # (E,) integers
    columns: torch.Tensor  # (E,) integers
    shape: tuple[int, int]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not self.values.shape == self.rows.shape == self.columns.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(self))
            raise AdapterError(f"a sparse term needs three vectors of one length, got {shapes}")
        for name, places, size in (("rows", self.rows, self.shape[0]), ("columns", self.columns, self.shape[1])):
            if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
                raise AdapterError(
                    f"its entries lie in {name} {int(places.min())} to {int(places.max())} of a layer with {size}"
                )


def _tensors(term: Sparse) -> Iterator[torch.Tensor]:
    yield from (term.values, term.rows, term.columns)


def _fold(term: Sparse, draft: Draft) -> None:
    rows, columns = draft.cut.rows, draft.cut.columns
    inside = (term.rows >= rows.start) & (term.rows < rows.stop)
    inside &= (term.columns >= columns.start) & (term.columns < columns.stop)
    draft.rare.append(
        SparseAdded(
            term.values[inside].float() * term.scale,
            (term.rows[inside] - rows.start).int(),
            (term.columns[inside] - columns.start).int(),
            draft.cut.size,
        )
    )


def _merge(term: Sparse, merging: Merging) -> None:
    values = term.scale * term.values.to(merging.sum_OI.dtype)
    merging.sum_OI = merging.sum_OI.index_put((term.rows.long(), term.columns.long()), values, accumulate=True)


SPARSE = Kind(
    order=2,
    shape=lambda term: term.shape,
    tensors=_tensors,
    fold=_fold,
    merge=_merge,
    dense_bytes=lambda term: 12 * term.values.numel(),
)
