"""The step: tokens to slots, padding rows, and the guard against a step that ran past the op."""

import pickle

import pytest
import torch

from flora_vllm import step as batch
from flora_vllm.errors import StepError
from flora_vllm.step import GraphSteps, Step


def _slots(segments, tokens: int) -> list[int]:
    slot_T = torch.full((tokens,), -1)
    for slot, rows in segments:
        slot_T[rows] = slot
    return slot_T.tolist()


def test_tokens_reach_the_slot_of_their_adapter():
    step = Step()
    step.set_mapping([7, 0, 9, 7, -1], {7: 2, 9: 1, 11: 3})
    assert step.segments is not None
    assert _slots(step.segments, 5) == [2, 0, 1, 2, 0]
    assert step.segments.slots == (0, 1, 2)


def test_a_mapping_without_adapters_has_no_segments():
    step = Step()
    step.set_mapping([7], {7: 1})
    step.set_mapping([0, 0, -1], {7: 1})
    assert step.segments is None
    assert step.segments_for(3) is None
    assert step.segments_for(64) is None


def test_an_adapter_without_a_slot_is_an_error():
    with pytest.raises(KeyError):
        Step().set_mapping([7], {})


def test_rows_beyond_the_mapping_are_padding_without_adapter():
    step = Step()
    step.set_mapping([7, 0, 7], {7: 1})
    for tokens in (3, 4, 8):
        segments = step.segments_for(tokens)
        assert segments is not None
        assert _slots(segments, tokens) == [1, 0, 1] + [0] * (tokens - 3)


def test_padding_of_one_step_is_not_kept_for_the_next():
    step = Step()
    step.set_mapping([7, 7], {7: 1})
    step.segments_for(4)
    step.set_mapping([0, 7], {7: 1})
    segments = step.segments_for(4)
    assert segments is not None
    assert _slots(segments, 4) == [0, 1, 0, 0]


def test_fewer_rows_than_tokens_are_base_rows_and_a_fault():
    step = Step()
    step.set_mapping([7, 0, 7], {7: 1})
    step.begin()
    assert step.segments_for(2) is None
    step.segments_for(3)
    with pytest.raises(StepError, match="called with 2 rows in a step of 3 tokens"):
        step.verify()
    step.verify()
    step.begin()
    step.segments_for(3)
    step.verify()


def test_the_first_fault_of_a_run_is_told_once_and_the_next_run_starts_without():
    step = Step()
    step.set_mapping([7, 0, 7], {7: 1})
    step.begin()
    step.segments_for(1)
    step.segments_for(2)
    fault = step.take_fault()
    assert fault is not None
    assert "called with 1 rows" in fault
    assert step.take_fault() is None
    step.begin()
    step.segments_for(1)
    step.begin()
    step.segments_for(3)
    assert step.take_fault() is None


def test_rows_that_are_not_tokens_take_no_padding():
    step = Step(may_pad=False)
    step.set_mapping([7, 0, 7], {7: 1})
    assert step.segments_for(3) is step.segments
    assert step.segments_for(4) is None
    with pytest.raises(StepError, match=r"called with 4 rows in a step of 3 tokens.* not the batch's"):
        step.verify()
    step.set_mapping([0, 0, 0], {7: 1})
    assert step.segments_for(4) is None


def test_rows_without_a_mapping_are_base_rows_only_where_the_whole_step_is():
    step = Step(may_pad=False)
    step.set_mapping([7, 0, 7], {7: 1})
    step.expire(is_base=True)
    assert step.segments_for(3) is None
    step.expire(is_base=False)
    step.verify()
    assert step.segments_for(3) is None
    with pytest.raises(StepError, match="3 rows of which this step never said whose they are"):
        step.verify()
    step.set_mapping([7, 7], {7: 1})
    assert step.segments_for(2) is step.segments
    step.expire(is_base=False)
    step.clear()
    assert step.segments_for(3) is None


def test_a_step_with_adapter_tokens_that_never_reached_the_op_raises():
    step = Step()
    step.set_mapping([7], {7: 1})
    step.begin()
    with pytest.raises(StepError, match="output is the base model's"):
        step.verify()
    step.segments_for(1)
    step.verify()


def test_a_step_without_adapters_needs_no_op_and_each_run_is_judged_anew():
    step = Step()
    step.set_mapping([0], {})
    step.begin()
    step.verify()
    step.set_mapping([7], {7: 1})
    step.begin()
    step.segments_for(1)
    step.verify()
    step.begin()
    with pytest.raises(StepError):
        step.verify()
    step.clear()
    step.verify()


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(StepError("step")))
    assert isinstance(error, StepError)
    assert str(error) == "step"


def _graph_step(monkeypatch, *captured: int) -> Step:
    """A step of an engine whose graphs of so many rows hold the op."""
    step = Step()
    step.graphs = GraphSteps(row_budget=10, max_tokens=8, slots=3, device=torch.device("cpu"))
    monkeypatch.setattr(batch, "is_capturing", lambda _: True)
    for tokens in captured:
        step.rehearse(tokens)
        form = step.captured_form(tokens)
        assert form is not None
        form.note_launches(tokens)
    step.clear()
    return step


def _written(step: Step) -> list[int]:
    """The slot of each row, as captured launches would read it now."""
    assert step.graphs is not None
    buffers = step.graphs.buffers
    segments = buffers.segments[: int(buffers.counts[0])].tolist()
    rows = sum(size for _, _, size in segments)
    slot_T = torch.full((rows,), -1, dtype=torch.int32)
    for slot, start, size in segments:
        slot_T[buffers.tokens[start : start + size].long()] = slot
    assert sorted(slot for slot, _, _ in segments) == sorted(set(slot_T.tolist()))
    return slot_T.tolist()


def test_only_a_rehearsal_takes_the_captured_form(monkeypatch):
    step = _graph_step(monkeypatch)
    step.rehearse(4)
    assert step.captured_form(4) is step.graphs
    assert _written(step) == [0, 0, 0, 0]
    assert step.captured_form(3) is None
    step.set_mapping([7, 0, 7, 0], {7: 1})
    assert step.captured_form(4) is None
    step.rehearse(9)  # larger than any graph
    assert step.captured_form(9) is None
    assert Step().captured_form(4) is None


def test_a_replay_reads_the_step_padded_with_base_rows_from_where_it_always_was(monkeypatch):
    step = _graph_step(monkeypatch, 4, 8)
    assert step.graphs is not None
    addresses = [view.data_ptr() for view in (step.graphs.buffers.counts, step.graphs.buffers.tokens)]
    for mapping, tokens, slots in (
        ([7, 0, 9], 4, [2, 0, 1, 0]),
        ([9, 9, 9, 7], 4, [1, 1, 1, 2]),
        ([7], 8, [2] + [0] * 7),
        ([0, 0], 4, [0] * 4),
    ):
        step.set_mapping(mapping, {7: 2, 9: 1})
        step.begin()
        step.replay(tokens)
        assert _written(step) == slots
        step.verify()
    assert [view.data_ptr() for view in (step.graphs.buffers.counts, step.graphs.buffers.tokens)] == addresses


def test_a_replay_serves_only_with_the_op_in_its_graph(monkeypatch):
    step = _graph_step(monkeypatch, 4)
    for tokens in (2, 8):
        step.set_mapping([7, 7], {7: 1})
        step.begin()
        step.replay(tokens)
        with pytest.raises(StepError, match="base model's"):
            step.verify()
    plain = Step()
    plain.set_mapping([7, 7], {7: 1})
    plain.begin()
    plain.replay(4)
    with pytest.raises(StepError, match="base model's"):
        plain.verify()


def test_each_run_writes_its_step_once_however_many_pieces_replay(monkeypatch):
    step = _graph_step(monkeypatch, 4)
    writes = []
    assert step.graphs is not None
    monkeypatch.setattr(step.graphs, "write", writes.append)
    for _ in range(2):
        step.set_mapping([7, 7], {7: 1})
        step.begin()
        for _ in range(3):
            step.replay(4)
    assert len(writes) == 2


def test_a_mapping_that_is_too_long_for_the_graph_is_not_served_by_it(monkeypatch):
    """Left by the step before: the run has no requests, its rows are base rows."""
    step = _graph_step(monkeypatch, 2)
    step.set_mapping([7, 7, 7], {7: 1})
    step.begin()
    step.replay(2)
    assert _written(step) == [0, 0]
    with pytest.raises(StepError, match="base model's"):
        step.verify()


def test_adapters_that_change_nothing_make_a_base_step():
    step = Step()
    step.set_mapping([7, 0], {7: 0})
    assert step.segments is None
    step.begin()
    step.verify()
