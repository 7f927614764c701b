"""Replay of traffic against placement and routing policies, without Ray: who is warm, who waits.

Queue model: a replica has LANES places that each serve one request at a time, first come first served; service times
are log-normal. An adapter that is not in memory takes LOAD_S on one lane before its request starts, planned or not.
Memory holds SLOTS adapters per replica. Wait is the time from arrival to the start of service.

Policies, each written from its public description:
  ours         plan of flora_vllm.cluster.rules.policy once per second, flora_vllm.cluster.rules.routing per request
  stock        Ray Serve multiplexing: replicas that hold the model, else those with the fewest models; power of two
               choices among them; LRU per replica; no spill, since ray.serve.llm sets max_ongoing_requests to 1e9
  round_robin  next replica in turn; LRU
  hash         consistent hashing (Karger 1997) of the adapter over a ring with 64 points per replica; LRU
  hash_bounded the same with bounded loads (Mirrokni 2016), factor 1.25
  punica       consolidation (Punica, MLSys 2024): the busiest replica that still has a free lane, so that idle ones can
               be released; else the one with the shortest queue; LRU
"""

import bisect
import heapq
import math
import random
import time
from dataclasses import dataclass, field

import numpy as np

from flora_vllm.cluster.rules.placement import AdapterSpec, ReplicaSpec
from flora_vllm.cluster.rules.policy import Planner, PolicyOptions
from flora_vllm.cluster.rules.routing import RoutingOptions, choose, key_of

LANES, SLOTS, LOAD_S, SERVICE_S, SIGMA = 8, 32, 0.3, 1.0, 0.5


@dataclass(frozen=True)
class Traffic:
    """Arrivals: times (N,), adapter rows (N,), service times (N,); popularity changes at `shift_s`."""

    replicas: int
    adapters: int
    times_s: np.ndarray
    adapter: np.ndarray
    service_s: np.ndarray
    shift_s: float


def make_traffic(
    replicas: int, adapters: int, requests: int, *, utilisation: float = 0.6, zipf: float = 1.0, seed: int = 0
) -> Traffic:
    """Zipf popularity over adapters; at half time the ranks are dealt anew, all at once."""
    rng = np.random.default_rng(seed)
    rate = utilisation * replicas * LANES / SERVICE_S
    times = np.cumsum(rng.exponential(1 / rate, requests))
    weights = 1 / np.arange(1, adapters + 1) ** zipf
    rank = rng.choice(adapters, requests, p=weights / weights.sum())
    before, after = rng.permutation(adapters), rng.permutation(adapters)
    half = requests // 2
    adapter = np.concatenate([before[rank[:half]], after[rank[half:]]])
    service = rng.lognormal(math.log(SERVICE_S) - SIGMA**2 / 2, SIGMA, requests)
    return Traffic(replicas, adapters, times, adapter, service, float(times[half]))


@dataclass
class Fleet:
    """State of all replicas: when each lane is free, what is in memory and since when it can be used."""

    replicas: int
    lanes: list[list[float]] = field(init=False)
    ongoing: list[list[float]] = field(init=False)
    memory: list[dict[int, float]] = field(init=False)
    warm: dict[int, list[int]] = field(init=False)
    loads: int = 0

    def __post_init__(self) -> None:
        self.lanes = [[0.0] * LANES for _ in range(self.replicas)]
        self.ongoing = [[] for _ in range(self.replicas)]
        self.memory = [{} for _ in range(self.replicas)]
        self.warm = {}

    def queue(self, r: int, now: float) -> int:
        ends = self.ongoing[r]
        while ends and ends[0] <= now:
            heapq.heappop(ends)
        return len(ends)

    def load(self, r: int, a: int, now: float, keep: set[int] | None) -> float:
        """Loads `a`, least recently used out (not those in `keep`); the time from which it can be used."""
        memory = self.memory[r]
        if len(memory) >= SLOTS:
            victim = next((m for m in memory if keep is None or m not in keep), None)
            victim = next(iter(memory)) if victim is None else victim
            del memory[victim]
            self.warm[victim].remove(r)
        ready = max(self.lanes[r][0], now) + LOAD_S
        heapq.heapreplace(self.lanes[r], ready)
        memory[a] = ready
        self.warm.setdefault(a, []).append(r)
        self.loads += 1
        return ready

    def serve(self, r: int, a: int, now: float, service: float, keep: set[int] | None) -> tuple[bool, float, float]:
        """(hit, wait, end) of one request."""
        memory = self.memory[r]
        ready = memory.pop(a, None)
        is_hit = ready is not None
        if ready is None:
            ready = self.load(r, a, now, keep)
        else:
            memory[a] = ready
        start = max(self.lanes[r][0], now, ready)
        heapq.heapreplace(self.lanes[r], start + service)
        heapq.heappush(self.ongoing[r], start + service)
        return is_hit, start - now, start + service


class Stock:
    def __init__(self, traffic: Traffic, fleet: Fleet) -> None:
        self.fleet, self.rng = fleet, random.Random(1)
        self.replicas = traffic.replicas

    def route(self, a: int, now: float) -> int:
        pool = self.fleet.warm.get(a)
        if not pool:
            sizes = np.fromiter(map(len, self.fleet.memory), dtype=np.int64, count=self.replicas)
            pool = np.flatnonzero(sizes == sizes.min()).tolist()
        pair = pool if len(pool) <= 2 else self.rng.sample(pool, 2)
        return min(pair, key=lambda r: self.fleet.queue(r, now))


class RoundRobin:
    def __init__(self, traffic: Traffic, _fleet: Fleet) -> None:
        self.replicas, self.turn = traffic.replicas, -1

    def route(self, _a: int, _now: float) -> int:
        self.turn = (self.turn + 1) % self.replicas
        return self.turn


class Hash:
    bound: float | None = None

    def __init__(self, traffic: Traffic, fleet: Fleet) -> None:
        self.fleet, self.total, self.ends = fleet, 0, []
        ring = sorted((key_of(f"r{r}/{i}"), r) for r in range(traffic.replicas) for i in range(64))
        self.points, self.owner = [k for k, _ in ring], [r for _, r in ring]
        self.at = [bisect.bisect(self.points, key_of(f"a{a}")) % len(ring) for a in range(traffic.adapters)]
        self.replicas = traffic.replicas

    def route(self, a: int, now: float) -> int:
        at = self.at[a]
        if self.bound is None:
            return self.owner[at]
        # Total in flight by Little's law: exact counting over all replicas would cost more than the rule.
        limit = max(LANES, math.ceil(self.bound * self.total / self.replicas))
        for step in range(len(self.owner)):
            r = self.owner[(at + step) % len(self.owner)]
            if self.fleet.queue(r, now) < limit:
                return r
        return self.owner[at]


class HashBounded(Hash):
    bound = 1.25


class Punica:
    def __init__(self, traffic: Traffic, fleet: Fleet) -> None:
        self.fleet, self.replicas = fleet, traffic.replicas
        self.open = list(range(LANES))
        self.buckets: list[set[int]] = [set() for _ in range(LANES)]
        self.buckets[0] = set(range(self.replicas))
        self.size = [0] * self.replicas
        self.ends: list[tuple[float, int]] = []

    def _shift(self, r: int, step: int) -> None:
        if self.size[r] < LANES:
            self.buckets[self.size[r]].discard(r)
        self.size[r] += step
        if self.size[r] < LANES:
            self.buckets[self.size[r]].add(r)

    def route(self, _a: int, now: float) -> int:
        while self.ends and self.ends[0][0] <= now:
            self._shift(heapq.heappop(self.ends)[1], -1)
        r = next((min(self.buckets[n]) for n in range(LANES - 1, -1, -1) if self.buckets[n]), None)
        r = min(range(self.replicas), key=lambda r: (self.size[r], r)) if r is None else r
        self._shift(r, 1)
        return r

    def served(self, r: int, end: float) -> None:
        heapq.heappush(self.ends, (end, r))


class Ours:
    """The product's policy and routing rule, with the product's defaults but for the period of one second."""

    def __init__(self, traffic: Traffic, fleet: Fleet) -> None:
        self.fleet, self.rng, self.options = fleet, random.Random(1), RoutingOptions(spill_queue=LANES)
        self.planner = Planner(PolicyOptions(reserve_slots=4))
        self.names = [f"a{a:06d}" for a in range(traffic.adapters)]
        self.planner.put_adapters(AdapterSpec(n) for n in self.names)
        for r in range(traffic.replicas):
            self.planner.put_replica(ReplicaSpec(f"r{r:04d}", f"n{r // 8}", SLOTS, SLOTS))
        rows = self.planner.placement
        assert rows.adapters.name == self.names, "rows follow the names' order"
        self.keys = np.array([key_of(f"r{r:04d}") for r in range(traffic.replicas)], dtype=np.uint64)
        self.adapter_keys = [key_of(n) for n in self.names]
        self.keep = rows.held
        self.busy_rows: list[int] = []
        self.busy_s: list[float] = []
        self.next_plan, self.plan_ms, self.moves = 0.0, [], 0

    def route(self, a: int, now: float) -> int:
        while now >= self.next_plan:
            self.plan(self.next_plan)
            self.next_plan += 1.0
        queue, memory = self.fleet.queue, self.fleet.memory
        return choose(
            self.adapter_keys[a],
            self.fleet.warm.get(a, ()),
            self.keys,
            lambda r: queue(r, now),
            lambda r: len(memory[r]),
            self.options,
            self.rng,
        )[0]

    def plan(self, now: float) -> None:
        p = self.planner.placement
        for r in range(len(self.keys)):
            p.set_resident_rows(r, frozenset(self.fleet.memory[r]))
        start = time.perf_counter()
        self.planner.demand.observe(self.busy_rows, self.busy_s)
        self.planner.refresh_load(now)
        plan = self.planner.plan()
        self.plan_ms.append(1e3 * (time.perf_counter() - start))
        self.busy_rows, self.busy_s = [], []
        for replica, name in plan.added:
            r, a = p.replicas.row[replica], p.adapters.row[name]
            if a not in self.fleet.memory[r]:
                self.fleet.load(r, a, now, p.held[r])
                self.moves += 1

    def served_adapter(self, a: int, seconds: float) -> None:
        self.busy_rows.append(a)
        self.busy_s.append(seconds)


POLICIES = {
    "ours": Ours,
    "stock": Stock,
    "round_robin": RoundRobin,
    "hash": Hash,
    "hash_bounded": HashBounded,
    "punica": Punica,
}


@dataclass(frozen=True)
class Outcome:
    """Per request: hit (N,) and wait in seconds (N,); totals for the run."""

    policy: str
    hit: np.ndarray
    wait_s: np.ndarray
    loads: int
    moves: int
    plan_ms: tuple[float, ...]
    hot_copies: int
    seconds: float


def replay(name: str, traffic: Traffic) -> Outcome:
    """Runs one policy over the traffic from cold memory."""
    started = time.perf_counter()
    fleet = Fleet(traffic.replicas)
    policy = POLICIES[name](traffic, fleet)
    keep = policy.keep if isinstance(policy, Ours) else None
    hit = np.zeros(len(traffic.times_s), dtype=bool)
    wait = np.zeros(len(traffic.times_s))
    ends: list[float] = []
    arrivals = zip(traffic.times_s.tolist(), traffic.adapter.tolist(), traffic.service_s.tolist(), strict=True)
    for i, (now, a, service) in enumerate(arrivals):
        r = policy.route(a, now)
        hit[i], wait[i], end = fleet.serve(r, a, now, service, None if keep is None else keep[r])
        if isinstance(policy, Ours):
            policy.served_adapter(a, end - now)
        elif isinstance(policy, Punica):
            policy.served(r, end)
        elif isinstance(policy, HashBounded):
            while ends and ends[0] <= now:
                heapq.heappop(ends)
            heapq.heappush(ends, end)
            policy.total = len(ends)
    hottest = int(np.bincount(traffic.adapter[-len(traffic.adapter) // 4 :]).argmax())
    return Outcome(
        name,
        hit,
        wait,
        fleet.loads,
        getattr(policy, "moves", 0),
        tuple(getattr(policy, "plan_ms", ())),
        len(fleet.warm.get(hottest, ())),
        time.perf_counter() - started,
    )


def after_warm_up(traffic: Traffic, values: np.ndarray, warm_up_s: float = 30.0) -> np.ndarray:
    """Values of requests that arrived after the cold start, at most the first fifth of the traffic."""
    cut = min(warm_up_s, 0.2 * float(traffic.times_s[-1]))
    return values[traffic.times_s >= cut]
