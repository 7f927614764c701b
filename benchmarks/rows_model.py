"""The rows model: what a step of one linear layer costs with adapters, over the same step without them.

A step costs the rows that W is multiplied with, but never less than reading W and the adapters once. A segment of m
tokens and rank r costs the cheaper of m·r rows (stacked) and m + c(r) rows (modulated); LoRA's rows are
r (I + O) / (I O) of a row for each token.
"""

import math
from collections.abc import Callable, Iterable, Sequence

# Rows at which a product stops being bound by reading W: peak bfloat16 FLOP/s over bytes/s (one core of a Zen 4;
# H100 SXM 989 TFLOP/s, 3.35 TB/s with what cuBLAS reaches of it; H200 the same with 4.8 TB/s).
RIDGES = {"CPU": 6.8, "H100": 239.0, "H200": 186.0}
# A modulated weight tile of 256 rows costs a tensor-core product of depth 16.
GPU_TILE_ROWS, GPU_MODULATION_ROWS = 256, 16


def gpu_modulation(tokens: int) -> float:
    """Rows that modulating a segment costs beside its tokens, hidden behind the product (arithmetic, not timed)."""
    return GPU_MODULATION_ROWS * math.ceil(tokens / GPU_TILE_ROWS)


def step_rows(segments: Iterable[int], rank: int, modulation: Callable[[int], float]) -> float:
    """Rows of a step with segments of so many tokens; modulating one of m tokens costs `modulation(m)` rows more."""
    return sum(min(m * rank, m + modulation(m)) for m in segments)


def flora_ratio(
    mix: Sequence[int], rank: int, shape: tuple[int, int], ridge: float, modulation: Callable[[int], float]
) -> float:
    """Time of a step with FLoRA over the same step without adapters; `modulation` as in `step_rows`."""
    return _ratio(mix, rank, shape, ridge, step_rows(mix, rank, modulation))


def lora_ratio(mix: Sequence[int], rank: int, shape: tuple[int, int], ridge: float) -> float:
    """Time of a step with LoRA, in the base's own pass, over the same step without adapters."""
    return _ratio(mix, rank, shape, ridge, sum(mix) * (1 + rank * sum(shape) / math.prod(shape)))


def _ratio(mix: Sequence[int], rank: int, shape: tuple[int, int], ridge: float, rows: float) -> float:
    adapters = len(mix) * rank * sum(shape) / math.prod(shape)  # their bytes, in units of W's
    return max(ridge * (1 + adapters), rows) / max(ridge, sum(mix))
