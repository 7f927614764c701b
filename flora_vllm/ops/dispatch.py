"""Which of two exact ways a segment's Hadamard terms are computed, and what a step costs in rows of the base product.

Stacked: the token's r scaled copies go through the unchanged W (r rows per token). Modulated: W ∘ (Bᵀ A) is formed
once per segment, tile by tile, and costs about `constant + slope * r` rows whatever the number of tokens.
The constants belong to an implementation, a layer shape, a thread count and a machine, so they are measured
(`calibrate`) rather than written down; the defaults below are what a Zen 4 core measures in bfloat16.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from flora_vllm.errors import ConfigError
from flora_vllm.ops import measured
from flora_vllm.ops.paths import PATHS, PathChoice
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms, group_by_slot

NEVER = 2**62  # tokens; no step has so many

# What a measurement needs of a kernel's slots.
SLOTS_MEASURED, RANKS_MEASURED = 16, 16


@dataclass(frozen=True)
class DispatchRule:
    """Stack or modulate: `path="auto"` takes the cheaper by the rows model, the others force one way for every rank.

    A forced path makes a token's arithmetic independent of what else is in the step (batch invariance).
    Raises ConfigError for an unknown path or negative constants.
    """

    path: PathChoice = "auto"
    constant: float = 4.0  # rows
    slope: float = 0.95  # rows per rank

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ConfigError(f"flora path {self.path!r} is unknown; use one of {', '.join(PATHS)}")
        if self.constant < 0 or self.slope < 0:
            raise ConfigError(f"dispatch constants must not be negative: {self.constant}, {self.slope}")

    def modulate_from(self, products: int, scaled: int) -> int:
        """Tokens from which a segment with `products` base products per token, `scaled` of them with factors, takes
        the modulated path; NEVER if none does.

        Stacked costs tokens * products rows, modulated tokens + constant + slope * products.
        """
        if self.path == "stacked" or scaled == 0:
            return NEVER
        if self.path == "modulated":
            return 0
        if products <= 1:
            return NEVER
        return math.floor((self.constant + self.slope * products) / (products - 1)) + 1


class Adaptable(Protocol):
    """What calibration needs of a kernel object (see `table.LinearKernel`)."""

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None: ...

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor: ...


def calibrate(
    make: Callable[[torch.Tensor, DispatchRule], Adaptable],
    implementation: str,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    path: PathChoice = "auto",
) -> DispatchRule:
    """The rule with constants measured for one layer shape (half a second), or read from the user's cache.

    `make(weight_OI, rule)` builds the kernel to be measured; `implementation` names it, with its build, in the key.
    """
    key = {
        "implementation": implementation,
        "method": 2,  # of _measure; another is another key
        "in_features": in_features,
        "out_features": out_features,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "device": measured.device_name(device),
        "torch": torch.__version__,
    }
    known = _constants(measured.read("dispatch", key))
    if known is None:
        weight_OI = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
        known = _measure(make, weight_OI.to(device, dtype))
        measured.write("dispatch", key, dict(zip(("constant", "slope"), known, strict=True)))
    return DispatchRule(path, *known)


def _measure(make: Callable[[torch.Tensor, DispatchRule], Adaptable], weight_OI: torch.Tensor) -> tuple[float, float]:
    """(constant, slope) from four timings: the base at two sizes gives a row's cost, two ranks give the line c(r).

    Modulation is timed on eight segments of four tokens, the size at which the rule has to choose; one long segment
    would hide part of the cost behind reading W. A GPU reads W for free up to a few hundred rows: there, of sixty-four.
    """
    out_features, in_features = weight_OI.shape
    groups, few, many = (8, 512, 2048) if weight_OI.is_cuda else (8, 32, 160)
    low, high = 2, RANKS_MEASURED
    assert 2 * groups == SLOTS_MEASURED, "a slot for each group and rank"
    kernel = make(weight_OI, DispatchRule("modulated"))
    for slot in range(1, 2 * groups + 1):
        rank = low if slot <= groups else high
        a_RI = torch.randn(rank, in_features).to(weight_OI)
        b_RO = torch.randn(rank, out_features).to(weight_OI)
        kernel.write_slot(slot, (SliceTerms(a_RI=a_RI, b_RO=b_RO),))
    x_TI = torch.randn(many, in_features).to(weight_OI)
    group_T = torch.arange(few) % groups + 1
    steps = {
        "few": (x_TI[:few], None),
        "many": (x_TI, None),
        "low": (x_TI[:few], group_by_slot(group_T)),
        "high": (x_TI[:few], group_by_slot(group_T + groups)),
    }
    best = _best_times(kernel, steps, seconds=0.3)
    row_s = max((best["many"] - best["few"]) / (many - few), 1e-12)
    at_low, at_high = ((best[name] - best["few"]) / groups / row_s for name in ("low", "high"))
    slope = min(max((at_high - at_low) / (high - low), 0.0), 50.0)
    return min(max(at_low - slope * low, 0.0), 1000.0), slope


def _best_times(
    kernel: Adaptable, steps: dict[str, tuple[torch.Tensor, Segments | None]], seconds: float
) -> dict[str, float]:
    """Shortest time of each step, interleaved: a busy machine only ever makes a timing longer."""
    on_gpu = next(iter(steps.values()))[0].is_cuda
    # A thread's own time where one thread does it all: it does not run while others do.
    clock = time.thread_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    best = dict.fromkeys(steps, float("inf"))
    deadline = time.perf_counter() + seconds
    for turn in range(100):
        for name, (x_TI, segments) in steps.items():
            start = clock()
            kernel.forward(x_TI, None, segments)
            if on_gpu:
                torch.cuda.synchronize()
            # The first turn fills caches and scratch.
            if turn:
                best[name] = min(best[name], clock() - start)
        if turn and time.perf_counter() > deadline:
            break
    return best


def _constants(stored: dict | None) -> tuple[float, float] | None:
    try:
        return None if stored is None else (float(stored["constant"]), float(stored["slope"]))
    except (ValueError, KeyError, TypeError):
        # A file that another program wrote only costs a new measurement.
        return None
