"""Kronecker products beside the base: LoKr, as two small products instead of one large."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import KronAdded
from flora_vllm.terms.blocks import covering
from flora_vllm.terms.kind import Draft, Kind, Merging


@dataclass(frozen=True, eq=False)
class Kron:
    """`scale · (left ⊗ right) x`; `right` is (K, N), or (K, R) of a product with `down` (R, N)."""

    left: torch.Tensor  # (L, M), O = L * K
    right: torch.Tensor
    down: torch.Tensor | None = None  # I = M * N
    scale: float = 1.0

    def __post_init__(self) -> None:
        fits = self.down is None or (self.down.ndim == 2 and self.right.shape[-1] == self.down.shape[0])
        if self.left.ndim != 2 or self.right.ndim != 2 or not fits:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(self))
            raise AdapterError(
                f"a Kronecker product needs two matrices, the second one maybe of two factors, got {shapes}"
            )

    @property
    def inner(self) -> int:
        return (self.right if self.down is None else self.down).shape[1]


def _tensors(term: Kron) -> Iterator[torch.Tensor]:
    yield from (tensor for tensor in (term.left, term.right, term.down) if tensor is not None)


def _fold(term: Kron, draft: Draft) -> None:
    cut = draft.cut
    rows, first_O = covering(cut.rows, term.right.shape[0])
    columns, first_I = covering(cut.columns, term.inner)
    left_LM = (term.left[rows, columns].float() * term.scale).contiguous()
    down = None if term.down is None else term.down.float().contiguous()
    draft.rare.append(KronAdded(left_LM, term.right.float().contiguous(), down, first_I, first_O, cut.size))


def _merge(term: Kron, merging: Merging) -> None:
    dtype = merging.sum_OI.dtype
    right = term.right.to(dtype) if term.down is None else term.right.to(dtype) @ term.down.to(dtype)
    merging.sum_OI = merging.sum_OI + term.scale * torch.kron(term.left.to(dtype).contiguous(), right.contiguous())


KRON = Kind(
    order=2,
    shape=lambda term: (term.left.shape[0] * term.right.shape[0], term.left.shape[1] * term.inner),
    tensors=_tensors,
    fold=_fold,
    merge=_merge,
    dense_bytes=lambda term: sum(4 * tensor.numel() for tensor in _tensors(term)),
)
