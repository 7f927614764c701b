"""Maps of the output: RoAd (arXiv 2409.00119) turns pairs of output halves, the bias with them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import Swapped
from flora_vllm.terms.kind import Draft, Kind, Merging


@dataclass(frozen=True, eq=False)
class Swap:
    """`z -> first ∘ z + second ∘ (-v, u)` for the halves (u, v) of each `group` of outputs; z has its bias."""

    first: torch.Tensor  # (O,)
    second: torch.Tensor  # (O,)
    group: int

    def __post_init__(self) -> None:
        size = self.first.shape[0]
        if self.first.ndim != 1 or self.second.shape != self.first.shape or self.group < 2 or size % self.group:
            raise AdapterError(
                f"a swap needs two vectors of one length and an even group that divides it, got "
                f"{tuple(self.first.shape)}, {tuple(self.second.shape)} and {self.group}"
            )


def _tensors(term: Swap) -> Iterator[torch.Tensor]:
    yield from (term.first, term.second)


def _fold(term: Swap, draft: Draft) -> None:
    cut = draft.cut
    if cut.sums:
        raise AdapterError(
            "it turns the outputs of a layer whose sum is made by several ranks, and the bias with them; "
            "serve it with --tensor-parallel-size 1"
        )
    if cut.rows.start % term.group or cut.rows.stop % term.group:
        raise AdapterError(
            f"it turns groups of {term.group} outputs, of which this rank has {cut.rows.start} to {cut.rows.stop}; "
            "serve it with a smaller --tensor-parallel-size"
        )
    first_O, second_O = (t[cut.rows].float().contiguous() for t in (term.first, term.second))
    draft.rare.append(Swapped(first_O, second_O, term.group))


def _merge(term: Swap, merging: Merging) -> None:
    dtype = merging.sum_OI.dtype
    swapped = Swapped(term.first.to(dtype), term.second.to(dtype), term.group)
    merging.sum_OI = _apply(swapped, merging.sum_OI.T).T
    if merging.bias_O is not None:
        merging.bias_O = _apply(swapped, merging.bias_O[None])[0]
    if merging.offset_O is not None:
        merging.offset_O = _apply(swapped, merging.offset_O[None])[0]


def _apply(swapped: Swapped, z_NO: torch.Tensor) -> torch.Tensor:
    halves = z_NO.reshape(z_NO.shape[0], -1, 2, swapped.group // 2)
    turned = torch.stack((-halves[:, :, 1], halves[:, :, 0]), 2).reshape(z_NO.shape)
    return swapped.first_O * z_NO + swapped.second_O * turned


SWAP = Kind(order=5, shape=lambda term: (term.first.shape[0], None), tensors=_tensors, fold=_fold, merge=_merge)
