"""Full-rank updates over random bases that adapters share: RandLoRA."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import BasesAdded
from flora_vllm.terms.kind import Draft, Kind, Merging
from flora_vllm.terms.shared import Shared, held


@dataclass(frozen=True, eq=False)
class Bases:
    """`scale · large · scaled`, or its transpose if the input is not the smaller side, where row k · N + n of `scaled`
    is `mix[k, n] · small[k] ∘ gains[n]`. Both bases may be larger than the module.
    """

    small: Shared  # (R, m or more), m the smaller side
    large: Shared  # (the larger side or more, R * N or more)
    mix: torch.Tensor  # (R, N)
    gains: torch.Tensor  # (N, m)
    meets_input: bool  # the input is the smaller side
    scale: float = 1.0

    def __post_init__(self) -> None:
        rank, number = self.mix.shape
        if (
            self.gains.shape[0] != number
            or self.small.shape[0] != rank
            or self.small.shape[1] < self.gains.shape[1]
            or self.large.shape[1] < rank * number
        ):
            raise AdapterError(
                f"bases of {self.small.shape} and {self.large.shape} are too small for "
                f"{tuple(self.mix.shape)} and {tuple(self.gains.shape)}"
            )


def _tensors(term: Bases) -> Iterator[torch.Tensor]:
    yield from (term.mix, term.gains)


def _fold(term: Bases, draft: Draft) -> None:
    cut = draft.cut
    near, far = (cut.columns, cut.rows) if term.meets_input else (cut.rows, cut.columns)
    small_RM = held(term.small, slice(0, term.mix.shape[0]), near, cut.dtype, cut.device)
    large = held(term.large, far, slice(0, term.mix.numel()), cut.dtype, cut.device)
    mix_RN = term.mix.float() * term.scale
    draft.rare.append(BasesAdded(small_RM, large, mix_RN, term.gains[:, near].float().contiguous(), term.meets_input))


def _merge(term: Bases, merging: Merging) -> None:
    dtype = merging.sum_OI.dtype
    size = max(merging.base_OI.shape)
    small = term.small.tensor[:, : term.gains.shape[1]].to(dtype)
    scaled_PM = (term.mix.to(dtype)[:, :, None] * small[:, None] * term.gains.to(dtype)).flatten(0, 1)
    matrix = term.large.tensor[:size, : term.mix.numel()].to(dtype) @ scaled_PM
    merging.sum_OI = merging.sum_OI + term.scale * (matrix if term.meets_input else matrix.T)


BASES = Kind(
    order=2,
    shape=lambda term: (None, term.gains.shape[1]) if term.meets_input else (term.gains.shape[1], None),
    tensors=_tensors,
    fold=_fold,
    merge=_merge,
)
