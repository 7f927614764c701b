"""A whole matrix of the adapter's own, for what can be merged and no other kind expresses."""

from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import DenseAdded
from flora_vllm.terms.kind import Draft, Kind, Merging


@dataclass(frozen=True, eq=False)
class Dense:
    """`scale · matrix x`, added to the products."""

    matrix: torch.Tensor  # (O, I)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise AdapterError(f"a dense term must be (out, in), got {tuple(self.matrix.shape)}")


def _fold(term: Dense, draft: Draft) -> None:
    cut = draft.cut
    part_OI = term.matrix[cut.rows, cut.columns].float() * term.scale
    draft.rare.append(DenseAdded(part_OI.to(cut.dtype).contiguous()))


def _merge(term: Dense, merging: Merging) -> None:
    merging.sum_OI = merging.sum_OI + term.scale * term.matrix.to(merging.sum_OI.dtype)


DENSE = Kind(
    order=2, shape=lambda term: (term.matrix.shape[0], term.matrix.shape[1]), tensors=lambda term: iter((term.matrix,)),
    fold=_fold, merge=_merge, dense_bytes=lambda term: term.matrix.numel() * term.matrix.element_size(),
)  # fmt: skip
