"""Products of the base with scaled inputs and outputs: FLoRA (arXiv 2312.05677, eq. 4), HiRA, IA3 on the input."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.terms.kind import Draft, Kind, Merging, Pair


@dataclass(frozen=True, eq=False)
class Product:
    """`scale · Σ_j output[:, j] ∘ W(input[j] ∘ x)`; an absent side is ones, `Product()` is plain `W x`.

    A module whose terms name no Product has plain `W x`.
    """

    input: torch.Tensor | None = None  # (R, I)
    output: torch.Tensor | None = None  # (O, R)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.input is not None and self.input.ndim != 2:
            raise AdapterError(f"input factor must be (rank, in), got {tuple(self.input.shape)}")
        if self.output is not None and (self.output.ndim != 2 or self.output.shape[1] != self.rank):
            raise AdapterError(
                f"output factor must be (out, {self.rank}) to fit the input factor, got {tuple(self.output.shape)}"
            )
        if self.output is None and self.rank != 1:
            raise AdapterError(f"without an output factor the rank must be 1, got {self.rank}")

    @property
    def rank(self) -> int:
        return 1 if self.input is None else self.input.shape[0]


def _shape(term: Product) -> tuple[int | None, int | None]:
    return (
        None if term.output is None else term.output.shape[0],
        None if term.input is None else term.input.shape[1],
    )


def _tensors(term: Product) -> Iterator[torch.Tensor]:
    yield from (side for side in (term.input, term.output) if side is not None)


def _fold(term: Product, draft: Draft) -> None:
    cut = draft.cut
    output = None if term.output is None else cut.output_side(term.output)
    if term.input is None:
        draft.add_plain(torch.full((1,), term.scale) if output is None else output[:, 0].float() * term.scale)
        return
    if output is None:
        output = torch.ones(cut.size, 1)
    draft.products.append(Pair(cut.input_side(term.input), output, term.scale))


def _merge(term: Product, merging: Merging) -> None:
    base = merging.base_OI
    weight = term.scale * base
    if term.input is not None and term.output is not None:
        weight = weight * (term.output.to(base.dtype) @ term.input.to(base.dtype))
    elif term.input is not None:
        weight = weight * term.input.to(base.dtype)
    elif term.output is not None:
        weight = weight * term.output.to(base.dtype)
    merging.sum_OI = merging.sum_OI + weight


PRODUCT = Kind(
    order=0,
    shape=_shape,
    tensors=_tensors,
    fold=_fold,
    merge=_merge,
    ranks=lambda term: (0 if term.input is None else term.rank, 0),
)
