"""The CPU op (placeholder until built)."""

from collections.abc import Sequence

import torch

from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import LayerTerms, Segments

DTYPES = (torch.bfloat16, torch.float32)


def why_unavailable() -> str | None:
    """Why the native op cannot run here, or None."""
    return "not built"


def build_name() -> str:
    """Name of this build for measurements."""
    return "native"


class NativeLinear:
    implementation = "native"

    def __init__(self, weight_OI: torch.Tensor, sizes: Sequence[int], rule: DispatchRule) -> None:
        raise NotImplementedError

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None: ...

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor: ...
