"""A step as the Triton kernels read it: device buffers at fixed addresses, shared by all layers.

Everything the kernels need of a step is written here by one copy, so a captured CUDA graph follows `fill`. What
depends on a layer (ranks, addresses) is in that layer's slot table instead.
"""

import weakref
from collections.abc import Iterator, Sequence

import torch

from flora_vllm.errors import ConfigError, StepError
from flora_vllm.ops.terms import Segments


class StepBuffers:
    """Segments on the device: the stacked ones first, then the modulated ones.

    Written in place by `fill`, all int32 views of one buffer: counts (4,) [stacked segments, modulated segments,
    stacked tokens, all tokens], stacked and modulated (max_segments, 3) [slot, first list position, tokens], tokens
    (max_tokens,) rows of x by list position, token_slots (max_tokens,) their slots.
    """

    def __init__(self, max_tokens: int, max_segments: int, device: torch.device) -> None:
        if max_tokens < 1 or max_segments < 1:
            raise ConfigError(f"a step needs room for a token and a segment, not {max_tokens} and {max_segments}")
        self.max_tokens = max_tokens
        self.max_segments = max_segments
        self._flat = torch.zeros(4 + 6 * max_segments + 2 * max_tokens, dtype=torch.int32, device=device)
        sizes = (4, 3 * max_segments, 3 * max_segments, max_tokens, max_tokens)
        self.counts, stacked, modulated, self.tokens, self.token_slots = self._flat.split(sizes)
        self.stacked = stacked.view(max_segments, 3)
        self.modulated = modulated.view(max_segments, 3)

    @property
    def device(self) -> torch.device:
        return self._flat.device

    def fill(self, segments: Segments, modulates: Sequence[bool]) -> None:
        """Make these the buffers of a step; `modulates[i]` says how segment i is computed.

        Rows of x that are in no segment get no output: give padding rows slot 0. Raises ConfigError if the step does
        not fit, StepError inside a CUDA graph's capture, which would keep this step's numbers for ever.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise StepError("a step was written while a CUDA graph is captured; write it before the graph's replay")
        if segments.tokens > self.max_tokens or len(segments.slots) > self.max_segments:
            raise ConfigError(
                f"a step of {segments.tokens} tokens in {len(segments.slots)} segments does not fit buffers for "
                f"{self.max_tokens} tokens in {self.max_segments} segments"
            )
        host = torch.zeros(self._flat.shape, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        sizes = (4, 3 * self.max_segments, 3 * self.max_segments, self.max_tokens, self.max_tokens)
        counts, stacked, modulated, tokens, token_slots = host.split(sizes)
        filled = [0, 0]
        for i, (first, last) in self.positions(segments, modulates):
            slot, kind = segments.slots[i], int(modulates[i])
            table, place = (stacked, modulated)[kind], 3 * filled[kind]
            table[place : place + 3] = torch.tensor([slot, first, last - first])
            tokens[first:last] = segments.rows_T[segments.starts[i] : segments.starts[i + 1]]
            token_slots[first:last] = slot
            filled[kind] += 1
            if not kind:
                counts[2] = last
        counts[:2] = torch.tensor(filled)
        counts[3] = segments.tokens
        self._flat.copy_(host, non_blocking=True)

    @staticmethod
    def positions(segments: Segments, modulates: Sequence[bool]) -> Iterator[tuple[int, tuple[int, int]]]:
        """(index, list positions) of each segment that has tokens, in the order of the list."""
        assert len(modulates) == len(segments.slots), f"{len(modulates)} ways for {len(segments.slots)} segments"
        position = 0
        for kind in (False, True):
            for i, of_kind in enumerate(modulates):
                tokens = segments.starts[i + 1] - segments.starts[i]
                if of_kind == kind and tokens:
                    yield i, (position, position + tokens)
                    position += tokens


class DeviceSteps:
    """Buffers of the steps whose segments are alive: layers that decide alike share one copy to the device."""

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[Segments, dict[tuple, StepBuffers]] = weakref.WeakKeyDictionary()

    def get(self, segments: Segments, modulates: tuple[bool, ...], device: torch.device) -> StepBuffers:
        """The buffers of a step with at least one token, filled on first use."""
        of_step = self._steps.setdefault(segments, {})
        step = of_step.get((modulates, device))
        if step is None:
            step = of_step[modulates, device] = StepBuffers(segments.tokens, len(segments.slots), device)
            step.fill(segments, modulates)
        return step
