"""Streams from replicas: tried again while nothing was sent, and never ended silently."""

import asyncio

import pytest
from cluster_support import play

from flora_vllm.cluster.streams import LostError, guarded


def collect(*scripts, retry_s=5.0):
    """Runs `guarded` over attempts; each script is a list of chunks, an exception among them is raised."""
    attempts = list(scripts)

    async def attempt():
        return play(attempts.pop(0))

    async def run():
        return [c async for c in guarded(attempt, retry_s, first_pause_s=0.01)]

    return asyncio.run(run()), attempts


DONE = "data: [DONE]\n\n"


def test_retry_before_the_first_byte():
    out, left = collect([LostError("gone")], [], [["data: x\n\n"], [DONE]])
    assert out == [["data: x\n\n"], [DONE]]
    assert not left


def test_error_event_after_the_first_byte_and_no_retry():
    out, left = collect(["data: x\n\n", LostError("gone")], ["data: never\n\n", DONE])
    assert out[0] == "data: x\n\n"
    assert '"error"' in out[1]
    assert out[1].endswith(DONE)
    assert len(left) == 1


def test_a_stream_without_its_end_mark_is_an_error():
    out, _ = collect(["data: x\n\n"])
    assert '"error"' in out[-1]


def test_whole_answers_need_no_end_mark_and_other_errors_pass():
    assert collect([{"id": 1}])[0] == [{"id": 1}]
    with pytest.raises(ZeroDivisionError):
        collect([ZeroDivisionError()])
    with pytest.raises(LostError):
        collect([LostError("gone")], [LostError("gone")], retry_s=0.01)
