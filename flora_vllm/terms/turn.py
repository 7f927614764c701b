"""Maps of the input: OFT and BOFT turn blocks of features before the products see them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import Turned
from flora_vllm.terms.kind import Draft, Kind, Merging


@dataclass(frozen=True, eq=False)
class Turn:
    """`x -> x[order] · blockdiag(blocks)`, put back in place, before the products only. Several act in their order."""

    blocks: torch.Tensor  # (D, B, B), D * B = I
    order: torch.Tensor | None = None  # (I,) int64

    def __post_init__(self) -> None:
        if self.blocks.ndim != 3 or self.blocks.shape[1] != self.blocks.shape[2]:
            raise AdapterError(f"a turn's blocks must be (number, size, size), got {tuple(self.blocks.shape)}")

    @property
    def in_features(self) -> int:
        return self.blocks.shape[0] * self.blocks.shape[1]


def _tensors(term: Turn) -> Iterator[torch.Tensor]:
    yield term.blocks
    if term.order is not None:
        yield term.order


def _fold(term: Turn, draft: Draft) -> None:
    cut = draft.cut
    size = term.blocks.shape[1]
    start, stop = cut.columns.start, cut.columns.stop
    blocks, order = term.blocks, term.order
    if stop - start != term.in_features:
        if order is not None or start % size or stop % size:
            raise AdapterError(
                f"it turns blocks of {size} input features across ranks, of which this one has features {start} to "
                f"{stop}; serve it with a smaller --tensor-parallel-size"
            )
        blocks = blocks[start // size : stop // size]
    key = (id(term.blocks), start, stop)
    known = cut.inputs.get(key)
    if known is None:
        known = cut.inputs[key] = blocks.float().contiguous()
    draft.rare.append(Turned(known, order))


def _merge(term: Turn, merging: Merging) -> None:
    eye = torch.eye(term.in_features, dtype=merging.sum_OI.dtype)
    turned = Turned(term.blocks.to(eye.dtype), term.order).apply(eye)
    # The products of a turned row x R are those of a weight times Rᵀ; nothing else is in the sum yet.
    merging.sum_OI = merging.sum_OI @ turned.T


TURN = Kind(order=1, shape=lambda term: (None, term.in_features), tensors=_tensors, fold=_fold, merge=_merge)
