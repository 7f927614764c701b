"""What the current step asks of the adapted layers: which tokens use which slot, and whether that was honoured.

One `Step` per model. The host sets it before the model runs; the op reads it. It exists because compiled code and
CUDA graphs freeze whatever Python they saw once: the op must look here each time, and a step whose adapter tokens
never reached the op must not have its output used.
"""

from collections.abc import Mapping, Sequence

import torch

from flora_vllm.errors import StepError
from flora_vllm.ops.terms import Segments, group_by_slot


class Step:
    """The tokens of the step that runs now, grouped by slot. `segments` is None if no token uses an adapter."""

    def __init__(self) -> None:
        self.segments: Segments | None = None
        self._served = True
        self._padded: dict[int, Segments] = {}

    def set_mapping(self, adapter_of_token: Sequence[int], slot_of_adapter: Mapping[int, int]) -> None:
        """Token t uses adapter id `adapter_of_token[t]` (0 or less: none), which sits in `slot_of_adapter[id]`.

        An adapter that changes nothing on this rank sits in slot 0: its tokens are base tokens.
        """
        ids_T = torch.as_tensor(adapter_of_token, dtype=torch.int64)
        used = [int(i) for i in torch.unique(ids_T).tolist() if i > 0]
        self._padded.clear()
        if not used:
            self.segments = None
            return
        slot_T = torch.zeros_like(ids_T)
        for adapter_id in used:
            slot_T[ids_T == adapter_id] = slot_of_adapter[adapter_id]
        self.segments = group_by_slot(slot_T) if slot_T.any() else None

    def clear(self) -> None:
        self.segments = None
        self._served = True
        self._padded.clear()

    def begin(self) -> None:
        """A model run starts under the present mapping."""
        self._served = self.segments is None

    def segments_for(self, tokens: int) -> Segments | None:
        """The segments for a layer called with `tokens` rows; rows beyond the mapping are padding without adapter."""
        self._served = True
        segments = self.segments
        if segments is None or segments.tokens == tokens:
            return segments
        if segments.tokens > tokens:
            raise StepError(
                f"an adapted layer was called with {tokens} rows in a step of {segments.tokens} tokens: "
                "this model runs its layers on parts of the batch, which adapters cannot follow"
            )
        if tokens not in self._padded:
            self._padded[tokens] = _pad(segments, tokens)
        return self._padded[tokens]

    def verify(self) -> None:
        """Raises StepError if adapter tokens ran past the op (a replayed graph, a bypassed layer)."""
        if not self._served:
            raise StepError(
                "a step with adapter tokens ran without reaching the adapter op, so its output is the base model's; "
                "it was discarded. Please report this with the model's name and vLLM's start-up log"
            )


def _pad(segments: Segments, tokens: int) -> Segments:
    slot_T = torch.zeros(tokens, dtype=torch.int64)
    for slot, rows in segments:
        slot_T[rows] = slot
    return group_by_slot(slot_T)
