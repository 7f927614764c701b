"""Launchers of the Triton kernels: what a kernel refuses is refused here, beside the launch, with the reason.

Grids depend on what the caller passes as rows or budget, never on device data. Importing this module needs Triton.
"""

from typing import Any

import torch
import triton

from flora_vllm.errors import ConfigError
from flora_vllm.ops.gpu import kernels as triton_kernels
from flora_vllm.ops.gpu import low_rank as triton_low_rank
from flora_vllm.ops.gpu.config import DTYPES, LaunchConfig
from flora_vllm.ops.gpu.slots import SlotTable
from flora_vllm.ops.gpu.step import StepBuffers

# Decided when the kernels were decorated: TRITON_INTERPRET=1 runs them in Python on the CPU.
INTERPRETED = not isinstance(triton_kernels.flora_stacked, triton.JITFunction)


class ColumnTiles:
    """Tiles of a layer's out features that never straddle two slices: (P, 4) int32 for each width asked for."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device) -> None:
        self._sizes = sizes
        self._device = device
        self._of_width: dict[int, torch.Tensor] = {}

    def of(self, width: int) -> torch.Tensor:
        if width not in self._of_width:
            rows, first = [], 0
            for i, size in enumerate(self._sizes):
                rows += [(i, n0, first, first + size) for n0 in range(first, first + size, width)]
                first += size
            self._of_width[width] = torch.tensor(rows, dtype=torch.int32, device=self._device)
        return self._of_width[width]


def launch_stacked(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    out: torch.Tensor,
    bias_O: torch.Tensor | None,
    step: StepBuffers,
    slots: SlotTable,
    tiles: ColumnTiles,
    config: LaunchConfig,
    rows: int,
    most_rows: int,
    finish: bool,
) -> None:
    """Stacked segments into `out`, written in place: y_TO, or (split, T, O) float32 if config.split > 1.

    `rows`: stacked rows of the step, or a budget of them; more rows than that take longer. `most_rows`: of any token
    of any slice, for as long as this launch may be replayed: a token with more would lose some.
    """
    _check_product(x_TI, weight_OI, bias_O, step, slots)
    parts = config.split
    _check_output(out, (parts, *_shape(x_TI, slots)) if parts > 1 else _shape(x_TI, slots), x_TI.device)
    assert not (finish and parts > 1), "bias and offset belong to the sum of the parts"
    exact = x_TI.dtype == torch.float32
    assert slots.most_rows() <= most_rows <= config.stacked_m, f"{most_rows} rows a token, tiles of {config.stacked_m}"
    window = config.stacked_m - most_rows + 1
    tile_table = tiles.of(config.stacked_n)
    grid = (triton.cdiv(max(rows, 1), window), tile_table.shape[0], parts)
    kernel: Any = triton_kernels.flora_stacked
    kernel[grid](
        x_TI, weight_OI, out, _present(bias_O, x_TI), step.tokens, step.token_slots, step.stacked, step.counts,
        slots.table, slots.layout, tile_table,
        len(slots.sizes), slots.in_features, x_TI.stride(0), weight_OI.stride(0), out.stride(-2),
        out.stride(0) if parts > 1 else 0, window,
        BM=config.stacked_m, BN=config.stacked_n, BK=config.stacked_k, SPLIT=parts, STAGES=config.stacked_stages,
        FINISH=finish, HAS_BIAS=finish and bias_O is not None, ALIGNED=slots.is_aligned,
        DOT=_precision(exact), EXACT_SUM=exact or INTERPRETED,
        num_warps=config.stacked_warps,
    )  # fmt: skip


def launch_modulated(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    out_TO: torch.Tensor,
    bias_O: torch.Tensor | None,
    step: StepBuffers,
    slots: SlotTable,
    tiles: ColumnTiles,
    config: LaunchConfig,
    programs: int,
    finish: bool,
) -> None:
    """Modulated segments into `out_TO`, written in place. `programs`: row tiles, or a budget of them."""
    _check_product(x_TI, weight_OI, bias_O, step, slots)
    _check_output(out_TO, _shape(x_TI, slots), x_TI.device)
    most = slots.limits.rank
    assert most <= config.rank, f"rank {most} does not fit a modulation of {config.rank}"
    tile_table = tiles.of(config.modulated_n)
    kernel: Any = triton_kernels.flora_modulated
    kernel[(max(programs, 1), tile_table.shape[0])](
        x_TI, weight_OI, out_TO, _present(bias_O, x_TI), step.tokens, step.modulated, step.counts,
        slots.table, tile_table,
        len(slots.sizes), slots.in_features, x_TI.stride(0), weight_OI.stride(0), out_TO.stride(0),
        BM=config.modulated_m, BN=config.modulated_n, BK=config.modulated_k, RANKS=config.rank,
        STAGES=config.modulated_stages, FINISH=finish, HAS_BIAS=finish and bias_O is not None,
        ALIGNED=slots.is_aligned, DOT=_precision(x_TI.dtype == torch.float32),
        num_warps=config.modulated_warps,
    )  # fmt: skip


def launch_low_down(
    x_TI: torch.Tensor, middle_TNR: torch.Tensor, step: StepBuffers, slots: SlotTable, config: LaunchConfig
) -> None:
    """down x of every token whose slot has a low-rank term into `middle_TNR` float32, written in place."""
    _check_x(x_TI, None, step, slots)
    shape = (x_TI.shape[0], len(slots.sizes), slots.limits.low_rank)
    _check_output(middle_TNR, shape, x_TI.device)
    assert middle_TNR.dtype == torch.float32, f"the low-rank middle is {middle_TNR.dtype}"
    kernel: Any = triton_low_rank.flora_low_down
    kernel[(shape[0], shape[1], triton.cdiv(shape[2], config.low_r))](
        x_TI, middle_TNR, step.tokens, step.token_slots, step.counts, slots.table,
        shape[1], slots.in_features, x_TI.stride(0), shape[2],
        BR=config.low_r, BK=config.low_k, ALIGNED=slots.is_aligned, num_warps=4,
    )  # fmt: skip


def launch_sum(
    parts: torch.Tensor,
    y_TO: torch.Tensor,
    bias_O: torch.Tensor | None,
    step: StepBuffers,
    slots: SlotTable,
    tiles: ColumnTiles,
    config: LaunchConfig,
    finish: bool,
    stacked_only: bool,
    middle_TNR: torch.Tensor | None = None,
) -> None:
    """Sum of `parts` (P, T, O) float32, with bias and offset if `finish`, into `y_TO`, written in place.

    `middle_TNR`: what `launch_low_down` wrote; up times it is added.
    """
    _check_output(parts, (parts.shape[0], *y_TO.shape), y_TO.device)
    assert middle_TNR is None or slots.dtype in (None, y_TO.dtype), f"up is {slots.dtype}, y {y_TO.dtype}"
    tile_table = tiles.of(config.sum_n)
    kernel: Any = triton_low_rank.flora_sum
    kernel[(y_TO.shape[0], tile_table.shape[0])](
        parts, y_TO, _present(bias_O, y_TO), step.tokens, step.token_slots, step.counts,
        slots.table, parts if middle_TNR is None else middle_TNR, tile_table,
        len(slots.sizes), parts.stride(0), parts.stride(1), y_TO.stride(0), slots.limits.low_rank,
        COUNT=2 if stacked_only else 3, PARTS=parts.shape[0], BN=config.sum_n, LOW=middle_TNR is not None,
        FINISH=finish, HAS_BIAS=finish and bias_O is not None, ALIGNED=slots.is_aligned, num_warps=4,
    )  # fmt: skip


def _check_product(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    step: StepBuffers,
    slots: SlotTable,
) -> None:
    _check_x(x_TI, bias_O, step, slots)
    if weight_OI.dtype != x_TI.dtype or weight_OI.device != x_TI.device:
        raise ConfigError(
            f"x is {x_TI.dtype} on {x_TI.device}, the weight {weight_OI.dtype} on {weight_OI.device}; they must agree"
        )
    if weight_OI.shape != (sum(slots.sizes), slots.in_features) or weight_OI.stride(1) != 1:
        raise ConfigError(
            f"the weight is {tuple(weight_OI.shape)} with strides {weight_OI.stride()}; needed are "
            f"{(sum(slots.sizes), slots.in_features)} and contiguous rows"
        )


def _check_x(x_TI: torch.Tensor, bias_O: torch.Tensor | None, step: StepBuffers, slots: SlotTable) -> None:
    if x_TI.dtype not in DTYPES:
        raise ConfigError(f"the Triton kernels serve {', '.join(map(str, DTYPES))}, not {x_TI.dtype}")
    if x_TI.dtype == torch.bfloat16 and INTERPRETED:
        raise ConfigError("Triton's interpreter does not multiply bfloat16 correctly; use float32 or float16 there")
    if not INTERPRETED and x_TI.device.type != "cuda":
        raise ConfigError(f"the Triton kernels need an NVIDIA GPU; x is on {x_TI.device}")
    if x_TI.dim() != 2 or x_TI.shape[1] != slots.in_features or x_TI.stride(1) != 1:
        raise ConfigError(
            f"x is {tuple(x_TI.shape)} with strides {x_TI.stride()}; needed are (T, {slots.in_features}) and "
            "contiguous rows"
        )
    if x_TI.shape[0] > step.max_tokens:
        raise ConfigError(f"x has {x_TI.shape[0]} tokens, the step's buffers hold {step.max_tokens}")
    if not x_TI.device == slots.device == step.device:
        raise ConfigError(f"x is on {x_TI.device}, the slots on {slots.device}, the step on {step.device}")
    if slots.dtype is not None and slots.dtype != x_TI.dtype:
        raise ConfigError(f"x is {x_TI.dtype}, the slots' terms are {slots.dtype}")
    if bias_O is not None and (bias_O.shape != (sum(slots.sizes),) or not bias_O.is_contiguous()):
        raise ConfigError(f"the bias has shape {tuple(bias_O.shape)}; needed is ({sum(slots.sizes)},), contiguous")


def _check_output(out: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(out.shape) != shape or out.stride(-1) != 1 or out.device != device:
        raise ConfigError(f"the output is {tuple(out.shape)} {out.stride()} on {out.device}; needed is {shape}")


def _shape(x_TI: torch.Tensor, slots: SlotTable) -> tuple[int, int]:
    return x_TI.shape[0], sum(slots.sizes)


def _present(bias_O: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A pointer that is never read stands in for a missing bias."""
    return like if bias_O is None else bias_O


def _precision(exact: bool) -> str:
    """Of float32 products: three tensor-core products of split operands, as close as plain float32 to rounding."""
    return "tf32x3" if exact else "tf32"
