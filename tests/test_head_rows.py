"""Whose the output layer's rows are, call by call; engines are in test_engine_head.py."""

from typing import Any

import pytest
import torch

from flora_vllm.errors import StepError
from flora_vllm.step import Step

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn

# Tokens of requests with adapters 7, none, 8 and 9; 8 leaves the layer alone.
TOKENS = (7, 7, 7, 0, 0, 8, 9, 9)
SLOTS = {7: 2, 8: 0, 9: 1}
HIDDEN = torch.zeros(10, 4)  # with two rows of padding


def rows_with(sampled: tuple[int, ...]) -> Any:
    from flora_vllm.plugin.head import HeadRows

    rows = HeadRows()
    rows.set_mapping(sampled, TOKENS, SLOTS)
    rows.begin()
    return rows


def asked(rows: Any, x: torch.Tensor) -> dict[int, list[int]] | None:
    """Slot -> rows of one call, as the layer's op is told them."""

    def compute(x: torch.Tensor) -> Any:
        if rows.step.segments is None:
            return None
        segments = rows.step.segments_for(len(x))
        return None if segments is None else {slot: found.tolist() for slot, found in segments}

    return rows.logits(compute, x)


def test_sampled_rows_follow_the_mapping_of_samples_with_speculated_ones() -> None:
    rows = rows_with((7, 7, 0, 8, 9))
    assert asked(rows, HIDDEN[[1, 2, 4, 5, 7]]) == {0: [2, 3], 1: [4], 2: [0, 1]}
    rows.step.verify()
    assert rows.step.segments is None, "between calls the layer is the base model's"


def test_rows_of_prompts_are_found_by_where_they_lie_in_the_steps() -> None:
    rows = rows_with((7, 0, 8, 9))
    with rows.of_tokens(HIDDEN):
        assert asked(rows, HIDDEN[1:4]) == {0: [2], 2: [0, 1]}
        assert asked(rows, HIDDEN[3:6]) is None
        assert asked(rows, HIDDEN[:8][5:8]) == {0: [0], 1: [1, 2]}
    assert asked(rows, HIDDEN[[2, 4, 5, 7]]) == {0: [1, 2], 1: [3], 2: [0]}


def test_rows_that_cannot_be_told_are_a_fault() -> None:
    rows = rows_with((7, 0, 8, 9))
    with rows.of_tokens(HIDDEN):
        assert asked(rows, HIDDEN[:3].clone()) is None
    with pytest.raises(StepError, match="adapters cannot follow"):
        rows.step.verify()
    rows.begin()
    assert asked(rows, torch.zeros(5, 4)) is None
    with pytest.raises(StepError, match="adapters cannot follow"):
        rows.step.verify()


def test_a_step_that_never_samples_through_the_layer_is_a_fault() -> None:
    rows = rows_with((7, 0, 8, 9))
    with pytest.raises(StepError, match="output is the base model's"):
        rows.step.verify()
    for sampled in ((0, 0, 8), ()):
        rows_with(sampled).step.verify()


@pytest.mark.parametrize("normalised", [True, False])
def test_a_head_that_is_normalised_when_it_is_read_is_refused(normalised: bool) -> None:
    """Bailing: merged weights would be normalised with the adapter's change in them."""
    from types import SimpleNamespace

    from flora_vllm.plugin import head

    part = SimpleNamespace(num_org_elements=8, org_vocab_start_index=0)
    layer = SimpleNamespace(
        num_embeddings_per_partition=8, num_added_embeddings=0, tp_size=1, org_vocab_size=8, shard_indices=part
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(norm_head=normalised)),
        use_v2_model_runner=False,
        speculative_config=None,
        parallel_config=SimpleNamespace(),
    )
    reason = head._refusal("lm_head", layer, object(), lambda _: Step(may_pad=False), lambda _: True, config)
    assert (reason is not None and "norm_head" in reason) == normalised
