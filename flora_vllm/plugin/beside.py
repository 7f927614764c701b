"""A worker's loads beside its steps: one thread reads, checks and cuts adapters, what steps see changes between steps.

With tensor parallelism the ranks' threads are given the same adapters in the same order, and agree in a group of their
own: collectives of two threads in one group would meet the wrong partner. What needs the base's answers from several
ranks is loaded between steps (`NotBesideStepsError`). When to load what is the engine core's to say (prefetch.py).
"""

import ctypes
import functools
import logging
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.pacing import NotBesideStepsError, Turns, leave_bound_core, pace_while
from flora_vllm.plugin import asleep, probe
from flora_vllm.plugin.loads import Finished

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Given:
    """An adapter that the thread was given: what `FloraWorkerManager.load` is called with, and its call.

    `is_outdated`: the base has got other weights since, on which the adapter's cut may depend.
    """

    request: Any
    again: bool
    call: Future
    is_outdated: bool = False


class LoadsBeside:
    """The thread, and the adapters that it has been given, by ticket. `worker`: the FloraWorkerManager."""

    def __init__(self, worker: Any, turns: Turns, device: torch.device) -> None:
        self._worker = worker
        self._turns = turns
        self._device = device
        self._group = probe.group_beside_steps()  # every rank makes it now
        self._thread = ThreadPoolExecutor(1, "flora-loads", self._begin_thread)
        self._given: dict[int, Given] = {}
        asleep.while_busy(self)

    @property
    def is_busy(self) -> bool:
        return bool(self._given)

    def begin(self, ticket: int, request: Any, again: bool) -> None:
        """Have the thread load an adapter after those it was given before. `again`: it had been evicted."""
        call = self._thread.submit(self._worker.load, request, again)
        self._given[ticket] = Given(request, again, call)

    def forget_base(self) -> None:
        """The base has other weights from now on; of all ranks between the same calls of `begin` and `finish`."""
        self._given = {ticket: replace(given, is_outdated=True) for ticket, given in self._given.items()}

    def done(self, wait_s: float = 0.0) -> list[int]:
        """Tickets whose loads have ended, well or not. If none has, the first to within `wait_s` is waited for."""
        wait([given.call for given in self._given.values()], wait_s, FIRST_COMPLETED)
        return [ticket for ticket, given in self._given.items() if given.call.done()]

    def finish(self, ticket: int, keep: frozenset[int], waits: bool) -> Finished:
        """Between steps: let the adapter of a ticket that is done into the caches.

        `keep`: ids of adapters that may not make room for it. If there is no room, an adapter that `waits` stays here,
        and another is let go of: its copy is kept, and a request that names it will have it loaded again.
        """
        given = self._given[ticket]
        try:
            adapter = self._loaded(ticket)
            evicted = self._worker.let_in(adapter, keep, again=given.again)
        except Exception as error:  # an answer in any case: see refusals.py
            self.forget(ticket)
            self._worker.give_up(given.request.lora_int_id)
            if isinstance(error, AdapterError):
                return Finished(False, error=error)
            logger.exception("adapter %r could not be loaded", given.request.lora_name)
            return Finished(False, error=RuntimeError(f"{type(error).__name__}: {error}"))
        if evicted is not None or not waits:
            self.forget(ticket)
        return Finished(evicted is not None, () if evicted is None else evicted)

    def _loaded(self, ticket: int) -> Any:
        """The adapter; raises on every rank if one could not load it.

        A rank that let it in alone would evict what others keep, and load that in a step, where nobody answers it.
        """
        given, name = self._given[ticket], repr(self._given[ticket].request.lora_name)
        needs_base = given.is_outdated

        def from_thread() -> Any:
            nonlocal needs_base
            try:
                return None if needs_base else given.call.result(timeout=0)
            except NotBesideStepsError:
                needs_base = True

        adapter = probe.together(name, self._device, from_thread)
        if probe.all_agree(not needs_base, self._device):
            return adapter
        with self._turns.between_steps():  # nor beside the thread, which may be at the next one
            load = functools.partial(self._worker.load, given.request, given.again)
            adapter = probe.together(name, self._device, load)
        call = Future()
        call.set_result(adapter)
        self._given[ticket] = Given(given.request, given.again, call)  # once, however long it waits for room
        return adapter

    def forget(self, ticket: int) -> None:
        """Let go of a load that is done."""
        del self._given[ticket]

    def _begin_thread(self) -> None:
        leave_bound_core()
        # One thread of OpenMP. torch.set_num_threads would speak for other threads' MKL, too.
        set_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
        if set_threads is not None:
            set_threads(1)
        torch.set_grad_enabled(False)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        probe.BESIDE.set(probe.Beside(self._group, self._turns))
        pace_while(self._turns.steps_run)
