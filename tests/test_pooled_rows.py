"""Whose the rows of a classifier's head are, call by call; engines are in test_engine_pooling.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm.errors import StepError

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn

# Requests with adapters 7, none, 8 and 9; 8 leaves the head alone.
REQUESTS, SLOTS = (7, 0, 8, 9), {7: 2, 8: 0, 9: 1}


def pooled(rows: Any, runs: list[tuple[str, int]], extra: int = 0) -> list[dict[int, list[int]] | None]:
    """Slot -> rows of each of the layer's calls; a run is ("one" row a request or its "tokens", requests)."""
    calls: list[dict[int, list[int]] | None] = []

    def layer(count: int) -> None:
        segments = rows.step.segments
        segments = None if segments is None else rows.step.segments_for(count)
        calls.append(None if segments is None else {slot: found.tolist() for slot, found in segments})

    def run_of(kind: str, count: int) -> Any:
        def by_request(hidden: Any, _metadata: Any) -> None:
            if kind == "one":
                rows.head(lambda data, _: layer(len(data)), torch.zeros(count + extra, 1), hidden)
            else:  # the second request of a run has more tokens to come
                for i in range(count):
                    tokens = None if i == 1 else torch.zeros(2, 1)
                    rows.chunk(lambda data, _: None if data is None else layer(len(data)), tokens, None)

        return by_request

    for kind, count in runs:
        rows.pool(run_of(kind, count), None, SimpleNamespace(pooling_params=[None] * count))
    return calls


def rows_of(requests: tuple[int, ...]) -> Any:
    from flora_vllm.plugin.pooled import PooledRows

    rows = PooledRows()
    rows.set_mapping(requests, (), SLOTS)
    rows.begin()
    return rows


def test_runs_of_one_task_follow_the_batch() -> None:
    rows = rows_of(REQUESTS)
    calls = pooled(rows, [("one", 1), ("one", 2), ("one", 1)])
    assert calls == [{2: [0]}, None, {1: [0]}]
    assert pooled(rows_of(REQUESTS), [("one", 4)]) == [{0: [1, 2], 1: [3], 2: [0]}]
    rows.step.verify()
    assert rows.step.segments is None, "between calls the layer is the base model's"
    assert pooled(rows_of((0, 8, 0, 0)), [("one", 4)]) == [None]


def test_a_requests_tokens_are_all_its_adapters_and_unfinished_ones_are_passed_over() -> None:
    assert pooled(rows_of(REQUESTS), [("one", 1), ("tokens", 3)]) == [{2: [0]}, None, {1: [0, 1]}]
    assert pooled(rows_of(REQUESTS), [("tokens", 4)]) == [{2: [0, 1]}, None, {1: [0, 1]}]


def test_rows_that_cannot_be_told_are_a_fault() -> None:
    for runs, extra in (([("one", 5)], 0), ([("one", 4)], 1)):
        rows = rows_of(REQUESTS)
        assert pooled(rows, runs, extra) == [None]
        with pytest.raises(StepError, match="adapters cannot follow"):
            rows.step.verify()
