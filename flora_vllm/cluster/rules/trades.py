"""The steps that trade one copy for another: swap by worth, balance by load. See moves.py for the rules they share."""

import heapq

import numpy as np

from flora_vllm.cluster.rules.moves import WINDOW, Budget, OpenReplicas, candidates
from flora_vllm.cluster.rules.placement import Placement


class Surplus:
    """Replicas by their least valuable surplus copy; a replica that may load nothing more is left out."""

    def __init__(self, p: Placement, budget: Budget) -> None:
        self._p, self._budget = p, budget
        adapters, replicas = p.copies()
        extra = p.count[adapters] > p.low[adapters]
        least = np.full(len(p.busy), np.inf)
        np.minimum.at(least, replicas[extra], (p.load[adapters] / np.maximum(p.count[adapters], 1))[extra])
        self.least = float(least.min()) if len(least) else np.inf
        self._heap = [(least[r], r) for r in p.rows() if np.isfinite(least[r]) and budget.left[r] >= 1]
        heapq.heapify(self._heap)
        self._victims: dict[int, list[tuple[float, int]]] = {}

    def of(self, r: int) -> tuple[float, int] | None:
        """(load, adapter) of the copy that `r` would give up first."""
        p = self._p
        if r not in self._victims:
            order = sorted(((p.share(m), m) for m in p.held[r] if p.count[m] > p.low[m]), reverse=True)
            self._victims[r] = order
        order = self._victims[r]
        while order and (order[-1][1] not in p.held[r] or p.count[order[-1][1]] <= p.low[order[-1][1]]):
            order.pop()
        return (p.share(order[-1][1]), order[-1][1]) if order else None

    def best(self, a: int, below: float) -> tuple[int, int] | None:
        """(replica, copy to give up) for `a`: of the WINDOW cheapest that fit, the least busy replica."""
        p, aside, best = self._p, [], None
        fits = 0
        while self._heap and self._heap[0][0] < below and fits < WINDOW:
            _, r = heapq.heappop(self._heap)
            victim = self.of(r) if self._budget.left[r] >= 1 else None
            if victim is None:
                continue
            aside.append((victim[0], r))
            if victim[0] < below and self._fits(a, r, victim[1]):
                fits += 1
                key = (p.busy[r] - victim[0], r)
                best = (key, r, victim[1]) if best is None or key < best[0] else best
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return None if best is None else (best[1], best[2])

    def warm(self, a: int, below: float) -> tuple[int, int] | None:
        """The same among replicas that have `a` in memory, where it costs no load."""
        p, best = self._p, None
        for r in sorted(self._p.resident_at.get(a, ())):
            victim = self.of(r)
            if victim is not None and victim[0] < below and self._fits(a, r, victim[1]):
                key = (p.busy[r] - victim[0], r)
                best = (key, r, victim[1]) if best is None or key < best[0] else best
        return None if best is None else (best[1], best[2])

    def _fits(self, a: int, r: int, m: int) -> bool:
        p = self._p
        if a in p.held[r] or m == a or p.rank[a] > p.spec_of(r).max_rank:
            return False
        return p.free_slots[r] >= 0 and p.free_bytes[r] + p.nbytes[m] >= p.nbytes[a]


def swap(p: Placement, budget: Budget, want: np.ndarray, cap: dict[str, int], gain: float) -> None:
    """Replaces the least valuable surplus copies by wanted ones worth more than `gain` times as much."""
    surplus = Surplus(p, budget)
    if not np.isfinite(surplus.least):
        return
    misses = 0
    for a, worth in zip(*candidates(p, want, gain * surplus.least), strict=True):
        if misses > 8 * WINDOW:
            return
        if p.tenant_count.get(p.tenant[a], 0) >= cap.get(p.tenant[a], p.tenant_count.get(p.tenant[a], 0) + 1):
            continue
        found = surplus.warm(a, worth / gain) or surplus.best(a, worth / gain)
        if found is None:
            misses += 1
            continue
        misses = 0
        r, m = found
        p.drop(m, r)
        budget.add(p, a, r)


def balance(p: Placement, budget: Budget, open_replicas: OpenReplicas, band: float) -> None:
    """Moves copies from the busiest to the least busy replicas until they differ by less than `band` of the mean.

    A replica without a free slot gives its coldest copy away for it: to a third replica with room, else in exchange.
    """
    rows = p.rows()
    mean = sum(p.busy[r] for r in rows) / max(1, len(rows))
    if mean <= 0:
        return
    share = (p.load / np.maximum(p.count, 1)).tolist()
    sources = [(-p.busy[r], r) for r in rows]
    targets = [(p.busy[r], r) for r in rows if budget.left[r] >= 1]
    heapq.heapify(sources)
    heapq.heapify(targets)
    while sources and targets:
        load, source = heapq.heappop(sources)
        if -load != p.busy[source]:
            heapq.heappush(sources, (-p.busy[source], source))
            continue
        tried = []
        while targets and len(tried) < 4:
            key = heapq.heappop(targets)
            if budget.left[key[1]] < 1:
                continue
            if key[0] != p.busy[key[1]]:
                heapq.heappush(targets, (p.busy[key[1]], key[1]))
                continue
            tried.append(key)
            if p.busy[source] - key[0] < band * mean:
                if len(tried) == 1:
                    return
                break
            if _relieve(p, budget, open_replicas, source, key[1], band * mean, share):
                heapq.heappush(sources, (-p.busy[source], source))
                break
        for _, r in tried:
            heapq.heappush(targets, (p.busy[r], r))


def _relieve(
    p: Placement,
    budget: Budget,
    open_replicas: OpenReplicas,
    source: int,
    target: int,
    band: float,
    share: list[float],
) -> bool:
    """Moves the largest copy that brings the two closer; a copy too small to matter is not worth a load."""
    gap, limit = p.busy[source] - p.busy[target], p.spec_of(target).max_rank
    fitting = (a for a in p.held[source] - p.held[target] if band / 8 <= share[a] <= 0.75 * gap)
    a = max((a for a in fitting if p.rank[a] <= limit), key=lambda a: (share[a], -a), default=None)
    if a is None:
        return False
    if not p.can_take(a, target):
        return _make_way(p, budget, open_replicas, a, source, target, share)
    p.drop(a, source)
    budget.add(p, a, target)
    return True


def _make_way(
    p: Placement, budget: Budget, open_replicas: OpenReplicas, a: int, source: int, target: int, share: list[float]
) -> bool:
    """Moves `a` from `source` to the full `target` and the coldest copy of `target` elsewhere."""
    gap, room = p.busy[source] - p.busy[target], p.free_bytes[target] - p.nbytes[a]
    fitting = (m for m in p.held[target] - p.held[source] if room + p.nbytes[m] >= 0)
    m = min(fitting, key=lambda m: (share[m], m), default=None)
    if m is None or not 0 < share[a] - share[m] <= 0.75 * gap:
        return False
    third = open_replicas.best(m, WINDOW)
    if third is None:
        fits = p.nbytes[m] <= p.free_bytes[source] + p.nbytes[a] and p.rank[m] <= p.spec_of(source).max_rank
        if not fits or not budget.allows(p, m, source):
            return False
        third = source
    p.drop(a, source)
    p.drop(m, target)
    budget.add(p, a, target)
    budget.add(p, m, third)
    return True
