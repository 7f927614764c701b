"""A weight of the adapter's own in the base's place, whole or some rows: modules_to_save, trainable tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import DenseAdded, RowsAdded
from flora_vllm.terms.kind import Draft, Kind, Merging, Pair


@dataclass(frozen=True, eq=False)
class Replaced:
    """`matrix x` in place of all products of the base, or of the outputs `rows` alone; a module has at most one."""

    matrix: torch.Tensor  # (O, I), or (N, I)
    rows: torch.Tensor | None = None  # (N,) int64, each once; None: all

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or (self.rows is not None and self.rows.shape != self.matrix.shape[:1]):
            rows = "" if self.rows is None else f" for {tuple(self.rows.shape)} rows"
            raise AdapterError(f"a replaced weight must be (out, in), got {tuple(self.matrix.shape)}{rows}")


def _tensors(term: Replaced) -> Iterator[torch.Tensor]:
    yield from (tensor for tensor in (term.matrix, term.rows) if tensor is not None)


def _fold(term: Replaced, draft: Draft) -> None:
    cut = draft.cut
    if term.rows is None:
        draft.plain, draft.products = None, []
        draft.rare.append(DenseAdded(term.matrix[cut.rows, cut.columns].to(cut.dtype).contiguous()))
        return
    inside = (term.rows >= cut.rows.start) & (term.rows < cut.rows.stop)
    if not inside.any():
        return
    rows_N = term.rows[inside] - cut.rows.start
    kept_O = torch.ones(cut.size).index_fill_(0, rows_N, 0)
    draft.plain = None if draft.plain is None else draft.plain * kept_O
    draft.products = [Pair(p.input_RI, p.output_OR.float() * kept_O[:, None], p.scale) for p in draft.products]
    draft.rare.append(RowsAdded(term.matrix[inside, cut.columns].to(cut.dtype).contiguous(), rows_N, cut.size))


def _merge(term: Replaced, merging: Merging) -> None:
    matrix = term.matrix.to(merging.sum_OI.dtype)
    merging.sum_OI = matrix if term.rows is None else merging.sum_OI.index_copy(0, term.rows, matrix)


# After the products, whose place it takes, and before what is added to it.
REPLACED = Kind(
    order=1,
    shape=lambda term: (term.matrix.shape[0] if term.rows is None else None, term.matrix.shape[1]),
    tensors=_tensors,
    fold=_fold,
    merge=_merge,
    dense_bytes=lambda term: term.matrix.numel() * term.matrix.element_size(),
)
