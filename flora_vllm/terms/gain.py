"""A factor on each output: IA3's on attention layers, which scales the bias too; BOFT's, which does not."""

from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.terms.kind import Draft, Kind, Merging


@dataclass(frozen=True, eq=False)
class Gain:
    """The sum of all products and low-rank terms times `gain`; the base's bias too if `scales_bias`."""

    gain: torch.Tensor  # (O,)
    scales_bias: bool

    def __post_init__(self) -> None:
        if self.gain.ndim != 1:
            raise AdapterError(f"gain must be (out,), got {tuple(self.gain.shape)}")


def _fold(term: Gain, draft: Draft) -> None:
    gain_O = term.gain[draft.cut.rows].float()
    draft.gain_O = gain_O if draft.gain_O is None else draft.gain_O * gain_O
    if term.scales_bias and draft.bias_O is not None:
        draft.bias_O = gain_O * draft.bias_O


def _merge(term: Gain, merging: Merging) -> None:
    gain = term.gain.to(merging.sum_OI.dtype)
    merging.sum_OI = gain[:, None] * merging.sum_OI
    if term.scales_bias and merging.bias_O is not None:
        merging.bias_O = gain * merging.bias_O


GAIN = Kind(
    order=3, shape=lambda term: (term.gain.shape[0], None), tensors=lambda term: iter((term.gain,)), fold=_fold,
    merge=_merge,
)  # fmt: skip
