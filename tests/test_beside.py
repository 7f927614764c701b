"""What comes of a load beside the steps, on each rank."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm.errors import AdapterError
from flora_vllm.pacing import NotBesideStepsError, Turns


class Worker:
    """Loads what it is told, here or in the thread."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.held: list[str] = []
        self.given_up: list[int] = []
        self.results: list[Any] = []

    def load(self, request: Any, again: bool) -> Any:
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result(self) if callable(result) else result

    def let_in(self, adapter: str, keep: frozenset[int], *, again: bool) -> tuple[int, ...] | None:
        if keep:
            return None
        self.held.append(adapter)
        return ()

    def give_up(self, adapter: int) -> None:
        self.given_up.append(adapter)


def _finish(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, others_fine: bool = True, waits: bool = False
) -> tuple[Any, list[bool]]:
    from flora_vllm.plugin import beside

    said: list[bool] = []

    def all_agree(fine: bool, device: Any) -> bool:
        said.append(fine)
        return fine and others_fine

    monkeypatch.setattr(beside.probe, "all_agree", all_agree)
    loads: Any = object.__new__(beside.LoadsBeside)
    loads._worker, loads._turns, loads._device, loads._given = worker, worker.turns, torch.device("cpu"), {}
    with ThreadPoolExecutor(1) as loads._thread:
        loads.begin(1, SimpleNamespace(lora_int_id=7, lora_name="a"), again=False)
    assert loads.done() == [1]
    if waits:
        assert not loads.finish(1, frozenset({1}), waits=True).is_held
    found = loads.finish(1, frozenset(), waits=False)
    assert loads.done() == []
    return found, said


def test_what_another_rank_could_not_load_is_let_in_nowhere(monkeypatch: pytest.MonkeyPatch):
    worker = Worker()
    worker.results = ["a", "b", AdapterError("no"), OSError("no memory")]
    assert _finish(worker, monkeypatch)[0].is_held
    found, said = _finish(worker, monkeypatch, others_fine=False)
    assert "another rank" in str(found.error)
    assert (worker.held, worker.given_up, said) == (["a"], [7], [True])
    found, said = _finish(worker, monkeypatch)
    assert (str(found.error), said) == ("no", [False])
    found, said = _finish(worker, monkeypatch)
    assert (str(found.error), said) == ("OSError: no memory", [False]), "the others must not wait for it"
    assert worker.held == ["a"]


def test_whatever_one_rank_meets_the_others_do_not_wait(monkeypatch: pytest.MonkeyPatch):
    """Two ranks as two threads; who asks for the other's word and gets none fails after two seconds."""
    from flora_vllm.plugin import probe

    meeting, words = threading.Barrier(2, timeout=2), dict[int, bool]()

    def all_agree(fine: bool, _device: Any) -> bool:
        words[threading.get_ident()] = fine
        meeting.wait()
        agreed = all(words.values())
        meeting.wait()
        return agreed

    def run(rank: int, fault: Exception | None) -> Any:
        def make() -> int:
            if rank == 0 and fault is not None:
                raise fault
            return rank

        try:
            return probe.together("'a'", torch.device("cpu"), make)
        except Exception as error:
            return error

    monkeypatch.setattr(probe, "all_agree", all_agree)
    with ThreadPoolExecutor(2) as ranks:
        assert [*ranks.map(run, (0, 1), (None, None))] == [0, 1]
        for fault in (AdapterError("no"), MemoryError(), OSError("disk"), NotBesideStepsError()):
            words.clear()
            found = [*ranks.map(run, (0, 1), (fault, fault))]
            assert found[0] is fault
            assert isinstance(found[1], AdapterError)
            assert "another rank" in str(found[1])


def test_what_has_to_be_loaded_between_steps_is_loaded_beside_nothing(monkeypatch: pytest.MonkeyPatch):
    worker = Worker()
    worker.results = [NotBesideStepsError(), lambda worker: "a" if worker.turns.between_steps().locked() else "raced"]
    assert _finish(worker, monkeypatch)[0].is_held
    assert worker.held == ["a"]
    worker.results = [NotBesideStepsError(), "once"]
    assert _finish(worker, monkeypatch, waits=True)[0].is_held
    worker.results = [NotBesideStepsError(), AdapterError("no")]
    found, said = _finish(worker, monkeypatch)
    # It is fine so far; it needs the base; it could not be had.
    assert (str(found.error), said) == ("no", [True, False, False])


def test_what_was_loaded_for_another_base_is_loaded_again(monkeypatch: pytest.MonkeyPatch):
    """Done or not, well or not, when the base got other weights; and once more where it waits for room meanwhile."""
    from flora_vllm.plugin import beside

    for old in ("old", AdapterError("of the old base"), NotBesideStepsError()):
        worker = Worker()
        worker.results = [old, "new", "newer"]
        monkeypatch.setattr(beside.probe, "all_agree", lambda fine, _device: fine)
        loads: Any = object.__new__(beside.LoadsBeside)
        loads._worker, loads._turns, loads._device, loads._given = worker, worker.turns, torch.device("cpu"), {}
        with ThreadPoolExecutor(1) as loads._thread:
            loads.begin(1, SimpleNamespace(lora_int_id=7, lora_name="a"), again=False)
        loads.forget_base()
        assert not loads.finish(1, frozenset({1}), waits=True).is_held
        assert not loads.finish(1, frozenset({1}), waits=True).is_held
        assert worker.results == ["newer"]
        loads.forget_base()
        assert loads.finish(1, frozenset(), waits=False).is_held
        assert worker.held == ["newer"]


def test_norms_that_were_begun_on_another_base_are_not_kept():
    from flora_vllm.plugin import probe

    base: Any = object.__new__(probe.EngineBase)
    base._norms = {}

    def measured_meanwhile() -> torch.Tensor:
        base.forget()
        return torch.zeros(1)

    assert base.norms("q_proj", measured_meanwhile) == 0
    assert base.norms("q_proj", lambda: torch.ones(1)) == 1
    assert base.norms("q_proj", lambda: torch.zeros(1)) == 1


def test_who_asks_may_wait_for_the_first_that_ends():
    from flora_vllm.plugin import beside

    loads: Any = object.__new__(beside.LoadsBeside)
    calls = [Future() for _ in range(2)]
    loads._given = {ticket: beside.Given(None, False, call) for ticket, call in enumerate(calls)}
    assert loads.done() == []
    timer = threading.Timer(0.05, lambda: calls[1].set_result("b"))
    timer.start()
    begin = time.monotonic()
    assert loads.done(60.0) == [1]
    assert loads.done(60.0) == [1], "nor is what has ended waited with"
    assert time.monotonic() - begin < 30
    timer.join()
