"""vLLM's own readers of shared memory, while adapters load and while none does."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import zmq
from vllm.distributed.device_communicators import shm_broadcast

from flora_vllm.plugin import asleep

ADDRESS = "inproc://pings"


@dataclass(eq=False)
class Loads:
    is_busy: bool


@pytest.fixture
def condition(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """(who writes, who reads)."""
    monkeypatch.setattr(shm_broadcast.SpinCondition, "wait", shm_broadcast.SpinCondition.wait)
    asleep.install()
    context = zmq.Context()
    writer = shm_broadcast.SpinCondition(False, context, ADDRESS)
    reader = shm_broadcast.SpinCondition(True, context, ADDRESS)
    yield writer, reader
    context.destroy(linger=0)


def waits(reader: Any, count: int, timeout_ms: int | None = None) -> tuple[float, float]:
    """Seconds of the clock and of this thread that `count` waits take, right after a message."""
    reader.record_read()
    clock, used = time.monotonic(), time.thread_time()
    for _ in range(count):
        reader.wait(timeout_ms)
    return time.monotonic() - clock, time.thread_time() - used


def test_a_reader_sleeps_only_while_something_loads(
    condition: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, (_, reader) = Loads(is_busy=False), condition
    monkeypatch.setattr(asleep, "LOOK_MS", 200)  # a busy machine takes some time for five looks, too
    asleep.while_busy(loads)
    assert waits(reader, 5)[0] < 0.5
    loads.is_busy = True
    clock, used = waits(reader, 5)
    assert clock > 0.9, "it looks again now and then, whether it is told or not"
    assert used < clock / 2
    assert waits(reader, 5, timeout_ms=0)[0] < 0.5
    assert reader.busy_loop_s == 1, "as it was"
    del loads
    assert waits(reader, 5)[0] < 0.5


def test_a_message_wakes_it(condition: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loads, (writer, reader) = Loads(is_busy=True), condition
    asleep.while_busy(loads)
    monkeypatch.setattr(asleep, "LOOK_MS", 10_000)
    deadline = time.monotonic() + 30
    while not reader.local_notify_socket.poll(10):  # until it has subscribed
        assert time.monotonic() < deadline
        writer.notify()
    assert waits(reader, 1)[0] < 5
