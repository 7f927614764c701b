"""Launch parameters of the Triton kernels: frozen records made by functions, all numbers in one place.

No number here was timed on a GPU (`tune` times them on the one at hand). They come from what the compiler makes of the
kernels (registers, spills, shared memory: `benchmarks/results/triton_compile.jsonl`, `python
benchmarks/triton_compile.py`) and from roofline arithmetic.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of scaled products, plain W x not counted: a token's rows must fit half a row tile, and above 32 the modulation's
# operands spill.
MAX_RANK = 32


@dataclass(frozen=True)
class Machine:
    """`processors`: the GPU's SMs; `capability`: its major compute capability. The defaults are an H100's."""

    processors: int = 132
    capability: int = 9


@dataclass(frozen=True)
class StackedConfig:
    """Rows (m), out features (n), in features (k) of a tile, warps, pipeline depth, the cut of in features."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int


@dataclass(frozen=True)
class ModulatedConfig:
    """The same of the modulated product. `rank`: the modulation's inner size, at least the tensor core's 16."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    rank: int


@dataclass(frozen=True)
class Tuned:
    """What was timed for one layer shape. `stacked`: by the number of stacked rows up to which it is for; steps of more
    rows take the last. Empty: nothing was timed."""

    stacked: Mapping[int, StackedConfig] = field(default_factory=dict)
    modulated: ModulatedConfig | None = None

    def stacked_for(self, rows: int, most_rows: int) -> StackedConfig | None:
        """For so many rows, of at most `most_rows` a token; None if none was timed for such tokens."""
        if not self.stacked:
            return None
        config = self.stacked[min((most for most in self.stacked if rows <= most), default=max(self.stacked))]
        return config if _fits(config.m, most_rows) else None


def _fits(m: int, most_rows: int) -> bool:
    """Whether a token's scaled rows, the plain one aside, are at most half a row tile."""
    return most_rows - 1 <= m // 2


@dataclass(frozen=True)
class LowRankConfig:
    """Of low-rank terms: tokens (m), ranks (r) and in features (k) a program, the cut of in features; `n`: out features
    a program of the second half, `workers` of the first."""

    m: int
    r: int
    k: int
    split: int
    n: int
    workers: int
    warps: int


def stacked_config(
    dtype: torch.dtype,
    most_rows: int,
    in_features: int,
    out_features: int,
    rows: int,
    is_aligned: bool = True,
    machine: Machine = Machine(),
) -> StackedConfig:
    """Parameters for a step with `rows` stacked rows (or a budget of them), at most `most_rows` a token.

    `is_aligned`: every feature count is a multiple of 16.
    """
    # float32 takes three tensor-core products for one, and element-wise loads an address each: both want registers.
    small = dtype == torch.float32 or not is_aligned
    few = small or rows <= 64 - most_rows
    m = 64 if few else 128
    # A decode step is one or two row tiles. What keeps all processors reading W is, first, narrow column tiles.
    n = 32 if small or -(-out_features // 64) < machine.processors else 64
    tiles = -(-out_features // n) * -(-max(rows, 1) // (m - most_rows + 1))
    # Then a cut of in features, each run long enough for the pipeline to fill.
    split = max(1, min(machine.processors // tiles, in_features // 512, 8))
    # A third stage of 128 rows spills where the product's operands are in registers too: everywhere but on 9 and 10.
    stages = 2 if small or (machine.capability not in (9, 10) and not few) else 3
    return StackedConfig(m, n, k=32 if small else 64, warps=8, stages=stages, split=split)


def modulated_config(dtype: torch.dtype, max_rank: int, is_aligned: bool = True) -> ModulatedConfig:
    """Parameters for slots of ranks up to `max_rank`."""
    wide = dtype == torch.float32
    small = wide or not is_aligned
    # The tile whose modulation hides behind its product and that leaves registers for it (kernels.md, section 8).
    tile = 64 if small else 128
    k = 16 if wide else 32 if small else 64
    return ModulatedConfig(tile, tile, k, warps=8, stages=2 if small else 3, rank=16 if max_rank <= 16 else 32)


@functools.cache
def low_rank_config(
    dtype: torch.dtype,
    most_low: int,
    in_features: int,
    slices: int,
    blocks: int,
    is_aligned: bool = True,
    machine: Machine = Machine(),
) -> LowRankConfig:
    """Parameters for `blocks` blocks of up to 16 tokens, or a budget of them; ranks up to `most_low`."""
    small = dtype == torch.float32 or not is_aligned
    r = 16 if most_low <= 16 else 32
    k = 64 if small else 128
    items = blocks * slices * -(-most_low // r)
    split = max(1, min(machine.processors // items, in_features // 512, 8))
    return LowRankConfig(
        m=16, r=r, k=k, split=split, n=64 if small else 128, workers=min(items * split, machine.processors), warps=4
    )


def stacked_neighbours(config: StackedConfig, rows: int, most_rows: int, in_features: int) -> list[StackedConfig]:
    """A handful of other parameters for the same product, one of them changed in each."""
    changes: list[dict[str, Any]] = [{"n": n} for n in (config.n // 2, config.n * 2) if 32 <= n <= 128]
    changes += [{"m": m} for m in (64, 128) if m != config.m and _fits(m, most_rows)]
    # The parts of a cut product are written and read again: not for long steps.
    splits = {config.split // 2, config.split * 2} if rows <= 256 else {config.split // 2}
    changes += [{"split": split} for split in sorted(splits) if 1 <= split <= 8 and in_features >= 256 * split]
    return [replace(config, **change) for change in [*changes, {"warps": 4}]]


def modulated_neighbours(config: ModulatedConfig) -> list[ModulatedConfig]:
    """The same for the modulated product."""
    changes: list[dict[str, Any]] = [{"m": config.m // 2}, {"n": config.n // 2}, {"warps": 4}]
    changes += [{"stages": stages} for stages in (2, 3, 4) if stages != config.stages]
    return [replace(config, **change) for change in changes]
