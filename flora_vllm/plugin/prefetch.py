"""The engine core's side of loads that hold up no step: when workers load what, and which requests wait for it.

`add_lora` answers when the adapter is loaded or refused, and the core goes on stepping meanwhile. A request whose
adapter was evicted from host memory is passed over by the scheduler, as is one whose grammar is being compiled, until
the workers have it again; the load begins when the request arrives. Which adapters the workers hold is known here from
what they answer. Should that ever be wrong, a step loads what it lacks.

Engines in the caller's own process have nobody to serve meanwhile, and stages of a pipeline agree on loads in ways
that steps would meet: both load between steps.
"""

import contextlib
import functools
import importlib
import itertools
import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from flora_vllm.plugin import activation, asleep, turns
from flora_vllm.plugin.options import options_of
from flora_vllm.plugin.refusals import as_vllm_says

# How far apart workers are asked what is done: with steps; and how long they wait for it without, where a request that
# comes waits, too.
POLL_S, IDLE_WAIT_S = 0.003, 0.005
_BREATH_S = 0.0005
# What was asked behind a step is answered by the second after it; waited for where no steps follow (a pause).
_ROUNDS = 3
# Adapters that are loaded for waiting requests at a time: they need memory before there is room for them.
MOST_AHEAD = 4
_LOADING = "_flora_loading"  # on the core, and on its scheduler


@dataclass(eq=False)
class _Load:
    """`answer`: of whoever called add_lora; None of an adapter that only a waiting request needs."""

    request: Any
    again: bool
    answer: Future | None = None
    given: Future | None = None  # to the workers
    lacks_room: bool = False  # it is loaded, and waits for room in host memory
    is_cancelled: bool = False


class Loading:
    """What the workers of one core load and hold."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._tickets = itertools.count()
        self._loads: dict[int, _Load] = {}  # by ticket, in the order in which they began
        asleep.while_busy(self)
        self._held: dict[int, str] = {}  # id -> identity
        self._promised: set[int] = set()  # loaded for a waiting request: they stay until it runs
        self._last_poll = 0.0
        self._asked: Future | None = None  # what is done, in the workers' turn
        self._rounds = 0
        self.lookups = {"hit": 0, "miss": 0}  # of adapters in host memory, by requests that arrived

    def arrive(self, request: Any) -> None:
        """A request with this adapter has arrived; if workers do not hold it, they will be asked to load it."""
        self.lookups["hit" if self.is_ready(request) else "miss"] += 1

    def why_waits(self, adapter: int) -> str | None:
        """For what requests of an adapter wait that is not held: "loading", or "memory"; None of one that is."""
        if adapter in self._held:
            return None
        load = self._load_of(adapter)
        lacking = any(other.lacks_room for other in self._loads.values()) if load is None else load.lacks_room
        return "memory" if lacking else "loading"

    def add(self, request: Any) -> bool | Future:
        """What `add_lora` answers: at once of an adapter that is held, or later."""
        adapter = request.lora_int_id
        is_held = self._held.get(adapter) == request.lora_name  # and not other content
        if is_held and not request.load_inplace and self._load_of(adapter) is None:
            return self._is_without_memory() or self._core.model_executor.add_lora(request)
        load = self._load_of(adapter)
        if load is None or load.request.lora_name != request.lora_name:
            load = self._begin(request, again=False)
        if load.answer is None:
            load.answer = Future()
        return load.answer

    def remove(self, adapter: int) -> bool:
        """What `remove_lora` answers. Of an adapter that is being loaded: it will not be held."""
        loads = [load for load in self._loads.values() if load.request.lora_int_id == adapter]
        for load in loads:
            load.is_cancelled = True
        self._let_go([adapter])
        return self._core.model_executor.remove_lora(adapter) or bool(loads)

    def is_ready(self, request: Any) -> bool:
        """Whether the workers hold a request's adapter; if not, they will be asked to load it."""
        adapter = request.lora_int_id
        if adapter in self._held:
            return True
        if self._load_of(adapter) is None and sum(load.answer is None for load in self._loads.values()) < MOST_AHEAD:
            self._begin(request, again=True)
        return False

    @property
    def is_busy(self) -> bool:
        return bool(self._loads)

    def poll(self, *, is_stepping: bool) -> None:
        """Between steps: have one adapter that is loaded let in, so that no two steps are further apart than that."""
        if self._is_without_memory():
            return
        for ticket in self._loads:
            self._give(ticket)
        done = self._done_beside_steps() if is_stepping else self._done_soon()
        if done is None:
            return
        for load in self._loads.values():
            if load.given is not None:
                load.given.result()
        is_full = False
        for ticket in [ticket for ticket in self._loads if all(ticket in of_rank for of_rank in done)]:
            load = self._loads[ticket]
            if is_full and load.answer is None:
                continue  # smaller ones would for ever take the room that one before them waits for
            if self._finish(ticket, load):
                break
            is_full = is_full or ticket in self._loads

    def _done_soon(self) -> list[list[int]]:
        self._asked = None
        return self._heard(self._core.collective_rpc(_done, args=(IDLE_WAIT_S,)))

    def _done_beside_steps(self) -> list[list[int]] | None:
        """What each rank has done; None while it is not known. To wait for the answer would be to wait for the step
        that runs, and the next would not be ready when it ends."""
        if self._asked is None:
            if time.monotonic() - self._last_poll < POLL_S:
                return None
            self._asked, self._rounds = self._in_turn(_done, 0.0), 0
            self._last_poll = time.monotonic()
        self._rounds += 1
        if not self._asked.done() and self._rounds <= _ROUNDS:
            return None
        asked, self._asked = self._asked, None
        return self._heard(asked.result())

    def _heard(self, answers: list[tuple[list[int], list[int]]]) -> list[list[int]]:
        for _, gone in answers:
            self._let_go(gone)
        return [done for done, _ in answers]

    def _let_go(self, adapters: Iterable[int]) -> None:
        for adapter in adapters:
            self._held.pop(adapter, None)

    def _is_without_memory(self) -> bool:
        """Asleep, slots have none, and the base, which a load may ask. A trainer loads before the KV cache wakes."""
        return "weights" in self._core.model_executor.sleeping_tags

    def _load_of(self, adapter: int) -> _Load | None:
        """The load of this adapter that began last and will end with it held."""
        loads = (load for load in reversed(self._loads.values()) if load.request.lora_int_id == adapter)
        return next((load for load in loads if not load.is_cancelled), None)

    def _begin(self, request: Any, *, again: bool) -> _Load:
        ticket = next(self._tickets)
        load = self._loads[ticket] = _Load(request, again)
        if not self._is_without_memory():
            self._give(ticket)
        return load

    def _give(self, ticket: int) -> None:
        load = self._loads[ticket]
        if load.given is None:
            load.given = self._in_turn(_begin, ticket, load.request, load.again)

    def _in_turn(self, act: Callable[..., Any], *asked: Any) -> Future:
        """Have the workers act: after the step that they have been given, where they have one queue for all."""
        executor = self._core.model_executor
        if isinstance(executor, importlib.import_module("vllm.v1.executor.multiproc_executor").MultiprocExecutor):
            return executor.collective_rpc(act, args=asked, non_block=True)
        answer = Future()
        answer.set_result(self._core.collective_rpc(act, args=asked))
        return answer

    def _finish(self, ticket: int, load: _Load) -> bool:
        """Whether the load of a ticket that is done on all ranks ended with an adapter let in."""
        adapter = load.request.lora_int_id
        if load.is_cancelled:
            self._forget(ticket)
            if self._load_of(adapter) is None:
                self._core.model_executor.remove_lora(adapter)  # the copy that it has made meanwhile, too
            self._answer(load, None)
            return False
        keep = self._in_use()
        found = self._core.collective_rpc(_finish, args=(ticket, keep, load.answer is None))
        error = next((one.error for one in found if one.error is not None), None)
        self._let_go(found[0].evicted)
        if error is not None:
            del self._loads[ticket]
            if any(one.error is None for one in found):  # never on some ranks only
                self._core.model_executor.remove_lora(adapter)
            if load.answer is None:
                self._held[adapter] = load.request.lora_name  # the step will find the fault, too, and end its requests
            self._answer(load, error)
            return False
        if found[0].is_held:
            self._held[adapter] = load.request.lora_name
            if load.answer is None:
                self._promised.add(adapter)
        elif load.answer is None:
            if keep and self._core.scheduler.has_requests():
                load.lacks_room = True
                return False  # these end some time
            self._forget(ticket)
            if not keep:
                self._held[adapter] = load.request.lora_name  # let the step say why there is no room
            return False  # of a paused engine, whose pause waits for this: asked for again when it goes on
        # Even of one that found no room: requests may come.
        activation.learn_start(self._core, load.request)
        del self._loads[ticket]
        self._answer(load, None)
        return True

    def _in_use(self) -> frozenset[int]:
        """Adapters of running requests, and those that were loaded for requests which have not run yet."""
        scheduler = self._core.scheduler
        running = adapters_of(scheduler.running)
        if not scheduler.running:
            self._promised.clear()  # there was a step since, and it could not run those requests for other reasons
        elif self._promised:
            # Those that turns.py passes by may run when others have: they must not take the room that these wait for.
            self._promised &= adapters_of(r for r in scheduler.waiting if not turns.holds(scheduler, r))
        return frozenset(running | self._promised)

    def _forget(self, ticket: int) -> None:
        self._core.collective_rpc(_forget, args=(ticket,))
        del self._loads[ticket]

    def _answer(self, load: _Load, error: Exception | None) -> None:
        if load.answer is None:
            return
        if error is None:
            load.answer.set_result(True)
        else:
            load.answer.set_exception(as_vllm_says(error))


def adapters_of(requests: Any) -> set[int]:
    """The ids of the adapters of these requests of vLLM's."""
    return {request.lora_request.lora_int_id for request in requests if request.lora_request is not None}


def _begin(worker: Any, ticket: int, request: Any, again: bool) -> None:
    """Runs in a worker, as the three below."""
    worker.model_runner.lora_manager.beside.begin(ticket, request, again)


def _done(worker: Any, wait_s: float) -> tuple[list[int], list[int]]:
    """(tickets that are done, adapters that went for others in steps)."""
    manager = worker.model_runner.lora_manager
    return manager.beside.done(wait_s), manager.take_gone()


def _finish(worker: Any, ticket: int, keep: frozenset[int], waits: bool) -> Any:
    return worker.model_runner.lora_manager.beside.finish(ticket, keep, waits)


def _forget(worker: Any, ticket: int) -> None:
    worker.model_runner.lora_manager.beside.forget(ticket)


def install() -> None:
    """Have cores that run in a process of their own load beside the steps; inert without FLoRA."""
    core: Any = importlib.import_module("vllm.v1.engine.core").EngineCoreProc
    add, remove, arrive = core.add_lora, core.remove_lora, core.add_request
    works, listen = core.has_work, core._process_input_queue

    @functools.wraps(add)
    def add_lora(self: Any, lora_request: Any) -> Any:
        loading = _loading_of(self)
        return add(self, lora_request) if loading is None else loading.add(lora_request)

    @functools.wraps(remove)
    def remove_lora(self: Any, lora_id: int) -> bool:
        loading = _loading_of(self)
        return remove(self, lora_id) if loading is None else loading.remove(lora_id)

    @functools.wraps(arrive)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        arrive(self, request, *args, **kwargs)
        if request.lora_request is not None and (loading := _loading_of(self)) is not None:
            loading.arrive(request.lora_request)

    def is_loading(core: Any) -> bool:
        loading = core.__dict__.get(_LOADING)
        # An engine that drains before it ends still has requests that wait for adapters.
        return loading is not None and loading.is_busy and (core.is_running() or works(core))

    @functools.wraps(works)
    def has_work(self: Any) -> bool:
        return works(self) or is_loading(self)  # with work, a core does not wait for a client

    @functools.wraps(listen)
    def process_input_queue(self: Any) -> None:
        while is_loading(self):
            is_stepping = works(self)
            self.__dict__[_LOADING].poll(is_stepping=is_stepping)
            if is_stepping:
                break
            with contextlib.suppress(queue.Empty):  # wait for what comes first
                self._handle_client_request(*self.input_queue.get(timeout=_BREATH_S))
                while True:  # and for all that came meanwhile: the next may be behind a load
                    self._handle_client_request(*self.input_queue.get_nowait())
        listen(self)

    core.add_lora, core.remove_lora, core.add_request = add_lora, remove_lora, add_request
    core.has_work, core._process_input_queue = has_work, process_input_queue
    _pass_over()


def _pass_over() -> None:
    scheduler: Any = importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler
    original: Callable[[Any, Any], bool] = scheduler._handle_blocked_waiting_request

    @functools.wraps(original)
    def handle_blocked_waiting_request(self: Any, request: Any) -> bool:
        loading, adapter = self.__dict__.get(_LOADING), request.lora_request
        # A session that waits for its client would hold what it does not use.
        waits_for_us = adapter is not None and request.status.name != "WAITING_FOR_STREAMING_REQ"
        if loading is not None and waits_for_us and not loading.is_ready(adapter):
            return False
        return original(self, request)

    scheduler._handle_blocked_waiting_request = handle_blocked_waiting_request


def loading_in(scheduler: Any) -> Loading | None:
    """Of an engine that loads beside its steps and has been asked to, or has had a request with an adapter."""
    return scheduler.__dict__.get(_LOADING)


def _loading_of(core: Any) -> Loading | None:
    """Of an engine with FLoRA and one stage."""
    if _LOADING not in core.__dict__:
        config = core.vllm_config
        serves = options_of(config.additional_config) is not None
        loads = serves and config.parallel_config.pipeline_parallel_size == 1
        core.__dict__[_LOADING] = core.scheduler.__dict__[_LOADING] = Loading(core) if loads else None
    return core.__dict__[_LOADING]
