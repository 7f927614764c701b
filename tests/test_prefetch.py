"""When a core has its workers load what: all ranks or none, nobody's adapter for another's, a bounded number ahead."""

import importlib
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.errors import AdapterError
from flora_vllm.plugin import activation, prefetch
from flora_vllm.plugin.loads import Finished
from flora_vllm.plugin.prefetch import MOST_AHEAD, POLL_S, Loading
from flora_vllm.plugin.turns import SlotTurns


class Rank:
    """A worker's side without the thread: what it is given is done when the test says so."""

    def __init__(self, places: int) -> None:
        self.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(beside=self, take_gone=self.take_gone))
        self.places = places
        self.gone: list[int] = []
        self.sizes: dict[int, int] = {}  # of those that take more than one place
        self.given: dict[int, Any] = {}
        self.ready: set[int] = set()
        self.held: list[int] = []
        self.faults: dict[int, Exception] = {}

    def begin(self, ticket: int, request: Any, again: bool) -> None:
        self.given[ticket] = request.lora_int_id

    def done(self, wait_s: float) -> list[int]:
        return [ticket for ticket, adapter in self.given.items() if adapter in self.ready]

    def take_gone(self) -> list[int]:
        gone, self.gone = self.gone, []
        return gone

    def finish(self, ticket: int, keep: frozenset[int], waits: bool) -> Finished:
        adapter = self.given[ticket]
        if adapter in self.faults:
            del self.given[ticket]
            return Finished(False, error=self.faults[adapter])
        stay = [other for other in self.held if other in keep]
        if self.taken(stay) + self.taken([adapter]) > self.places:
            if not waits:
                del self.given[ticket]
            return Finished(False)
        del self.given[ticket]
        evicted = []
        while self.taken(self.held) + self.taken([adapter]) > self.places:
            evicted.append(next(other for other in self.held if other not in keep))
            self.held.remove(evicted[-1])
        self.held.append(adapter)
        return Finished(True, tuple(evicted))

    def forget(self, ticket: int) -> None:
        del self.given[ticket]

    def taken(self, adapters: list[int]) -> int:
        return sum(self.sizes.get(adapter, 1) for adapter in adapters)


def _executor() -> Any:
    return importlib.import_module("vllm.v1.executor.multiproc_executor")


class Core:
    """An engine core's worth of what Loading asks for."""

    def __init__(self, ranks: int = 1, places: int = 2) -> None:
        self.ranks = [Rank(places) for _ in range(ranks)]
        self.vllm_config = SimpleNamespace(additional_config={"flora": {}})
        self.scheduler = SimpleNamespace(running=[], waiting=[], has_requests=lambda: not self.is_paused)
        self.is_paused = False
        self.learnt: list[int] = []
        self.model_executor = SimpleNamespace(
            sleeping_tags=set(), remove_lora=self._remove, add_lora=lambda _: True, collective_rpc=self.later_rpc
        )
        self.behind_step: deque = deque()  # asked of workers that are in a step, as vLLM's executor keeps it
        self.loading = Loading(self)

    def collective_rpc(self, act: Any, timeout: float | None = None, args: tuple = ()) -> list[Any]:
        self.end_step()
        return self._act(act, args)

    def _act(self, act: Any, args: tuple) -> list[Any]:
        if act is activation._invocation_of:
            self.learnt += args
            return [None for _ in self.ranks]
        return [act(rank, *args) for rank in self.ranks]

    def later_rpc(self, act: Any, args: tuple, non_block: bool) -> Future:
        assert non_block
        return _executor().FutureWrapper(self.behind_step, lambda: self._act(act, args))

    def end_step(self) -> None:
        """Whoever takes a step's answer takes those before it."""
        if self.behind_step:
            _executor().FutureWrapper(self.behind_step, list).result()

    def _remove(self, adapter: int) -> bool:
        found = [adapter in rank.held for rank in self.ranks]
        for rank in self.ranks:
            rank.held = [other for other in rank.held if other != adapter]
        return all(found)

    def poll(self, *ready: int) -> None:
        for rank in self.ranks:
            rank.ready |= {*ready}
        self.loading.poll(is_stepping=False)

    def load(self, *adapters: int) -> None:
        for adapter in adapters:
            answer = self.loading.add(_request(adapter))
            self.poll(adapter)
            assert isinstance(answer, Future)
            assert answer.result(0)


def _request(adapter: int, name: str | None = None) -> Any:
    return SimpleNamespace(lora_int_id=adapter, lora_name=name or f"a{adapter}", load_inplace=False)


def _waiting(adapter: int) -> Any:
    return SimpleNamespace(lora_request=_request(adapter))


def test_a_load_is_answered_when_every_rank_has_it():
    core = Core(ranks=2)
    answer: Any = core.loading.add(_request(1))
    core.ranks[0].ready.add(1)
    core.poll()
    assert not answer.done()
    assert core.ranks[0].held == []
    core.poll(1)
    assert answer.result(0)
    assert [rank.held for rank in core.ranks] == [[1], [1]]
    assert core.loading.add(_request(1)) is True, "it is there"
    assert not core.loading.is_busy


def test_a_step_that_runs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_executor(), "MultiprocExecutor", SimpleNamespace)
    core = Core(ranks=2)
    answer: Any = core.loading.add(_request(1))
    assert [rank.given for rank in core.ranks] == [{}, {}]
    core.loading.poll(is_stepping=True)
    core.end_step()
    for rank in core.ranks:
        assert [*rank.given.values()] == [1]
        rank.ready.add(1)
    core.loading.poll(is_stepping=True)  # what was asked before it was ready
    core.loading._last_poll -= POLL_S
    core.loading.poll(is_stepping=True)
    assert not answer.done()
    core.end_step()
    core.loading.poll(is_stepping=True)
    assert answer.result(0)
    assert [rank.held for rank in core.ranks] == [[1], [1]]


def test_what_one_rank_refuses_none_holds():
    core = Core(ranks=2)
    answer: Any = core.loading.add(_request(1))
    core.ranks[1].faults[1] = AdapterError("no")
    core.poll(1)
    with pytest.raises(AdapterError, match="no"):
        answer.result(0)
    assert [rank.held for rank in core.ranks] == [[], []]
    assert not core.loading.is_busy


def test_two_who_ask_share_a_load_and_other_content_is_another():
    core = Core()
    answers: list[Any] = [core.loading.add(_request(1)), core.loading.add(_request(1)), core.loading.add(_request(2))]
    assert answers[0] is answers[1] is not answers[2]
    assert core.loading.add(_request(1, "other")) is not answers[0]
    assert len(core.ranks[0].given) == 3


def test_an_id_that_has_other_content_is_loaded_anew():
    core = Core()
    for name in ("a1@old", "a1@new", "a1@old"):
        answer: Any = core.loading.add(_request(1, name))
        core.poll(1)
        assert answer.result(0)
        core.ranks[0].ready.clear()
        assert core.loading.add(_request(1, name)) is True, "it is there"
    assert not core.loading.is_busy


def test_one_is_let_in_at_a_time():
    core = Core()
    answers: list[Any] = [core.loading.add(_request(adapter)) for adapter in (1, 2)]
    core.poll(1, 2)
    assert [answer.done() for answer in answers] == [True, False]
    core.poll()
    assert answers[1].done()


def test_adapters_in_use_do_not_make_room():
    core = Core()
    core.load(1, 2)
    core.scheduler.running = [_waiting(1), _waiting(2)]
    core.scheduler.waiting = [_waiting(3), _waiting(4)]
    assert not core.loading.is_ready(_request(3))
    core.poll(3, 4)
    assert core.ranks[0].held == [1, 2]
    core.scheduler.running = [_waiting(2)]
    core.poll()
    assert core.ranks[0].held == [2, 3]
    assert core.loading.is_ready(_request(3))
    # Loaded for a request that has not run yet: another's turn is after it.
    assert not core.loading.is_ready(_request(4))
    core.poll()
    assert core.ranks[0].held == [2, 3]
    core.scheduler.waiting = [_waiting(4)]
    core.poll()
    assert core.ranks[0].held == [2, 4]
    assert not core.loading.is_ready(_request(1)), "it made room"


def test_a_promise_to_a_request_that_cannot_run_blocks_nobody():
    core = Core(places=1)
    core.scheduler.waiting = [_waiting(1), _waiting(2)]
    for adapter in (1, 2):
        assert not core.loading.is_ready(_request(adapter))
    core.poll(1, 2)
    assert core.ranks[0].held == [1]
    core.poll()
    assert core.ranks[0].held == [2]


def test_a_promise_to_a_request_whose_turn_it_is_not_blocks_nobody():
    """Requests without an adapter run all the time; the slot is kept for 2, which waited longer than 1."""
    core = Core(places=1)
    first, second = (SimpleNamespace(lora_request=_request(n), num_computed_tokens=0) for n in (1, 2))
    for request in (first, second):
        request.status, request.arrival_time = SimpleNamespace(name="WAITING"), 0.0
    core.scheduler.running = [SimpleNamespace(lora_request=None)]
    core.scheduler.waiting = [second, first]
    for adapter in (1, 2):
        assert not core.loading.is_ready(_request(adapter))
    core.poll(1, 2)
    assert core.ranks[0].held == [1]
    core.scheduler._flora_turns = SlotTurns(slots=1, wait_s=1.0)
    core.scheduler._flora_turns.begin(core.scheduler.running, [core.scheduler.waiting], now=2.0)
    assert core.scheduler._flora_turns.holds(first)
    core.poll()
    assert core.ranks[0].held == [2]


def test_a_load_by_request_is_answered_where_there_is_no_room():
    core = Core()
    core.load(1, 2)
    core.scheduler.running = [_waiting(1), _waiting(2)]
    core.load(3)
    assert core.ranks[0].held == [1, 2]
    assert core.learnt == [1, 2, 3], "requests that name it are keyed by what it is"
    assert not core.loading.is_ready(_request(3)), "its copy is read when it is needed"


def test_the_step_finds_what_cannot_be_loaded_for_it():
    core = Core()
    assert not core.loading.is_ready(_request(1))
    core.ranks[0].faults[1] = AdapterError("its copy is gone")
    core.poll(1)
    assert core.loading.is_ready(_request(1))
    assert not core.loading.is_busy


def test_no_more_than_a_few_are_loaded_ahead():
    core = Core()
    assert not any(core.loading.is_ready(_request(adapter)) for adapter in range(1, 20))
    assert len(core.ranks[0].given) == MOST_AHEAD
    core.loading.add(_request(30))
    assert len(core.ranks[0].given) == MOST_AHEAD + 1, "whoever asks for a load gets it"


def test_what_is_removed_while_it_loads_is_not_held():
    core = Core()
    answer: Any = core.loading.add(_request(1))
    assert core.loading.remove(1)
    core.poll(1)
    assert answer.result(0)
    assert core.ranks[0].held == []
    assert not core.loading.is_busy
    core.load(1)
    assert core.ranks[0].held == [1]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A core that is wrapped, and its scheduler."""
    scheduling = importlib.import_module("vllm.v1.core.sched.scheduler")
    engine = importlib.import_module("vllm.v1.engine.core")

    class Scheduler(SimpleNamespace):
        def _handle_blocked_waiting_request(self, request: Any) -> bool:
            return request.status.name == "WAITING"

    class Proc(Core):
        is_running = staticmethod(lambda: True)
        is_stepping = False
        add_lora = remove_lora = add_request = _process_input_queue = lambda *_: None

        def has_work(self) -> bool:
            return self.is_stepping

    monkeypatch.setattr(scheduling, "Scheduler", Scheduler)
    monkeypatch.setattr(engine, "EngineCoreProc", Proc)
    prefetch.install()
    core: Any = Proc()
    core.scheduler = Scheduler(running=[], waiting=[], has_requests=lambda: True)
    core.__dict__["_flora_loading"] = core.scheduler.__dict__["_flora_loading"] = core.loading
    return core, core.scheduler


def test_who_drains_before_the_end_still_loads(installed):
    core, scheduler = installed
    waiting = SimpleNamespace(lora_request=_request(1), status=SimpleNamespace(name="WAITING"))
    scheduler.waiting = [waiting]
    assert not scheduler._handle_blocked_waiting_request(waiting)
    assert core.has_work(), "an idle core loads"
    core.is_running = lambda: False
    assert not core.has_work(), "nobody waits for it"
    core.is_stepping = True
    core.ranks[0].ready.add(1)
    core._process_input_queue()
    assert scheduler._handle_blocked_waiting_request(waiting)


def test_a_session_that_waits_for_its_client_loads_nothing(installed):
    core, scheduler = installed
    session = SimpleNamespace(lora_request=_request(1), status=SimpleNamespace(name="WAITING_FOR_STREAMING_REQ"))
    assert not scheduler._handle_blocked_waiting_request(session)
    assert not core.loading.is_busy
    session.status.name = "WAITING"
    assert not scheduler._handle_blocked_waiting_request(session)
    assert core.loading.is_busy


def test_what_went_in_a_step_is_loaded_beside_the_next():
    core = Core(places=3)
    core.load(1, 2)
    core.ranks[0].held, core.ranks[0].gone = [2], [1]
    core.load(3)
    assert core.loading.is_ready(_request(2))
    assert not core.loading.is_ready(_request(1))
    core.poll(1)
    assert core.loading.is_ready(_request(1))


def test_nothing_is_let_in_while_the_engine_sleeps():
    core = Core()
    answer: Any = core.loading.add(_request(1))
    core.model_executor.sleeping_tags = {"weights", "kv_cache"}
    core.poll(1)
    assert not answer.done()
    later: Any = core.loading.add(_request(2))
    assert list(core.ranks[0].given.values()) == [1], "a load may ask the base, which is not there"
    core.model_executor.sleeping_tags = {"kv_cache"}  # trainers load before it wakes
    core.poll(2)
    assert answer.done()
    core.poll()
    assert later.done()


def test_a_pause_does_not_wait_for_those_it_pauses():
    core = Core(places=1)
    core.load(1)
    core.scheduler.running, core.scheduler.waiting = [_waiting(1)], [_waiting(2)]
    assert not core.loading.is_ready(_request(2))
    core.poll(2)
    assert core.loading.is_busy
    core.is_paused = True
    core.poll()
    assert not core.loading.is_busy
    core.is_paused, core.scheduler.running = False, []
    assert not core.loading.is_ready(_request(2)), "it was never there"
    core.poll()
    assert core.ranks[0].held == [2]


def test_small_ones_do_not_take_the_room_that_a_large_one_waits_for():
    core = Core(places=4)
    core.ranks[0].sizes[9] = 3
    core.load(1, 2)
    core.scheduler.running = [_waiting(1), _waiting(2)]
    core.scheduler.waiting = [_waiting(9), _waiting(3)]
    assert not core.loading.is_ready(_request(9))
    assert not core.loading.is_ready(_request(3))
    answer: Any = core.loading.add(_request(4))
    core.poll(9, 3, 4)
    assert core.ranks[0].held == [1, 2, 4], "who asks is answered: it can make room again"
    assert answer.done()
    core.scheduler.running = [_waiting(2)]
    core.poll()
    assert core.ranks[0].held == [2, 9]
