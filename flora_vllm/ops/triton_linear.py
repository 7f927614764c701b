"""The adapted linear on Triton kernels, for NVIDIA GPUs. The kernels have not run on hardware yet.

Importing this module needs neither Triton nor a GPU; building a layer does. A segment goes one way for all slices of a
layer: modulated if the rule says so for any of its ranks. Low-rank terms are torch operations, segment by segment:
correct, not fast; an engine with its own batched low-rank kernels calls `products`, adds, then `finish`.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flora_vllm.errors import ConfigError, StepError
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import LayerTerms, Segments
from flora_vllm.ops.triton_config import MAX_RANK, LaunchConfig, launch_config
from flora_vllm.ops.triton_slots import SlotTable
from flora_vllm.ops.triton_step import DeviceSteps, StepBuffers

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


def why_unavailable() -> str | None:
    """Why Triton layers cannot be built here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from flora_vllm.ops import triton_launch

    if not triton_launch.INTERPRETED and not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    return None


class TritonLinear:
    """y = base(x) + bias with every slot's terms, on Triton kernels.

    weight_OI: W, rows contiguous, or None if the base is opaque (quantised): then everything is stacked through
    `base`. base: x_TI -> y_TO, W x without bias. sizes: out features of each slice, in order. device: needed only
    without a weight. max_rank: of Hadamard terms, identity not counted.
    Raises ConfigError where Triton is missing, or for a path or a rank that cannot be served.
    """

    implementation = "triton"

    def __init__(
        self,
        weight_OI: torch.Tensor | None,
        base: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        rule: DispatchRule,
        in_features: int,
        *,
        max_slots: int = 256,
        max_rank: int = 16,
        device: torch.device | None = None,
    ) -> None:
        if weight_OI is None and rule.path == "modulated":
            raise ConfigError("path 'modulated' needs the layer's weight, which this (quantised) layer does not show")
        if not 1 <= max_rank <= MAX_RANK:
            raise ConfigError(f"the Triton kernels serve ranks up to {MAX_RANK}, not {max_rank}")
        reason = why_unavailable()
        if reason is not None:
            raise ConfigError(f"the Triton kernels cannot run here: {reason}")
        from flora_vllm.ops import triton_launch

        self._launch: Any = triton_launch
        self.weight_OI = weight_OI
        self.base = base
        self.rule = rule
        self.device = torch.device("cuda") if device is None else device
        if weight_OI is not None:
            self.device = weight_OI.device
        self.slots = SlotTable(sizes, in_features, max_slots, max_rank, self.device)
        self.parts = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.out_features = sum(sizes)
        self._tiles = triton_launch.ColumnTiles(self.slots.sizes, self.device)
        self._machine: dict[str, int] = {}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self._machine = {"processors": properties.multi_processor_count, "capability": properties.major}
        self._is_fused = False

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. Read by captured graphs too."""
        tensors = [tensor for part in terms or () if part is not None for tensor in part.tensors()]
        if self._is_fused and any(part is not None and part.down_RI is not None for part in terms or ()):
            raise ConfigError("a low-rank term in a layer whose captured steps have none would be left out")
        dtype = tensors[0].dtype if tensors else self.slots.dtype
        if self.weight_OI is not None:
            dtype = self.weight_OI.dtype
        self.slots.write(slot, terms, torch.float32 if dtype is None else dtype)

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter."""
        if segments is None or x_TI.shape[0] == 0:
            y_TO = self.base(x_TI)
            return y_TO if bias_O is None else y_TO.add_(bias_O)
        assert segments.tokens == x_TI.shape[0], f"{segments.tokens} tokens in segments, {x_TI.shape[0]} in x"
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
        self._add_low_rank(y_TO, x_TI, segments)
        return self.finish(y_TO, bias_O, step, x_TI.dtype)

    def forward_step(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, step: StepBuffers, row_budget: int, modulated: bool
    ) -> torch.Tensor:
        """y_TO of whatever step is in `step` when the launches run: the form that a CUDA graph may capture.

        Launches depend on x's shape, `row_budget` (stacked rows; more than that run slower, or give NaN over an opaque
        base) and `modulated` (whether steps may have modulated segments) alone. Raises StepError if a slot has a
        low-rank term: use `products` and `finish`.
        """
        if any(_has_low_rank(self.slots.terms(slot)) for slot in range(1, self.slots.max_slots + 1)):
            raise StepError("a slot has a low-rank term, which this form of the layer does not add")
        self._is_fused = True
        return self._run(x_TI, bias_O, self._budget(x_TI, step, row_budget, modulated), x_TI.dtype)

    def products(self, x_TI: torch.Tensor, step: StepBuffers, row_budget: int, modulated: bool) -> torch.Tensor:
        """Σ_j b[j] ∘ W(a[j] ∘ x) alone, float32 (T, O): `forward_step` without gain and bias."""
        plan = self._budget(x_TI, step, row_budget, modulated)
        return self._run(x_TI, None, plan, torch.float32, finish=False)

    def finish(
        self, sum_TO: torch.Tensor, bias_O: torch.Tensor | None, step: StepBuffers, dtype: torch.dtype
    ) -> torch.Tensor:
        """g ∘ sum + h ∘ bias, in `dtype`; `sum_TO` float32."""
        y_TO = torch.empty_like(sum_TO, dtype=dtype)
        config = self._config(y_TO, 0)
        self._launch.launch_sum(
            sum_TO[None], y_TO, bias_O, step, self.slots, self._tiles, config, finish=True, stacked_only=False
        )
        return y_TO

    def stacked_rows(self, segments: Segments, modulates: Sequence[bool]) -> int:
        """Rows of the base product that the step's stacked segments need: of the largest slice, or of opaque rows."""
        rows = [0] * len(self.parts)
        opaque = 0
        for i, slot in enumerate(segments.slots):
            if not modulates[i]:
                tokens = segments.starts[i + 1] - segments.starts[i]
                opaque += tokens * self.slots.opaque_rows(slot)
                rows = [total + tokens * of_slice for total, of_slice in zip(rows, self.slots.rows(slot), strict=True)]
        return opaque if self.weight_OI is None else max(rows)

    def _modulates(self, slot: int, tokens: int) -> bool:
        if self.weight_OI is None:
            return False
        terms = self.slots.terms(slot) or ()
        ranks = [part.rank for part in terms if part is not None and part.a_RI is not None]
        if not ranks:
            return tokens >= PLAIN_TOKENS if self.rule.path == "auto" else self.rule.path == "modulated"
        return any(self.rule.modulates(tokens, rank) for rank in ranks)

    def _config(self, x_TI: torch.Tensor, rows: int) -> LaunchConfig:
        slots = self.slots
        return launch_config(
            x_TI.dtype, slots.max_rank, slots.in_features, self.out_features, rows, slots.is_aligned, **self._machine
        )

    def _budget(self, x_TI: torch.Tensor, step: StepBuffers, row_budget: int, modulated: bool) -> _Plan:
        config = self._config(x_TI, row_budget)
        tiles = -(-x_TI.shape[0] // config.modulated_m) + step.max_segments if modulated else 0
        # Slots may hold any rank when the launches are replayed.
        return _Plan(step, config, row_budget, self.slots.max_rank + 1, tiles)

    def _run(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, plan: _Plan, dtype: torch.dtype, finish: bool = True
    ) -> torch.Tensor:
        y_TO = torch.empty(x_TI.shape[0], self.out_features, dtype=dtype, device=x_TI.device)
        config, rows = plan.config, plan.rows
        around = (plan.step, self.slots, self._tiles, config)
        if self.weight_OI is None:
            expanded_VI = torch.empty(rows, x_TI.shape[1], dtype=x_TI.dtype, device=x_TI.device)
            self._launch.launch_expand(x_TI, expanded_VI, plan.step, self.slots, config)
            self._launch.launch_reduce(self.base(expanded_VI), y_TO, bias_O, *around, finish)
            return y_TO
        if rows and config.split == 1:
            self._launch.launch_stacked(x_TI, self.weight_OI, y_TO, bias_O, *around, rows, plan.most_rows, finish)
        elif rows:
            parts = torch.empty(config.split, *y_TO.shape, dtype=torch.float32, device=x_TI.device)
            self._launch.launch_stacked(x_TI, self.weight_OI, parts, None, *around, rows, plan.most_rows, finish=False)
            self._launch.launch_sum(parts, y_TO, bias_O, *around, finish, stacked_only=True)
        if plan.tiles:
            self._launch.launch_modulated(x_TI, self.weight_OI, y_TO, bias_O, *around, plan.tiles, finish)
        return y_TO

    def _add_low_rank(self, y_TO: torch.Tensor, x_TI: torch.Tensor, segments: Segments) -> None:
        for slot, rows in segments:
            terms = self.slots.terms(slot)
            if not _has_low_rank(terms):
                continue
            assert terms is not None
            rows_N = rows.to(x_TI.device)
            for part, piece in zip(terms, self.parts, strict=True):
                if part is not None and part.down_RI is not None:
                    assert part.up_RO is not None, "checked by the slot table"
                    y_TO[rows_N, piece] += (x_TI[rows_N] @ part.down_RI.T) @ part.up_RO


def _has_low_rank(terms: LayerTerms | None) -> bool:
    return any(part is not None and part.down_RI is not None for part in terms or ())
