"""A step as the Triton kernels read it: device buffers at fixed addresses, shared by all layers.

Everything the kernels need of a step is written here by one copy, so a captured CUDA graph follows `fill`. What
depends on a layer (ranks, addresses, which segments are modulated) is in that layer's slot table instead.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from flora_vllm.errors import ConfigError, StepError
from flora_vllm.ops.terms import Segments


class StepBuffers:
    """A step's segments on the device, and what its launches are sized by on the host.

    Written in place by `fill`, all int32 views of one buffer: counts (1,) segments, segments (max_segments, 3) [slot,
    first list position, tokens], tokens (max_tokens,) rows of x by list position. On the host: `slots` and `sizes` by
    segment (int64 arrays), `slot_bits` with bit s set where slot s has tokens, and `counted`: what a layer counted of
    this step, kept for the layers that count the same.
    """

    def __init__(self, max_tokens: int, max_segments: int, device: torch.device) -> None:
        if max_tokens < 1 or max_segments < 1:
            raise ConfigError(f"a step needs room for a token and a segment, not {max_tokens} and {max_segments}")
        self.max_tokens = max_tokens
        self.max_segments = max_segments
        self.device = device
        # Segments start at a multiple of 16 bytes, and so do the tokens.
        self._places = (4, 4 + -(-3 * max_segments // 4) * 4)
        self._flat = torch.zeros(self._places[1] + max_tokens, dtype=torch.int32, device=device)
        self.counts = self._flat[:1]
        self.segments = self._flat[4 : 4 + 3 * max_segments].view(max_segments, 3)
        self.tokens = self._flat[self._places[1] :]
        self.slots = self.sizes = np.zeros(0, dtype=np.int64)
        self.slot_bits = 0
        self.counted: dict[tuple, Any] = {}

    def fill(self, segments: Segments) -> None:
        """Make these the buffers of a step.

        Rows of x that are in no segment get no output: give padding rows slot 0. Raises ConfigError if the step does
        not fit, StepError inside a CUDA graph's capture, which would keep this step's numbers for ever.
        """
        on_gpu = self.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise StepError("a step was written while a CUDA graph is captured; write it before the graph's replay")
        count = len(segments.slots)
        if segments.tokens > self.max_tokens or count > self.max_segments:
            raise ConfigError(
                f"a step of {segments.tokens} tokens in {count} segments does not fit buffers for "
                f"{self.max_tokens} tokens in {self.max_segments} segments"
            )
        first, last = self._places
        host = torch.empty(last + segments.tokens, dtype=torch.int32, pin_memory=on_gpu)
        flat = host.numpy()
        starts = np.array(segments.starts, dtype=np.int64)
        self.slots, self.sizes = np.array(segments.slots, dtype=np.int64), np.diff(starts)
        table = flat[first : first + 3 * count].reshape(count, 3)
        flat[:first] = count
        table[:, 0], table[:, 1], table[:, 2] = self.slots, starts[:-1], self.sizes
        flat[first + 3 * count : last] = 0
        host[last:] = segments.rows_T
        self._flat[: len(flat)].copy_(host, non_blocking=True)
        self.slot_bits = slot_bits(segments.slots)
        self.counted.clear()


def slot_bits(slots: Iterable[int]) -> int:
    """One number that says which slots are among these."""
    bits = 0
    for slot in slots:
        bits |= 1 << slot
    return bits


class DeviceSteps:
    """Buffers of the steps whose segments are alive: one copy to the device serves every layer."""

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Segments, dict[torch.device, StepBuffers]] = weakref.WeakKeyDictionary()
        # One layer after another asks for the same.
        self._last: weakref.ref[Segments] | None = None
        self._last_step: StepBuffers | None = None

    def get(self, segments: Segments, device: torch.device) -> StepBuffers:
        """The buffers of a step with at least one token, filled on first use."""
        last = self._last_step
        if last is not None and last.device == device and self._last is not None and self._last() is segments:
            return last
        of_step = self._steps.setdefault(segments, {})
        step = of_step.get(device)
        if step is None:
            step = of_step[device] = StepBuffers(segments.tokens, len(segments.slots), device)
            step.fill(segments)
        self._last, self._last_step = weakref.ref(segments), step
        return step
