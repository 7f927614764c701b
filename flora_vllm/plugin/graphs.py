"""CUDA graphs that hold the op: whether an engine's may, which steps replay them, and the proof that they work here.

`auto`, the default, takes graphs wherever they can be had and says why where not; a number insists on them. Nothing of
this concerns a CPU.
"""

import importlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flora_vllm.errors import ConfigError
from flora_vllm.layers import Adapted
from flora_vllm.ops.gpu.check import why_graphs_wrong
from flora_vllm.plugin.options import FloraOptions
from flora_vllm.step import GraphSteps

logger = logging.getLogger(__name__)

# About the rows up to which reading W takes longer than multiplying it (an H100: 239; roofline, not timed).
FREE_ROWS = 256


def resolve(options: FloraOptions, config: Any) -> FloraOptions:
    """The options with `graph_rows` 0 where `auto` finds that this engine's graphs cannot hold the op.

    Raises ConfigError where a number was given for such an engine.
    """
    is_auto = options.graph_rows == "auto"
    if is_auto and importlib.import_module("vllm.platforms").current_platform.device_type != "cuda":
        return replace(options, graph_rows=0)
    if not options.graph_rows or not (faults := config_faults(config)):
        return options
    if not is_auto:
        raise ConfigError(f"graph_rows (--flora-graph-rows) cannot be used here: {'; '.join(faults)}; leave it out")
    logger.warning("steps with adapter tokens will run without CUDA graphs: %s", "; ".join(faults))
    return replace(options, graph_rows=0)


def config_faults(config: Any) -> list[str]:
    """Why CUDA graphs of this engine cannot hold the op."""
    graph_modes = importlib.import_module("vllm.config").CUDAGraphMode
    breakable = importlib.import_module("vllm.compilation.breakable_cudagraph")
    platform = importlib.import_module("vllm.platforms").current_platform
    found = {
        "the device is not an NVIDIA GPU": platform.device_type != "cuda",
        "CUDA graphs are off (enforce_eager or cudagraph_mode)": (
            config.compilation_config.cudagraph_mode == graph_modes.NONE
            or not config.compilation_config.max_cudagraph_capture_size
        ),
        "an encoder's rows are no tokens": config.model_config.is_encoder_decoder,
        "data parallel ranks must agree on their graphs": config.parallel_config.data_parallel_size > 1,
        "pipeline stages must agree on their graphs": config.parallel_config.pipeline_parallel_size > 1,
        "microbatches run layers on parts of a step": config.parallel_config.use_ubatching,
        "speculative decoding has graphs of its own": config.speculative_config is not None,
        "breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH) replay out of our sight": (
            breakable.is_breakable_cudagraph_enabled()
        ),
    }
    return [fault for fault, holds in found.items() if holds]


def row_budget(options: FloraOptions, largest_graph: int) -> int:
    """Base products that the adapter tokens of a graph's step may need.

    `auto`: a step of the largest graph whose tokens need one each (IA3, FLoRA of rank 1, LoRA, DoRA) always fits, and
    what needs more fits as long as it hides behind reading W. Beyond that a step is better off eager, where long
    segments are modulated.
    """
    return max(FREE_ROWS, largest_graph) if options.graph_rows == "auto" else options.graph_rows


def graph_steps(
    options: FloraOptions,
    layers: Mapping[str, Adapted],
    dtypes: Mapping[str, torch.dtype],
    largest_graph: int,
    slots: int,
    device: torch.device,
) -> GraphSteps | None:
    """What the engine's graphs read of a step, or None if it runs its adapter tokens without graphs.

    Raises ConfigError where a number of rows was given and a layer cannot be captured, or the kernels fail the test.
    """
    if not options.graph_rows:
        return None
    reason = _why_not_captured(layers) or _why_wrong(device, {dtypes[name] for name in layers})
    if reason is None:
        rows = row_budget(options, largest_graph)
        logger.info(
            "CUDA graphs hold the adapters of steps of up to %d base products and %d tokens", rows, largest_graph
        )
        return GraphSteps(rows, largest_graph, slots, device)
    if options.graph_rows != "auto":
        raise ConfigError(f"graph_rows (--flora-graph-rows) cannot be used with this model; leave it out. {reason}")
    logger.error("STEPS WITH ADAPTER TOKENS RUN WITHOUT CUDA GRAPHS, which makes their decoding slower: %s", reason)
    return None


def _why_not_captured(layers: Mapping[str, Adapted]) -> str | None:
    """A graph without a layer's op would leave its adapters out."""
    reasons = {name: layer.why_not_captured() for name, layer in layers.items()}
    faults = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return f"{len(faults)} layers cannot be captured, the first {faults[0]}" if faults else None


def _why_wrong(device: torch.device, dtypes: set[torch.dtype]) -> str | None:
    if device.type != "cuda":
        return None  # a test's engine: there is nothing to capture on
    return next((reason for dtype in dtypes if (reason := why_graphs_wrong(device, dtype)) is not None), None)
