"""What is added beside the bias, or takes its place: lora_bias, bias="all", BEFT."""

from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.terms.kind import Draft, Kind, Merging


@dataclass(frozen=True, eq=False)
class Offset:
    """`values` added to the output, or, if it `replaces`, in the base bias's place. No gain scales it."""

    values: torch.Tensor  # (O,)
    scale: float = 1.0
    replaces: bool = False

    def __post_init__(self) -> None:
        if self.values.ndim != 1:
            raise AdapterError(f"an offset must be (out,), got {tuple(self.values.shape)}")


def _fold(term: Offset, draft: Draft) -> None:
    offset_O = term.values[draft.cut.rows].float() * term.scale
    if term.replaces and draft.bias_O is not None:
        draft.bias_O = offset_O
    else:
        draft.add_offset(offset_O)


def _merge(term: Offset, merging: Merging) -> None:
    values = term.scale * term.values.to(merging.sum_OI.dtype)
    if term.replaces and merging.bias_O is not None:
        merging.bias_O = values
    else:
        merging.add_offset(values)


OFFSET = Kind(
    order=4, shape=lambda term: (term.values.shape[0], None), tensors=lambda term: iter((term.values,)), fold=_fold,
    merge=_merge,
)  # fmt: skip
