"""What the current step asks of the adapted layers: which tokens use which slot, and whether that was honoured.

One `Step` per row space: a model's tokens and, where it has an encoder, the encoder's rows. The host sets it before
the model runs; the op reads it. It exists because compiled code and CUDA graphs freeze whatever Python they saw once:
the op must look here each time, and a step whose adapter tokens never reached the op must not have its output used.
A graph may hold the op in its captured form, which reads the step from `GraphSteps`' buffers; the host writes them
before each replay, and a replay counts only if the graph is known to hold the op.
"""

import ctypes
from collections.abc import Mapping, Sequence

import torch

from flora_vllm.errors import StepError
from flora_vllm.ops.gpu.step import StepBuffers
from flora_vllm.ops.terms import Segments, group_by_slot


class GraphSteps:
    """The step as captured launches read it, and which graphs hold such launches.

    row_budget: base products that a step's adapter tokens may need for it to replay a graph. The launches are sized by
    it; a step beyond it would be slower, not wrong. max_tokens: rows of the largest graph. slots: beside slot 0.
    """

    def __init__(self, row_budget: int, max_tokens: int, slots: int, device: torch.device) -> None:
        self.row_budget = row_budget
        self.buffers = StepBuffers(max_tokens, slots + 1, device)
        self.captured: set[int] = set()  # rows of the graphs that hold the op

    def rows(self, tokens: int) -> int:
        """Stacked rows that a graph of `tokens` rows is sized for: one for each base token beside the budget."""
        return tokens + self.row_budget

    def write(self, segments: Segments) -> None:
        """Captured launches serve this step from now on; it has a segment for every row of the graph."""
        self.buffers.fill(segments)

    def note_launches(self, tokens: int) -> None:
        """The op has just launched its captured form on `tokens` rows."""
        if is_capturing(self.buffers.device):
            self.captured.add(tokens)

    def serves(self, tokens: int) -> bool:
        """Whether some graph that holds the op has room for a step of so many tokens."""
        return tokens <= max(self.captured, default=0)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class StepWords(ctypes.Structure):
    """What compiled code reads of a `Step` (StepWords of ops/cpu/csrc/torch_op.cpp), and `served`, which it sets.

    known: 0 if a layer must not run. segments: address of `Segments.packed`, of `tokens` rows; 0: no adapter.
    """

    _fields_ = tuple((name, ctypes.c_int64) for name in ("known", "served", "tokens", "segments"))


class Step:
    """The tokens of the step that runs now, grouped by slot. `segments` is None if no token uses an adapter.

    `graphs`: set for engines whose CUDA graphs are captured with the op.

    `may_pad`: layers may be called with more rows than there are tokens; where not, the numbers must agree.
    """

    def __init__(self, *, may_pad: bool = True) -> None:
        self.words = StepWords(known=1, served=1)
        self._segments: Segments | None = None
        self._may_pad = may_pad
        self.graphs: GraphSteps | None = None
        self._padded: dict[int, Segments] = {}
        self._slot_of_all = 0
        self._rehearsed_tokens: int | None = None
        self._written_tokens: int | None = None
        self._fault: str | None = None

    @property
    def segments(self) -> Segments | None:
        return self._segments

    @segments.setter
    def segments(self, segments: Segments | None) -> None:
        self._segments = segments
        self.words.segments = 0 if segments is None else segments.packed.data_ptr()
        self.words.tokens = 0 if segments is None else segments.tokens

    def set_mapping(self, adapter_of_token: Sequence[int], slot_of_adapter: Mapping[int, int]) -> None:
        """Token t uses adapter id `adapter_of_token[t]` (0 or less: none), which sits in `slot_of_adapter[id]`.

        An adapter that changes nothing on this rank sits in slot 0: its tokens are base tokens.
        """
        slot_T = slots_of(adapter_of_token, slot_of_adapter)
        self._forget()
        self.words.known = 1
        self.segments = group_by_slot(slot_T) if slot_T.any() else None

    def use_for_all(self, slot: int) -> None:
        """Every row of what runs next uses `slot` (0: none), however many there are, until the step ends or goes on to
        something else. Not every run has such rows: that none came is no fault."""
        self._forget()
        self._slot_of_all = slot
        # Compiled code reads segments of a known number of rows.
        self.words.known = slot == 0
        self.words.served = 1

    def rehearse(self, tokens: int) -> None:
        """The next run stands for steps with adapters (a graph's capture, or what comes before): all rows base rows.

        The op takes its captured form in it, if this engine's graphs are to hold the op and are that large.
        """
        self.clear()
        if self.graphs is not None and 0 < tokens <= self.graphs.buffers.max_tokens:
            self.graphs.write(_base_rows(tokens))
            self._rehearsed_tokens = tokens

    def clear(self) -> None:
        self._forget()
        self._fault = None
        self.words.known = self.words.served = 1

    def _forget(self) -> None:
        self.segments = None
        self._padded.clear()
        self._slot_of_all = 0
        self._rehearsed_tokens = self._written_tokens = None

    def expire(self, *, is_base: bool) -> None:
        """A step begins that may set no mapping of these rows. Until it does they are base rows if nothing in the
        step uses an adapter (`is_base`), and otherwise a layer that is called with them raises."""
        self.clear()
        self.words.known = is_base

    def begin(self) -> None:
        """A model run starts under the present mapping."""
        self._fault = None
        self.words.served = self.segments is None
        self._written_tokens = None

    def captured_form(self, tokens: int) -> GraphSteps | None:
        """What a layer called with `tokens` rows launches its captured form on; None in every ordinary run."""
        return self.graphs if tokens == self._rehearsed_tokens else None

    def replay(self, tokens: int) -> None:
        """A graph of `tokens` rows that was captured in a rehearsal replays next (once for each piece of such a graph).

        Without the op in it nothing is noted, and `verify` then refuses the output of adapter tokens.
        """
        if self.graphs is None or tokens not in self.graphs.captured or tokens == self._written_tokens:
            return
        # A run of no requests (warm-up) brings no mapping of its own, and the last step's may be too long for it.
        is_this_steps = self.segments is None or self.segments.tokens <= tokens
        segments = self._padded_to(tokens) if is_this_steps else None
        self.graphs.write(_base_rows(tokens) if segments is None else segments)
        self._written_tokens = tokens
        self.words.served = self.words.served or is_this_steps

    def segments_for(self, tokens: int, *, serves: bool = True) -> Segments | None:
        """The segments for a layer called with `tokens` rows; rows beyond the mapping are padding without adapter.

        `serves`: the call shows that the step reached the adapters' layers.

        Where it is not known whose the rows are they are base rows, and `take_fault` says so: to raise in the middle of
        a run would end the engine, where the step's requests with an adapter are all that must fail.
        """
        if self._slot_of_all:
            if tokens not in self._padded:
                self._padded[tokens] = group_by_slot(torch.full((tokens,), self._slot_of_all))
            return self._padded[tokens]
        if not self.words.known:
            return self._fail(
                f"an adapted layer was called with {tokens} rows of which this step never said whose they are; "
                "adapters cannot follow. Please report this with the model's name"
            )
        if serves:
            self.words.served = 1
        segments = self._segments
        if segments is None or segments.tokens == tokens:
            return segments
        if segments.tokens > tokens or not self._may_pad:
            which = "parts of the batch" if segments.tokens > tokens else "rows that are not the batch's"
            return self._fail(
                f"an adapted layer was called with {tokens} rows in a step of {segments.tokens} tokens: "
                f"this model runs its layers on {which}, which adapters cannot follow"
            )
        return self._padded_to(tokens)

    def _fail(self, fault: str) -> None:
        self._fault = self._fault or fault

    def _padded_to(self, tokens: int) -> Segments | None:
        if self.segments is None or self.segments.tokens == tokens:
            return self.segments
        if tokens not in self._padded:
            self._padded[tokens] = _pad(self.segments, tokens)
        return self._padded[tokens]

    def take_fault(self) -> str | None:
        """Why the run that has just ended did not serve its adapter tokens (a replayed graph, a bypassed layer, rows of
        nobody known), so that their output must not be used; None if it did. It is told once."""
        fault, self._fault = self._fault, None
        if fault is None and not self.words.served:
            fault = (
                "a step with adapter tokens ran without reaching the adapter op, so its output is the base model's; "
                "it was discarded. Please report this with the model's name and vLLM's start-up log"
            )
        self.words.served = 1
        return fault

    def verify(self) -> None:
        """Raises StepError with the fault, if there is one to take."""
        if (fault := self.take_fault()) is not None:
            raise StepError(fault)


def slots_of(adapter_of_row: Sequence[int], slot_of_adapter: Mapping[int, int]) -> torch.Tensor:
    """(rows,) int64: the slot of each row's adapter, 0 where its id is 0 or less."""
    ids_T = torch.as_tensor(adapter_of_row, dtype=torch.int64)
    slot_T = torch.zeros_like(ids_T)
    for adapter_id in torch.unique(ids_T).tolist():
        if adapter_id > 0:
            slot_T[ids_T == adapter_id] = slot_of_adapter[adapter_id]
    return slot_T


def _base_rows(tokens: int) -> Segments:
    return group_by_slot(torch.zeros(tokens, dtype=torch.int64))


def _pad(segments: Segments, tokens: int) -> Segments:
    slot_T = torch.zeros(tokens, dtype=torch.int64)
    for slot, rows in segments:
        slot_T[rows] = slot
    return group_by_slot(slot_T)
