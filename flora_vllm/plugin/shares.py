"""Fair shares: one tenant's flood of requests waits behind itself, not before the others.

vLLM admits waiting requests in the order of their arrival. With `--adapter-shares` the next is of the tenant for which
the engine has computed the fewest tokens, prompts and answers alike, and among one tenant's the oldest (VTC, Sheng et
al., "Fairness in Serving Large Language Models", OSDI 2024). A tenant that comes back after a pause starts level with
the least served of those that wait: nobody saves up. What runs is never interrupted for another, so a request of the
tenant served least waits until one running request ends; and where its adapter needs a slot, as turns.py has it.

Whose a request is: `prefix`, the part before the first `/` of its adapter's name, and one tenant for all requests
without an adapter; `key`, the API key or the ACL's tenant that asked. The server writes that one on the request.
"""

import functools
import heapq
import importlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_vllm.plugin.access import SHARE
from flora_vllm.plugin.identity import plain_name
from flora_vllm.plugin.mixes import first_part
from flora_vllm.plugin.options import options_of

logger = logging.getLogger(__name__)

# Travels from the server to the engine with a request's trace headers, of which clients can set two others only.
_HEADER = "x-flora-share"
_MOST_KEPT = 4096


@dataclass
class Account:
    """`served`: tokens computed for a tenant, or its level when it came. `turn`: number of its last admission."""

    served: int
    turn: int = 0


class FairQueue:
    """Waiting requests in vLLM's interface of a queue. `share_of`: whose a request is.

    Between `charge` and `charge` is a step, in which the scheduler peeks and pops; what it could not admit it prepends
    at the end.
    """

    def __init__(self, share_of: Callable[[Any], str]) -> None:
        self._share_of = share_of
        self._queues: dict[str, deque[Any]] = {}  # those with a request
        self._accounts: dict[str, Account] = {}
        self._level = 0  # where a tenant starts that comes now
        self._turns = 0
        self._last: str | None = None  # admitted last
        self._popped: tuple[str, Any] | None = None
        # This step's: tokens that admitted requests are about to take, and the tenants by what they have had.
        self._taken: dict[str, int] = {}
        self._ordered: list[tuple[int, int, str]] | None = None

    def add_request(self, request: Any) -> None:
        share = self._share_of(request)
        account = self._account(share)
        if share not in self._queues:
            account.served = max(account.served, self._level)
        self._queue(share).append(request)

    def prepend_request(self, request: Any) -> None:
        self._queue(self._share_of(request)).appendleft(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            self.prepend_request(request)

    def peek_request(self) -> Any:
        self._settle()
        return self._queues[self._first()][0]

    def pop_request(self) -> Any:
        share = self._first()
        request = self._queues[share].popleft()
        self._forget_empty(share)
        self._popped = share, request
        return request

    def remove_request(self, request: Any) -> None:
        share = self._share_of(request)
        self._queues[share].remove(request)
        self._forget_empty(share)

    def remove_requests(self, requests: Iterable[Any]) -> None:
        gone = set(requests)
        for share in {self._share_of(request) for request in gone} & self._queues.keys():
            self._queues[share] = deque(request for request in self._queues[share] if request not in gone)
            self._forget_empty(share)

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Any]:
        """In the order of their arrival."""
        return heapq.merge(*self._queues.values(), key=lambda request: request.arrival_time)

    def in_turn(self) -> list[Sequence[Any]]:
        """Each tenant's requests, the least served tenant's first."""
        return [self._queues[share] for share in sorted(self._queues, key=self._had)]

    def charge(self, scheduled: Iterable[tuple[Any, int]]) -> None:
        """The step is decided: its requests and how many tokens of each it computes."""
        self._settle()
        self._taken.clear()
        self._ordered = None
        for request, tokens in scheduled:
            self._account(self._share_of(request)).served += tokens
        waiting = [self._account(share).served for share in self._queues]
        if waiting:
            self._level = max(self._level, min(waiting))
        elif self._last is not None:
            self._level = max(self._level, self._account(self._last).served)
        if len(self._accounts) > _MOST_KEPT:  # who is not above the level would start there anyway
            self._accounts = {
                share: account
                for share, account in self._accounts.items()
                if share in self._queues or account.served > self._level
            }

    def _settle(self) -> None:
        """What was popped last was admitted, and its tokens are its tenant's in this step already; or passed by."""
        popped, self._popped = self._popped, None
        if popped is None or popped[1].status.name != "RUNNING":
            return
        share, request = popped
        self._taken[share] = self._taken.get(share, 0) + request.num_tokens - request.num_computed_tokens
        self._turns += 1
        self._account(share).turn, self._last = self._turns, share

    def _had(self, share: str) -> tuple[int, int]:
        account = self._account(share)
        return account.served + self._taken.get(share, 0), account.turn

    def _first(self) -> str:
        """Whose turn it is. Raises IndexError if nobody waits."""
        if self._ordered is None:
            self._ordered = [(*self._had(share), share) for share in self._queues]
            heapq.heapify(self._ordered)
        while True:
            *had, share = self._ordered[0]
            if share not in self._queues:
                heapq.heappop(self._ordered)
            elif (now := self._had(share)) != tuple(had):  # within a step it only grows
                heapq.heapreplace(self._ordered, (*now, share))
            else:
                return share

    def _account(self, share: str) -> Account:
        return self._accounts.setdefault(share, Account(self._level))

    def _queue(self, share: str) -> deque[Any]:
        self._ordered = None
        return self._queues.setdefault(share, deque())

    def _forget_empty(self, share: str) -> None:
        if not self._queues[share]:
            del self._queues[share]


def by_prefix(request: Any) -> str:
    """Whose adapter it asks for; "" if for none."""
    return "" if request.lora_request is None else prefix_of(request.lora_request.lora_name)


@functools.lru_cache(_MOST_KEPT)
def prefix_of(lora_name: str) -> str:
    """Of a name in the engine; a mix that has none is its first part's tenant's."""
    prefix, _, _ = first_part(plain_name(lora_name)).partition("/")
    return prefix


def by_key(request: Any) -> str:
    """Whose key it came with; "" if with none."""
    return (request.trace_headers or {}).get(_HEADER, "")


_SHARES: Mapping[str, Callable[[Any], str]] = {"prefix": by_prefix, "key": by_key}


def install() -> None:
    """Have vLLM's scheduler admit by shares where they are asked for; where requests have priorities, those count."""
    scheduler: Any = importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler
    queues: Any = importlib.import_module("vllm.v1.core.sched.request_queue")
    init, schedule = scheduler.__init__, scheduler.schedule

    class FairRequestQueue(FairQueue, queues.RequestQueue):
        """Cannot be made where vLLM's queue has a method that ours lacks."""

    @functools.wraps(init)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        options = options_of(self.vllm_config.additional_config)
        if options is None or options.adapter_shares not in _SHARES:
            return
        if self.policy.name != "FCFS":
            logger.warning("--adapter-shares has no effect with --scheduling-policy priority: priorities alone count")
            return
        self.waiting = FairRequestQueue(_SHARES[options.adapter_shares])

    @functools.wraps(schedule)
    def schedule_and_charge(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        if isinstance(self.waiting, FairQueue):
            self.waiting.charge((self.requests[name], count) for name, count in output.num_scheduled_tokens.items())
        return output

    scheduler.__init__, scheduler.schedule = initialise, schedule_and_charge


def install_request_side() -> None:
    """Have the server write on each request whose key it came with."""
    engine: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
    add = engine._add_request  # each part of a realtime session's input is a request there, too

    @functools.wraps(add)
    async def mark_and_add(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        options = options_of(self.vllm_config.additional_config)
        if options is not None and options.adapter_shares == "key":
            request.trace_headers = {**(request.trace_headers or {}), _HEADER: SHARE.get()}
        await add(self, request, *args, **kwargs)

    engine._add_request = mark_and_add
