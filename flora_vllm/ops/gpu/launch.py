"""Launchers of the Triton kernels: what a kernel refuses is refused here, beside the launch, with the reason.

Grids depend on what the caller passes as rows or budgets, never on device data. Importing this module needs Triton.
"""

import torch
import triton

from flora_vllm.errors import ConfigError
from flora_vllm.ops.gpu import kernels as triton_kernels
from flora_vllm.ops.gpu import low_rank as triton_low_rank
from flora_vllm.ops.gpu.compiled import launch
from flora_vllm.ops.gpu.config import DTYPES, LowRankConfig, Machine, ModulatedConfig, StackedConfig
from flora_vllm.ops.gpu.slots import SlotTable
from flora_vllm.ops.gpu.step import StepBuffers

# Decided when the kernels were decorated: TRITON_INTERPRET=1 runs them in Python on the CPU.
INTERPRETED = not isinstance(triton_kernels.flora_stacked, triton.JITFunction)
# More programs than this for each processor only wait for one another.
_PROGRAMS_PER_PROCESSOR = 2
STACK_ALL = 2**31 - 1  # as `stack_below`: no segment is so long


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


class Counters:
    """Zeros that the programs of a cut product count their arrivals in, and leave zero: one run of them a device.

    Launches that use it must follow one another in a stream, as a model's layers do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Captured graphs keep the addresses of earlier ones.
        self._kept = [torch.zeros(4096, dtype=torch.int32, device=device)]

    def of(self, count: int) -> torch.Tensor:
        if self._kept[-1].numel() < count:
            # Inside a capture the zeros would only be written by a replay.
            assert not (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()), "run it once before"
            self._kept.append(torch.zeros(2 * count, dtype=torch.int32, device=self._device))
        return self._kept[-1]


class Layer:
    """What the launches of one layer share: its weight, slots, and where the kernels run."""

    def __init__(self, weight_OI: torch.Tensor | None, slots: SlotTable, machine: Machine, counters: Counters) -> None:
        if weight_OI is not None and (
            weight_OI.shape != (sum(slots.sizes), slots.in_features) or weight_OI.stride(1) != 1
        ):
            raise ConfigError(
                f"the weight is {tuple(weight_OI.shape)} with strides {weight_OI.stride()}; needed are "
                f"{(sum(slots.sizes), slots.in_features)} and contiguous rows"
            )
        if not INTERPRETED and slots.device.type != "cuda":
            raise ConfigError(f"the Triton kernels need an NVIDIA GPU; the layer is on {slots.device}")
        self.weight_OI = weight_OI
        self.weight_stride = 0 if weight_OI is None else weight_OI.stride(0)
        self.slots = slots
        self.machine = machine
        self.counters = counters
        self.tiles = ColumnTiles(slots.sizes, slots.device)
        self.slices = len(slots.sizes)
        self.out_features = sum(slots.sizes)

    def programs(self, wanted: int, others: int) -> int:
        """Of `wanted` programs on an axis of a grid, with `others` for each, those worth launching."""
        return max(1, min(wanted, self.machine.processors * _PROGRAMS_PER_PROCESSOR // others))


class LowRank:
    """A step's low-rank terms: what both of their launches must agree on. `middle` is written by the first.

    Raises ConfigError for an x that the kernels would read wrongly.
    """

    def __init__(self, layer: Layer, x_TI: torch.Tensor, config: LowRankConfig, blocks: int, most_low: int) -> None:
        """`blocks` of up to `config.m` tokens, or a budget of them; `most_low`: the largest rank of any slot, for as
        long as the launches may be replayed."""
        slots = layer.slots
        assert slots.most_low <= most_low, f"ranks of {most_low} at most, {slots.low_ranks}"
        if x_TI.stride(1) != 1 or slots.dtype not in (None, x_TI.dtype) or x_TI.device != slots.device:
            raise ConfigError(
                f"x is {x_TI.dtype} on {x_TI.device} with strides {x_TI.stride()}, the slots' terms {slots.dtype} on "
                f"{slots.device}; they must agree, with contiguous rows"
            )
        self.config = config
        self.blocks = blocks
        self.most_low = most_low
        shape = (config.split, x_TI.shape[0], layer.slices, most_low)
        self.middle = torch.empty(shape, dtype=torch.float32, device=x_TI.device)


def check(layer: Layer, x_TI: torch.Tensor, bias_O: torch.Tensor | None, step: StepBuffers) -> None:
    """Raises ConfigError for an x, a bias or a step that the kernels would read wrongly."""
    slots, shape = layer.slots, x_TI.shape
    assert layer.weight_OI is not None, "an opaque base sees to its own x"
    if x_TI.dtype != layer.weight_OI.dtype or x_TI.device != slots.device or step.device != slots.device:
        raise ConfigError(
            f"x is {x_TI.dtype} on {x_TI.device}, the step on {step.device}, the weight {layer.weight_OI.dtype} on "
            f"{slots.device}; they must agree"
        )
    if len(shape) != 2 or shape[1] != slots.in_features or x_TI.stride(1) != 1:
        raise ConfigError(
            f"x is {tuple(shape)} with strides {x_TI.stride()}; needed are (T, {slots.in_features}) and contiguous rows"
        )
    if shape[0] > step.max_tokens:
        raise ConfigError(f"x has {shape[0]} tokens, the step's buffers hold {step.max_tokens}")
    if bias_O is not None and (bias_O.shape != (layer.out_features,) or not bias_O.is_contiguous()):
        raise ConfigError(f"the bias has shape {tuple(bias_O.shape)}; needed is ({layer.out_features},), contiguous")


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ConfigError for a dtype that the kernels do not serve."""
    if dtype not in DTYPES:
        raise ConfigError(f"the Triton kernels serve {', '.join(map(str, DTYPES))}, not {dtype}")
    if dtype == torch.bfloat16 and INTERPRETED:
        raise ConfigError("Triton's interpreter does not multiply bfloat16 correctly; use float32 or float16 there")


def launch_stacked(
    layer: Layer,
    x_TI: torch.Tensor,
    y_TO: torch.Tensor,
    bias_O: torch.Tensor | None,
    step: StepBuffers,
    config: StackedConfig,
    rows: int,
    most_rows: int,
    stack_below: int,
    low: LowRank | None,
) -> None:
    """Stacked segments into `y_TO`, written in place, and the first half of low-rank terms beside them.

    `rows`: stacked rows of the step, or a budget of them; more rows than that take longer. `most_rows`: of any token
    of any slice, for as long as this launch may be replayed: a token with more would lose some. `stack_below`: 0, or
    STACK_ALL where no launch serves modulated segments.
    """
    slots, parts = layer.slots, config.split
    assert slots.most_rows <= most_rows <= config.m, f"{slots.most_rows} rows a token, {most_rows}, tiles of {config.m}"
    window = config.m - most_rows + 1
    tile_table = layer.tiles.of(config.n)
    column_tiles = tile_table.shape[0]
    row_tiles = layer.programs(-(-max(rows, 1) // window), column_tiles * parts)
    tokens, out_features = x_TI.shape[0], layer.out_features
    parts_STO = counters = y_TO
    if parts > 1:
        parts_STO = torch.empty((parts, tokens, out_features), dtype=torch.float32, device=x_TI.device)
        counters = layer.counters.of(-(-tokens * most_rows // window) * column_tiles)
    down, down_programs = _NO_LOW, 0
    if low is not None:
        down = low.config
        down_programs = -(-down.workers // (row_tiles * parts))
    args = (
        x_TI, layer.weight_OI, y_TO, x_TI if bias_O is None else bias_O, step.tokens, step.segments, step.counts,
        slots.table, slots.layout, tile_table, parts_STO, counters, x_TI if low is None else low.middle,
        layer.slices, slots.in_features, out_features, x_TI.stride(0), layer.weight_stride, y_TO.stride(0),
        tokens * out_features, 0 if low is None else low.middle.stride(0), 0 if low is None else low.most_low,
        window, stack_below, down_programs,
    )  # fmt: skip
    constants = {
        "BM": config.m, "BN": config.n, "BK": config.k, "SPLIT": parts, "STAGES": config.stages,
        "LOW": low is not None, "LOW_M": down.m, "LOW_R": down.r, "LOW_K": down.k, "LOW_SPLIT": down.split,
        "HAS_BIAS": bias_O is not None, "ALIGNED": slots.is_aligned, "DOT": _precision(x_TI),
        "EXACT_SUM": x_TI.dtype == torch.float32 or INTERPRETED,
    }  # fmt: skip
    grid = (row_tiles, down_programs + column_tiles, parts)
    launch(triton_kernels.flora_stacked, grid, args, constants, config.warps)


# Constants of a launch without low-rank terms.
_NO_LOW = LowRankConfig(m=16, r=16, k=64, split=1, n=64, workers=0, warps=4)


def launch_modulated(
    layer: Layer,
    x_TI: torch.Tensor,
    y_TO: torch.Tensor,
    bias_O: torch.Tensor | None,
    step: StepBuffers,
    config: ModulatedConfig,
    programs: int,
) -> None:
    """Modulated segments into `y_TO`, written in place. `programs`: row tiles, or a budget of them."""
    slots = layer.slots
    assert slots.limits.rank <= config.rank, f"rank {slots.limits.rank} does not fit a modulation of {config.rank}"
    tile_table = layer.tiles.of(config.n)
    args = (
        x_TI, layer.weight_OI, y_TO, x_TI if bias_O is None else bias_O, step.tokens, step.segments, step.counts,
        slots.table, slots.layout, tile_table,
        layer.slices, slots.in_features, x_TI.stride(0), layer.weight_stride, y_TO.stride(0),
    )  # fmt: skip
    constants = {
        "BM": config.m, "BN": config.n, "BK": config.k, "RANKS": config.rank, "STAGES": config.stages,
        "HAS_BIAS": bias_O is not None, "ALIGNED": slots.is_aligned, "DOT": _precision(x_TI),
    }  # fmt: skip
    grid = (max(programs, 1), tile_table.shape[0], 1)
    launch(triton_kernels.flora_modulated, grid, args, constants, config.warps)


def launch_low_down(layer: Layer, x_TI: torch.Tensor, step: StepBuffers, low: LowRank) -> None:
    """The first half of low-rank terms alone, where the base product is not a launch of ours."""
    slots, config = layer.slots, low.config
    args = (
        x_TI, low.middle, step.tokens, step.segments, step.counts, slots.table, slots.layout,
        layer.slices, slots.in_features, x_TI.stride(0), low.middle.stride(0), low.most_low,
    )  # fmt: skip
    constants = {
        "BM": config.m, "BR": config.r, "BK": config.k, "SPLIT": config.split, "STAGES": 3,
        "ALIGNED": slots.is_aligned, "DOT": _precision(x_TI),
    }  # fmt: skip
    launch(triton_low_rank.flora_low_down, (config.workers, 1, 1), args, constants, config.warps)


def launch_low_up(layer: Layer, y_TO: torch.Tensor, step: StepBuffers, low: LowRank) -> None:
    """The second half of low-rank terms, added to `y_TO` in place."""
    slots, config = layer.slots, low.config
    tile_table = layer.tiles.of(config.n)
    column_tiles = tile_table.shape[0]
    args = (
        y_TO, low.middle, step.tokens, step.segments, step.counts, slots.table, slots.layout, tile_table,
        layer.slices, y_TO.stride(0), low.middle.stride(0), low.most_low,
    )  # fmt: skip
    constants = {
        "BM": config.m, "BN": config.n, "BR": config.r, "SPLIT": config.split,
        "ALIGNED": slots.is_aligned, "DOT": _precision(y_TO),
    }  # fmt: skip
    grid = (layer.programs(low.blocks, column_tiles), column_tiles, 1)
    launch(triton_low_rank.flora_low_up, grid, args, constants, config.warps)


def _precision(like: torch.Tensor) -> str:
    """Of float32 products: three tensor-core products of split operands, as close as plain float32 to rounding."""
    return "tf32x3" if like.dtype == torch.float32 else "tf32"
