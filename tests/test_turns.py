"""vLLM's own scheduler with adapters that want more slots than there are: who waits, and for how long."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
from scheduler_support import LENGTH, STEP_S, Clock, Run

from flora_vllm.plugin import turns

# vLLM's config imports warn about others' deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")

WAIT_S = 5.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(turns, "time", made)
    return made


@pytest.fixture
def make(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable:
    """`make(**options)`: a run of a scheduler whose engine was given these options; None: without FLoRA."""
    from vllm.v1.core.sched.scheduler import Scheduler

    for name in ("schedule", "_handle_blocked_waiting_request"):
        monkeypatch.setattr(Scheduler, name, inspect.unwrap(getattr(Scheduler, name)))
    turns.install()
    return lambda options, **more: Run(tiny_model("llama"), options, clock, **more)


def test_stock_vllm_lets_an_adapter_starve(make: Callable) -> None:
    run = make(None)
    run.keep_busy(range(1, 3), 1.0)
    last = run.ask(3)
    run.keep_busy(range(1, 3), 30.0)
    assert last not in run.started


def test_an_adapter_that_waited_gets_a_slot_within_the_bound(make: Callable, clock: Clock) -> None:
    run = make({"adapter_wait": WAIT_S})
    run.keep_busy(range(1, 3), 1.0)
    asked_s = clock.now
    last = run.ask(3)
    run.keep_busy(range(1, 3), 30.0)
    waited_s = run.started[last] - asked_s
    assert WAIT_S <= waited_s <= WAIT_S + (LENGTH + 2) * STEP_S
    assert turns.counts(run.scheduler)["drained"] >= 1
    # Adapters 1 and 2 went on, the drained one after its own wait.
    assert all(any(name.startswith(f"{adapter}-") for name in list(run.started)[-30:]) for adapter in (1, 2))


def test_several_that_waited_get_slots_in_turn(make: Callable, clock: Clock) -> None:
    run = make({"adapter_wait": WAIT_S})
    run.keep_busy(range(1, 3), 1.0)
    asked_s = clock.now
    names = [run.ask(adapter) for adapter in (3, 4, 5, 6)]
    run.keep_busy(range(1, 3), 30.0)
    rounds = [(run.started[name] - asked_s - WAIT_S) / (LENGTH * STEP_S) for name in names]
    assert rounds == sorted(rounds)
    assert max(rounds[:2]) <= 1.5, "two slots, each drained once"
    assert max(rounds) <= 3


def test_requests_without_an_adapter_are_never_held_back(make: Callable) -> None:
    run = make({"adapter_wait": WAIT_S})
    run.keep_busy(range(1, 3), 1.0)
    run.ask(3)
    run.keep_busy(range(1, 3), WAIT_S + STEP_S)
    for _ in range(3):
        plain = run.ask(0, length=1)
        run.step()
        assert plain in run.started


def test_nobody_is_held_back_while_there_are_slots(make: Callable) -> None:
    """However long it waits, and for whatever else: here adapter 1 runs alone, and 8 requests are all that may."""
    run = make({"adapter_wait": WAIT_S})
    names = [run.ask(1, length=60) for _ in range(8)]
    later = [run.ask(1), run.ask(2)]
    for _ in range(60):
        run.step()
    assert all(name in run.started for name in names)
    run.step()
    assert all(name in run.started for name in later)


def test_priorities_are_kept(make: Callable) -> None:
    run = make({"adapter_wait": WAIT_S}, policy="priority")
    run.keep_busy(range(1, 3), 1.0)
    last = run.ask(3)
    run.keep_busy(range(1, 3), 10.0)
    assert last not in run.started
