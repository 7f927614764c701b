"""FLORA_TUNE=1: launch parameters timed on the device at hand when an engine starts, once for each layer shape.

`config` chooses by arithmetic; here its choice and a handful of neighbours are timed on the layer's own W, and the
fastest is kept for the next start. What does not run, or computes something else than the first, is left out.
"""

import importlib
import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from flora_vllm.ops import measured
from flora_vllm.ops.gpu.check import TOLERANCE, launch_errors
from flora_vllm.ops.gpu.config import (
    ModulatedConfig,
    StackedConfig,
    Tuned,
    modulated_neighbours,
    stacked_neighbours,
)
from flora_vllm.ops.gpu.linear import TritonLinear, is_tuning
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.terms import SliceTerms, group_by_slot

logger = logging.getLogger(__name__)

# Stacked rows of the steps that are timed, and tokens of a modulated segment.
ROWS = (16, 64, 256, 1024)
TOKENS = 512

Config = TypeVar("Config", StackedConfig, ModulatedConfig)
Call = Callable[[], torch.Tensor]
Timer = Callable[[Call], float]


def tune(kernel: TritonLinear, timer: Timer | None = None) -> None:
    """Launch a new layer, whose slots are still empty, with the fastest parameters for its shape, if FLORA_TUNE=1.

    `timer`: seconds of a call; left out, the device's time from cold caches.
    """
    if not is_tuning():
        return
    slots = kernel.slots
    key = {
        "method": 1,  # of _measure; another is another key
        "device": measured.device_name(slots.device),
        "in_features": slots.in_features,
        "out_features": sum(slots.sizes),
        "is_aligned": slots.is_aligned,
        "dtype": str(kernel.dtype),
        "rank": slots.limits.rank,
        "low_rank": slots.limits.low_rank,
        "path": slots.rule.path,
        "triton": importlib.metadata.version("triton"),
    }
    tuned = _read(measured.read("tuned", key))
    if tuned is None:
        tuned = _measure(kernel, timer or _device_seconds)
        stacked = {str(rows): asdict(config) for rows, config in tuned.stacked.items()}
        measured.write("tuned", key, {"stacked": stacked, "modulated": tuned.modulated and asdict(tuned.modulated)})
    kernel.launch_with(tuned)


def _read(stored: dict[str, Any] | None) -> Tuned | None:
    if stored is None:
        return None
    try:
        stacked = {int(rows): StackedConfig(**config) for rows, config in stored["stacked"].items()}
        return Tuned(stacked, stored["modulated"] and ModulatedConfig(**stored["modulated"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        # A file that another program wrote only costs a new measurement.
        return None


@torch.inference_mode()
def _measure(kernel: TritonLinear, timer: Timer) -> Tuned:
    slots, limits = kernel.slots, kernel.slots.limits
    used = range(1, min(limits.slots, 32) + 1)
    like = {"dtype": kernel.dtype, "device": slots.device}
    for slot in used:
        a_RI = torch.randn(limits.rank, slots.in_features, **like)
        kernel.write_slot(
            slot, tuple(SliceTerms(a_RI=a_RI, b_RO=torch.randn(limits.rank, o, **like)) for o in slots.sizes)
        )
    x_TI = torch.randn(max(TOKENS, max(ROWS) // limits.rank), slots.in_features, **like)
    most_rows = limits.rank + 1
    stacked = {}
    for rows in ROWS:
        tokens = max(rows // limits.rank, 1)
        step = StepBuffers(tokens, len(used) + 1, slots.device)
        step.fill(group_by_slot(torch.arange(tokens) % len(used) + 1))

        def of_graph(config: StackedConfig, rows: int = rows, step: StepBuffers = step, tokens: int = tokens) -> Call:
            kernel.launch_with(Tuned({rows: config}))
            return lambda: kernel.graph_form(x_TI[:tokens], None, step, rows)

        first = kernel.stacked_with(rows, most_rows)
        others = stacked_neighbours(first, rows, most_rows, slots.in_features)
        stacked[rows] = _fastest(f"{rows} stacked rows", first, others, of_graph, timer)
        kernel.launch_with(Tuned())
    modulated = None
    if slots.modulate_from[1] <= TOKENS:
        segments = group_by_slot([1] * TOKENS)

        def of_segment(config: ModulatedConfig) -> Call:
            kernel.launch_with(Tuned(modulated=config))
            return lambda: kernel.forward(x_TI[:TOKENS], None, segments)

        first = kernel.modulated_with
        modulated = _fastest("a long segment", first, modulated_neighbours(first), of_segment, timer)
    for slot in used:
        kernel.write_slot(slot, None)
    return Tuned(stacked, modulated)


def _fastest(
    what: str, first: Config, others: Sequence[Config], call_with: Callable[[Config], Call], timer: Timer
) -> Config:
    wanted_TO = call_with(first)().float()
    allowed = TOLERANCE[call_with(first)().dtype] * wanted_TO.square().mean().sqrt()
    times = {first: math.inf}
    for config in (first, *others):
        try:
            call = call_with(config)
            error = (call().float() - wanted_TO).abs().max()
            # Not >: a NaN is an error too.
            if not error <= allowed:
                logger.error("%s: %s computes something else on this GPU, by %.2g; left out", what, config, error)
                continue
            times[config] = timer(call)
        except launch_errors() as error:
            logger.info("%s: %s does not run on this GPU (%s)", what, config, error)
    best = min(times, key=lambda config: times[config])
    logger.info(
        "%s: of %d, %s in %.1f µs, at first %.1f", what, len(times), best, times[best] * 1e6, times[first] * 1e6
    )
    return best


def _device_seconds(call: Call) -> float:
    """Time of the device for a call from cold caches; of this thread where Triton interprets."""
    if call().device.type == "cuda":
        return importlib.import_module("triton.testing").do_bench(call, warmup=5, rep=25, return_mode="median") / 1e3
    start = time.thread_time()
    call()
    return time.thread_time() - start
