"""The adapted linear on Triton kernels, for NVIDIA GPUs. The kernels have not run on hardware yet.

Importing this module needs neither Triton nor a GPU; building a layer does. Eager steps and captured CUDA graphs take
the same launches, with everything of a step and of the slots read from device buffers; no step waits for the GPU.

    a step's tokens in this layer        launches
    no adapter, or nothing here          the base call
    low-rank terms alone (LoRA)          the base call, down, up
    scaled products, weights, offsets    1: scaling, product, sum and bias in one (IA3, FLoRA of any rank)
      some in long segments              + 1 for those that are modulated
      some low-rank terms too            + 1: down runs inside the first, up comes after it
A CUDA graph holds the third row and, if the engine has low-rank slots, the last: 2 launches whatever the slots hold.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flora_vllm.errors import ConfigError
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.gpu.config import (
    DTYPES,
    MAX_RANK,
    Machine,
    ModulatedConfig,
    StackedConfig,
    Tuned,
    low_rank_config,
    modulated_config,
    stacked_config,
)
from flora_vllm.ops.gpu.slots import SlotTable
from flora_vllm.ops.gpu.step import DeviceSteps, StepBuffers
from flora_vllm.ops.terms import LayerTerms, Segments, SlotLimits

# Tokens of a block of low-rank terms.
_LOW_TOKENS = 16
# Numbers of stacked rows that launch parameters are chosen for.
_ROWS_APART = 16
_steps = DeviceSteps()


def why_unavailable(device: torch.device) -> str | None:
    """Why Triton layers cannot be built on this device, or None. TRITON_INTERPRET=1 means the CPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"device is {device.type}" + (" and TRITON_INTERPRET is 1" if interpreted else "")
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if interpreted else _why_no_driver(device)


def _why_no_driver(device: torch.device) -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU is of compute capability {capability[0]}.{capability[1]}, the kernels are for 8.0 and later"
    try:
        # Makes Triton's driver, which needs a C compiler.
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        return f"Triton's driver does not start ({error})"
    return None


def build_name() -> str:
    """What a measurement depends on beside shape and machine."""
    return f"triton {importlib.metadata.version('triton')}" + (" tuned" if is_tuning() else "")


def is_tuning() -> bool:
    """Whether launch parameters are to be timed. Raises ConfigError for a FLORA_TUNE that is neither 0 nor 1."""
    wish = os.environ.get("FLORA_TUNE", "0")
    if wish not in ("0", "1"):
        raise ConfigError(f"FLORA_TUNE={wish!r} is not allowed; use 0 or 1")
    return wish == "1"


def why_refused(weight_OI: torch.Tensor | None, device: torch.device, limits: SlotLimits) -> str | None:
    """Why an engine's layer is not served here, or None. An opaque base is, with the torch op behind it."""
    reason = why_unavailable(device)
    if reason is not None or weight_OI is None:
        return reason
    if weight_OI.dtype not in DTYPES:
        return f"dtype is {weight_OI.dtype}"
    if device.type == "cpu" and weight_OI.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16 correctly"
    if weight_OI.dim() != 2 or weight_OI.stride(1) != 1:
        return f"the weight has shape {tuple(weight_OI.shape)} and strides {weight_OI.stride()}, not contiguous rows"
    return f"ranks up to {limits.rank} are asked for, it has {MAX_RANK}" if limits.rank > MAX_RANK else None


class LowRankPair:
    """The launches of a layer's low-rank terms, and what all its launches share (`launch`, `layer`).

    weight_OI: W, or None over an opaque base. Raises ConfigError where Triton is missing.
    """

    def __init__(self, weight_OI: torch.Tensor | None, slots: SlotTable) -> None:
        reason = why_unavailable(slots.device)
        if reason is not None:
            raise ConfigError(f"the Triton kernels cannot run here: {reason}")
        from flora_vllm.ops.gpu import launch as triton_launch

        self.launch: Any = triton_launch
        self.layer = triton_launch.Layer(weight_OI, slots, *_machine_of(slots.device))
        self._slots = slots

    def step_of(self, segments: Segments) -> StepBuffers:
        """The step as the launches read it, the same for all layers."""
        return _steps.get(segments, self._slots.device)

    def of_step(self, x_TI: torch.Tensor, step: StepBuffers) -> Any:
        """What this step's low-rank terms are launched with."""
        slots = self._slots
        blocks = step.counted.get(slots.numbers)
        if blocks is None:
            has_low = slots.low_ranks[step.slots] > 0
            blocks = step.counted[slots.numbers] = int((-(-step.sizes // _LOW_TOKENS))[has_low].sum())
        return self._launched_with(x_TI, blocks, slots.most_low)

    def of_graph(self, x_TI: torch.Tensor, step: StepBuffers) -> Any:
        """The same of any step of so many tokens."""
        tokens = x_TI.shape[0]
        blocks = min(tokens, tokens // _LOW_TOKENS + step.max_segments)
        return self._launched_with(x_TI, blocks, self._slots.limits.low_rank)

    def add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, step: StepBuffers, low: Any) -> None:
        """The low-rank terms come to y_TO, the base's output, in place."""
        self.launch.launch_low_down(self.layer, x_TI, step, low)
        self.launch.launch_low_up(self.layer, y_TO, step, low)

    def _launched_with(self, x_TI: torch.Tensor, blocks: int, rank: int) -> Any:
        """For ranks up to `rank`; rounded, for each is another kernel to compile."""
        most_low = -(-rank // 16) * 16
        slots, layer = self._slots, self.layer
        config = low_rank_config(
            x_TI.dtype, most_low, slots.in_features, layer.slices, blocks, slots.is_aligned, layer.machine
        )
        return self.launch.LowRank(layer, x_TI, config, blocks, most_low)


class TritonLinear:
    """y = base(x) + bias with every slot's terms, on Triton kernels.

    weight_OI: W, rows contiguous. base: x_TI -> y_TO, W x without bias. sizes: out features of each slice, in order.
    Raises ConfigError where Triton is missing, or for a weight, a path or a rank that cannot be served.
    """

    implementation = "triton"

    def __init__(
        self,
        weight_OI: torch.Tensor,
        base: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        rule: DispatchRule,
        in_features: int,
        limits: SlotLimits,
    ) -> None:
        if not 1 <= limits.rank <= MAX_RANK:
            raise ConfigError(f"the Triton kernels serve ranks up to {MAX_RANK}, not {limits.rank}")
        self.base = base
        self.slots = SlotTable(sizes, in_features, limits, rule, weight_OI.dtype, weight_OI.device)
        self._low = LowRankPair(weight_OI, self.slots)
        self._launch, self._layer = self._low.launch, self._low.layer
        self._launch.check_dtype(weight_OI.dtype)
        self.dtype = weight_OI.dtype
        self.launch_with(Tuned())

    def launch_with(self, tuned: Tuned) -> None:
        """Take these launch parameters from now on, and those of `config` where there are none."""
        self._tuned = tuned
        self._modulated = tuned.modulated or modulated_config(self.dtype, self.slots.limits.rank, self.slots.is_aligned)
        self._stacked_configs: dict[tuple[int, int], StackedConfig] = {}

    @property
    def modulated_with(self) -> ModulatedConfig:
        return self._modulated

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. Read by captured graphs too."""
        self.slots.write(slot, terms)

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter."""
        if segments is None or x_TI.shape[0] == 0:
            return self._base(x_TI, bias_O)
        assert segments.tokens == x_TI.shape[0], f"{segments.tokens} tokens in segments, {x_TI.shape[0]} in x"
        x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        step, slots = self._low.step_of(segments), self.slots
        self._launch.check(self._layer, x_TI, bias_O, step)
        low = self._low.of_step(x_TI, step) if step.slot_bits & slots.low_bits else None
        if not step.slot_bits & slots.product_bits:
            y_TO = self._base(x_TI, bias_O)
            if low is not None:
                self._low.add(y_TO, x_TI, step, low)
            return y_TO
        rows, tiles = self._counts(step)
        return self._products(x_TI, bias_O, step, rows, slots.most_rows, tiles, low, stack_below=0)

    def _counts(self, step: StepBuffers) -> tuple[int, int]:
        """(stacked rows, row tiles of modulated segments) of a step."""
        slots, tile = self.slots, self._modulated.m
        key = (slots.numbers, tile)
        counts = step.counted.get(key)
        if counts is None:
            is_modulated = step.sizes >= slots.modulate_from[step.slots]
            rows = int(slots.rows[step.slots] @ (step.sizes * ~is_modulated))
            counts = step.counted[key] = rows, int((-(-step.sizes // tile))[is_modulated].sum())
        return counts

    def graph_form(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, step: StepBuffers, row_budget: int
    ) -> torch.Tensor:
        """y_TO of whatever step is in `step` when the launches run: the same launches as a CUDA graph may capture them.

        They depend on x's shape and `row_budget` (stacked rows; more than that run slower) alone, whatever terms the
        slots come to hold; every segment is stacked.
        """
        x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        self._launch.check(self._layer, x_TI, bias_O, step)
        limits = self.slots.limits
        low = self._low.of_graph(x_TI, step) if limits.low_rank else None
        # Slots may hold any rank when the launches are replayed.
        most_rows = limits.rank + 1
        rows = min(row_budget, x_TI.shape[0] * most_rows)
        return self._products(x_TI, bias_O, step, rows, most_rows, 0, low, self._launch.STACK_ALL)

    def _base(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        y_TO = self.base(x_TI)
        return y_TO if bias_O is None else y_TO.add_(bias_O)

    def _products(
        self,
        x_TI: torch.Tensor,
        bias_O: torch.Tensor | None,
        step: StepBuffers,
        rows: int,
        most_rows: int,
        tiles: int,
        low: Any,
        stack_below: int,
    ) -> torch.Tensor:
        layer = self._layer
        y_TO = torch.empty((x_TI.shape[0], layer.out_features), dtype=x_TI.dtype, device=x_TI.device)
        if rows or low is not None:
            config = self.stacked_with(rows, most_rows)
            self._launch.launch_stacked(layer, x_TI, y_TO, bias_O, step, config, rows, most_rows, stack_below, low)
        if tiles:
            self._launch.launch_modulated(layer, x_TI, y_TO, bias_O, step, self._modulated, tiles)
        if low is not None:
            self._launch.launch_low_up(layer, y_TO, step, low)
        return y_TO

    def stacked_with(self, rows: int, most_rows: int) -> StackedConfig:
        """The launch parameters for a step with `rows` stacked rows, at most `most_rows` a token."""
        rows = -(-rows // _ROWS_APART) * _ROWS_APART
        config = self._stacked_configs.get((rows, most_rows))
        if config is None:
            layer, slots = self._layer, self.slots
            sizes = (slots.in_features, layer.out_features)
            config = self._tuned.stacked_for(rows, most_rows) or stacked_config(
                self.dtype, most_rows, *sizes, rows, slots.is_aligned, layer.machine
            )
            self._stacked_configs[rows, most_rows] = config
        return config


@functools.cache
def _machine_of(device: torch.device) -> tuple[Machine, Any]:
    """A device's size and the arrival counters of its layers."""
    from flora_vllm.ops.gpu import launch as triton_launch

    if device.type != "cuda":
        return Machine(), triton_launch.Counters(device)
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.multi_processor_count, properties.major), triton_launch.Counters(device)
