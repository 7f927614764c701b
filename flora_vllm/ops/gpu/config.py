"""Launch parameters of the Triton kernels: one frozen record made by one function, all numbers in one place.

No number here was timed on a GPU. They come from what the compiler makes of the kernels (registers, spills, shared
memory: `benchmarks/results/triton_compile.jsonl`, `python benchmarks/triton_compile.py`) and from roofline arithmetic.
"""

from dataclasses import dataclass

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of scaled products, plain W x not counted: a token's rows must fit half a row tile, and above 32 the modulation's
# operands spill.
MAX_RANK = 32


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes, warps and pipeline depth. Rows (m), out features (n) and in features (k) per program."""

    stacked_m: int
    stacked_n: int
    stacked_k: int
    stacked_warps: int
    stacked_stages: int
    modulated_m: int
    modulated_n: int
    modulated_k: int
    modulated_warps: int
    modulated_stages: int
    rank: int  # the modulation product's inner size: rank padded in registers, at least the tensor core's 16
    split: int  # runs of in features that the stacked product is cut into
    sum_n: int  # out features per program of the sums and elementwise kernels
    low_k: int
    low_r: int  # low ranks per program of the low-rank terms' first half


def launch_config(
    dtype: torch.dtype,
    max_rank: int,
    in_features: int,
    out_features: int,
    rows: int,
    is_aligned: bool = True,
    processors: int = 132,
    capability: int = 9,
) -> LaunchConfig:
    """Parameters for a step with `rows` stacked rows (or a budget of them).

    `is_aligned`: every feature count is a multiple of 16. `processors`: the GPU's SMs; `capability`: its major compute
    capability. `split` depends on the layer's shape alone, so a token's sum does not depend on what else is in the
    step.
    """
    # float32 takes three tensor-core products for one, and element-wise loads an address each: both want registers.
    wide = dtype == torch.float32
    small = wide or not is_aligned
    few = small or rows <= 64 - max_rank
    stacked_n = 32 if small else 64
    # A decode step is one or two row tiles: without a split, 576 out features would keep 9 of 132 processors busy
    # (kernels.md, section 8).
    programs = -(-out_features // stacked_n)
    return LaunchConfig(
        stacked_m=64 if few else 128,
        stacked_n=stacked_n,
        stacked_k=32 if small else 64,
        stacked_warps=8,
        # A third stage of 128 rows spills on sm_80, where the sum's operands are in registers too.
        stacked_stages=2 if small or (capability < 9 and not few) else 3,
        # The tile whose modulation hides behind its product and that leaves registers for it (kernels.md, section 8).
        modulated_m=64 if small else 128,
        modulated_n=64 if small else 128,
        modulated_k=16 if wide else 32 if small else 64,
        modulated_warps=8,
        modulated_stages=2 if small else 3,
        rank=16 if max_rank <= 16 else 32,
        split=max(1, min(processors // programs, in_features // 512, 8)),
        sum_n=256,
        low_k=256,
        low_r=16,
    )
