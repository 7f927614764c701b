"""The step: tokens to slots, padding rows, and the guard against a step that ran past the op."""

import pickle

import pytest
import torch

from flora_vllm.batch import Step
from flora_vllm.errors import StepError


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


def test_fewer_rows_than_tokens_raise():
    step = Step()
    step.set_mapping([7, 0, 7], {7: 1})
    with pytest.raises(StepError, match="called with 2 rows in a step of 3 tokens"):
        step.segments_for(2)


def test_rows_that_are_not_tokens_take_no_padding():
    step = Step(may_pad=False)
    step.set_mapping([7, 0, 7], {7: 1})
    assert step.segments_for(3) is step.segments
    with pytest.raises(StepError, match=r"called with 4 rows in a step of 3 tokens.* not the batch's"):
        step.segments_for(4)
    step.set_mapping([0, 0, 0], {7: 1})
    assert step.segments_for(4) is None


def test_rows_without_a_mapping_are_base_rows_only_where_the_whole_step_is():
    step = Step(may_pad=False)
    step.set_mapping([7, 0, 7], {7: 1})
    step.expire(is_base=True)
    assert step.segments_for(3) is None
    step.expire(is_base=False)
    step.verify()
    with pytest.raises(StepError, match="3 rows of which this step never said whose they are"):
        step.segments_for(3)
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
