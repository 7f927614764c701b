"""Circulant blocks beside the base: C3A."""

from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import CirculantAdded
from flora_vllm.terms.blocks import covering
from flora_vllm.terms.kind import Draft, Kind, Merging


@dataclass(frozen=True, eq=False)
class Circulant:
    """`scale · C x`, C of blocks (l, m) with entries `kernel[l, m, (j - i) mod B]` at (i, j)."""

    kernel: torch.Tensor  # (L, M, B), O = L * B, I = M * B
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kernel.ndim != 3:
            raise AdapterError(f"a circulant kernel must be (rows, columns, block), got {tuple(self.kernel.shape)}")


def _fold(term: Circulant, draft: Draft) -> None:
    cut = draft.cut
    rows, first_O = covering(cut.rows, term.kernel.shape[2])
    columns, first_I = covering(cut.columns, term.kernel.shape[2])
    kernel_LMB = (term.kernel[rows, columns].float() * term.scale).contiguous()
    draft.rare.append(CirculantAdded(kernel_LMB, first_I, first_O, cut.size))


def _merge(term: Circulant, merging: Merging) -> None:
    rows, columns, block = term.kernel.shape
    place = torch.arange(block)
    at_BB = (place[None, :] - place[:, None]) % block
    matrix = term.kernel.to(merging.sum_OI.dtype)[:, :, at_BB].permute(0, 2, 1, 3)
    merging.sum_OI = merging.sum_OI + term.scale * matrix.reshape(rows * block, columns * block)


CIRCULANT = Kind(
    order=2,
    shape=lambda term: (term.kernel.shape[0] * term.kernel.shape[2], term.kernel.shape[1] * term.kernel.shape[2]),
    tensors=lambda term: iter((term.kernel,)),
    fold=_fold,
    merge=_merge,
    dense_bytes=lambda term: 4 * term.kernel.numel(),
)
