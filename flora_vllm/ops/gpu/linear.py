"""The adapted linear on Triton kernels, for NVIDIA GPUs. The kernels have not run on hardware yet.

Importing this module needs neither Triton nor a GPU; building a layer does. A segment goes one way for all slices of
a layer: modulated if the rule says so for any of them. Low-rank terms are two plain products a segment in `forward`,
kernels in `graph_form`, whose launches may not depend on the step. No step waits for the GPU.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flora_vllm.errors import ConfigError
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.gpu.config import DTYPES, MAX_RANK, LaunchConfig, launch_config
from flora_vllm.ops.gpu.slots import SlotTable
from flora_vllm.ops.gpu.step import DeviceSteps, StepBuffers
from flora_vllm.ops.terms import LayerTerms, Segments, SlotLimits

# A segment of plain W x this long is worth whole row tiles of its own.
PLAIN_TOKENS = 64
_steps = DeviceSteps()


@dataclass(frozen=True)
class _Plan:
    """What a run of launches is sized by: the step's own numbers, or a budget that holds for many steps."""

    step: StepBuffers
    config: LaunchConfig
    rows: int  # stacked rows
    most_rows: int  # of one token
    tiles: int  # row tiles of modulated segments


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
    return f"triton {importlib.metadata.version('triton')}"


def why_refused(weight_OI: torch.Tensor | None, device: torch.device, limits: SlotLimits) -> str | None:
    """Why an engine's layer is not served here, or None.

    A base that hides its weight is left to the torch op: scaled rows beside base tokens in one call of it would let an
    adapter touch its neighbours where the quantisation scales activations by the call.
    """
    reason = why_unavailable(device)
    if reason is not None:
        return reason
    if weight_OI is None:
        return "the base does not show its weight"
    if weight_OI.dtype not in DTYPES:
        return f"dtype is {weight_OI.dtype}"
    if device.type == "cpu" and weight_OI.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16 correctly"
    if weight_OI.dim() != 2 or weight_OI.stride(1) != 1:
        return f"the weight has shape {tuple(weight_OI.shape)} and strides {weight_OI.stride()}, not contiguous rows"
    return f"ranks up to {limits.rank} are asked for, it has {MAX_RANK}" if limits.rank > MAX_RANK else None


class TritonLinear:
    """y = base(x) + bias with every slot's terms, on Triton kernels.

    weight_OI: W, rows contiguous. base: x_TI -> y_TO, W x without bias. sizes: out features of each slice, in order.
    Raises ConfigError where Triton is missing, or for a path or a rank that cannot be served.
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
        self.device = weight_OI.device
        reason = why_unavailable(self.device)
        if reason is not None:
            raise ConfigError(f"the Triton kernels cannot run here: {reason}")
        from flora_vllm.ops.gpu import launch as triton_launch

        self._launch: Any = triton_launch
        self.weight_OI = weight_OI
        self.base = base
        self.rule = rule
        self.slots = SlotTable(sizes, in_features, limits, self.device)
        self.parts = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.out_features = sum(sizes)
        self._tiles = triton_launch.ColumnTiles(self.slots.sizes, self.device)
        self._machine: dict[str, int] = {}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self._machine = {"processors": properties.multi_processor_count, "capability": properties.major}

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. Read by captured graphs too."""
        self.slots.write(slot, terms, self.weight_OI.dtype)

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter."""
        if segments is None or x_TI.shape[0] == 0:
            y_TO = self.base(x_TI)
            return y_TO if bias_O is None else y_TO.add_(bias_O)
        assert segments.tokens == x_TI.shape[0], f"{segments.tokens} tokens in segments, {x_TI.shape[0]} in x"
        x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        counts = [segments.starts[i + 1] - segments.starts[i] for i in range(len(segments.slots))]
        modulates = tuple(self._modulates(slot, n) for slot, n in zip(segments.slots, counts, strict=True))
        step = _steps.get(segments, modulates, self.device)
        rows = self.stacked_rows(segments, modulates)
        config = self._config(x_TI, rows)
        tiles = sum(-(-n // config.modulated_m) for n, modulated in zip(counts, modulates, strict=True) if modulated)
        plan = _Plan(step, config, rows, self.slots.most_rows(), tiles)
        if not any(_has_low_rank(self.slots.terms(slot)) for slot in segments.slots):
            return self._run(x_TI, bias_O, plan, x_TI.dtype)
        y_TO = self._run(x_TI, None, plan, torch.float32, finish=False)
        self._add_low_rank(y_TO, x_TI, step, segments, modulates)
        out_TO = torch.empty_like(y_TO, dtype=x_TI.dtype)
        self._launch.launch_sum(
            y_TO[None], out_TO, bias_O, step, self.slots, self._tiles, config, finish=True, stacked_only=False
        )
        return out_TO

    def graph_form(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, step: StepBuffers, row_budget: int
    ) -> torch.Tensor:
        """y_TO of whatever step is in `step` when the launches run: the form that a CUDA graph may capture.

        Launches depend on x's shape and `row_budget` (stacked rows; more than that run slower) alone, whatever terms
        the slots come to hold. Every segment of `step` is a stacked one.
        """
        x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        # Slots may hold any rank when the launches are replayed.
        most_rows = self.slots.limits.rank + 1
        plan = _Plan(step, self._config(x_TI, row_budget), max(row_budget, 1), most_rows, tiles=0)
        shape = (x_TI.shape[0], len(self.parts), self.slots.limits.low_rank)
        middle_TNR = torch.empty(shape, dtype=torch.float32, device=x_TI.device)
        self._launch.launch_low_down(x_TI, middle_TNR, step, self.slots, plan.config)
        parts = self._stacked_parts(x_TI, plan)
        y_TO = torch.empty(x_TI.shape[0], self.out_features, dtype=x_TI.dtype, device=x_TI.device)
        around = (step, self.slots, self._tiles, plan.config)
        self._launch.launch_sum(parts, y_TO, bias_O, *around, finish=True, stacked_only=False, middle_TNR=middle_TNR)
        return y_TO

    def stacked_rows(self, segments: Segments, modulates: Sequence[bool]) -> int:
        """Rows of the base product that the step's stacked segments need, of the slice with the most."""
        rows = [0] * len(self.parts)
        for i, slot in enumerate(segments.slots):
            if not modulates[i]:
                tokens = segments.starts[i + 1] - segments.starts[i]
                rows = [total + tokens * of_slice for total, of_slice in zip(rows, self.slots.rows(slot), strict=True)]
        return max(rows)

    def _modulates(self, slot: int, tokens: int) -> bool:
        counts = [
            (part.products, part.a_RI.shape[0])
            for part in self.slots.terms(slot) or ()
            if part is not None and part.a_RI is not None
        ]
        if not counts:
            return tokens >= PLAIN_TOKENS if self.rule.path == "auto" else self.rule.path == "modulated"
        return any(tokens >= self.rule.modulate_from(products, scaled) for products, scaled in counts)

    def _config(self, x_TI: torch.Tensor, rows: int) -> LaunchConfig:
        slots = self.slots
        return launch_config(
            x_TI.dtype, slots.limits.rank, slots.in_features, self.out_features, rows, slots.is_aligned, **self._machine
        )

    def _run(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, plan: _Plan, dtype: torch.dtype, finish: bool = True
    ) -> torch.Tensor:
        y_TO = torch.empty(x_TI.shape[0], self.out_features, dtype=dtype, device=x_TI.device)
        config, rows = plan.config, plan.rows
        around = (plan.step, self.slots, self._tiles, config)
        if rows and config.split == 1:
            self._launch.launch_stacked(x_TI, self.weight_OI, y_TO, bias_O, *around, rows, plan.most_rows, finish)
        elif rows:
            parts = self._stacked_parts(x_TI, plan)
            self._launch.launch_sum(parts, y_TO, bias_O, *around, finish, stacked_only=True)
        if plan.tiles:
            self._launch.launch_modulated(x_TI, self.weight_OI, y_TO, bias_O, *around, plan.tiles, finish)
        return y_TO

    def _stacked_parts(self, x_TI: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """The stacked segments' products as (split, T, O) float32, each part over a run of in features."""
        shape = (plan.config.split, x_TI.shape[0], self.out_features)
        parts = torch.empty(shape, dtype=torch.float32, device=x_TI.device)
        out = parts if plan.config.split > 1 else parts[0]
        around = (plan.step, self.slots, self._tiles, plan.config)
        self._launch.launch_stacked(x_TI, self.weight_OI, out, None, *around, plan.rows, plan.most_rows, finish=False)
        return parts

    def _add_low_rank(
        self, y_TO: torch.Tensor, x_TI: torch.Tensor, step: StepBuffers, segments: Segments, modulates: Sequence[bool]
    ) -> None:
        for i, (first, last) in step.positions(segments, modulates):
            terms = self.slots.terms(segments.slots[i])
            if not _has_low_rank(terms):
                continue
            assert terms is not None
            rows_N = step.tokens[first:last]
            for part, piece in zip(terms, self.parts, strict=True):
                if part is not None and part.down_RI is not None:
                    assert part.up_RO is not None, "checked by the slot table"
                    y_TO[rows_N, piece] += (x_TI[rows_N] @ part.down_RI.T) @ part.up_RO


def _has_low_rank(terms: LayerTerms | None) -> bool:
    return any(part is not None and part.down_RI is not None for part in terms or ())
