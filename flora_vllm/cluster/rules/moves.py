"""The steps of one plan: guarantee, shrink, grow, swap, balance. Each works on a Placement within a move budget.

A move is an adapter loaded where it is not in memory yet. Order of choice is total (load, then row number), so equal
input gives equal plans. Every step that may repeat lowers a potential (unmet guarantees, swapped value, squared load),
so a constant load comes to rest.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from flora_vllm.cluster.rules.placement import Placement

# How many alternatives a greedy step looks at before it takes the best so far: beyond that the gain is noise.
WINDOW = 16
# Guaranteed copies that need a chain of moves, per plan; the rest wait for the next plan.
CHAINS = 32


@dataclass
class Budget:
    """Loads that each replica may still be asked to make in this plan; a warming replica has no limit."""

    left: dict[int, float]
    moves: int = 0

    def allows(self, p: Placement, a: int, r: int) -> bool:
        return a in p.resident[r] or self.left[r] >= 1

    def add(self, p: Placement, a: int, r: int) -> None:
        """Books and makes the copy."""
        p.add(a, r)
        if a not in p.resident[r]:
            self.left[r] -= 1
            self.moves += 1


class OpenReplicas:
    """Replicas with a free slot, least busy first; stale heap entries are renewed when met."""

    def __init__(self, p: Placement, budget: Budget) -> None:
        self._p, self._budget = p, budget
        self._heap = [self._key(r) for r in p.rows() if p.free_slots[r] > 0]
        heapq.heapify(self._heap)

    def _key(self, r: int) -> tuple[float, int, int]:
        return (self._p.busy[r], -self._p.free_slots[r], r)

    def is_empty(self) -> bool:
        return not self._heap

    def best(self, a: int, limit: int | None) -> int | None:
        """The least busy replica that can take `a`, on a node that has no copy yet if `limit` looks find one."""
        p, taken_nodes, fallback, aside, looks = self._p, self._p.nodes_of(a), None, [], 0
        found: int | None = None
        while self._heap and (limit is None or looks < limit):
            key = heapq.heappop(self._heap)
            r = key[2]
            if p.free_slots[r] <= 0:
                continue
            fresh = self._key(r)
            if fresh != key:
                heapq.heappush(self._heap, fresh)
                continue
            aside.append(key)
            looks += 1
            if p.can_take(a, r) and self._budget.allows(p, a, r):
                if p.spec_of(r).node not in taken_nodes:
                    found = r
                    break
                fallback = r if fallback is None else fallback
        for key in aside:
            heapq.heappush(self._heap, key)
        return fallback if found is None else found


def drop_surplus(p: Placement, want: np.ndarray) -> None:
    """Removes copies above `want` (A,), on a node with two copies first, then on the busiest replica."""
    for a in np.flatnonzero(p.count > want).tolist():
        while p.count[a] > want[a]:
            nodes = [p.spec_of(r).node for r in p.holders[a]]
            r = max(p.holders[a], key=lambda r: (nodes.count(p.spec_of(r).node) > 1, p.busy[r], r))
            p.drop(a, r)


def cheapest_room(p: Placement, budget: Budget, a: int) -> tuple[int, list[int]] | None:
    """(replica, surplus copies to drop there) that costs the least load, on a fresh node if one can; None if no way."""
    taken, best = p.nodes_of(a), None
    for r in p.rows():
        spec = p.spec_of(r)
        if a in p.held[r] or p.rank[a] > spec.max_rank or not budget.allows(p, a, r):
            continue
        slots, nbytes, lost, victims = p.free_slots[r], p.free_bytes[r], 0.0, []
        for m in sorted((m for m in p.held[r] if p.count[m] > p.low[m]), key=lambda m: (p.share(m), m)):
            if slots > 0 and nbytes >= p.nbytes[a]:
                break
            victims.append(m)
            slots, nbytes, lost = slots + 1, nbytes + int(p.nbytes[m]), lost + p.share(m)
        if slots > 0 and nbytes >= p.nbytes[a]:
            key = (spec.node in taken, lost, p.busy[r], r)
            best = (key, r, victims) if best is None or key < best[0] else best
    return None if best is None else (best[1], best[2])


def chain_for(p: Placement, budget: Budget, a: int) -> list[tuple[int, int, int]] | None:
    """Moves (adapter, from, to) that free one slot for `a`: a shortest augmenting path over replicas, else None."""
    start = [r for r in p.rows() if a not in p.held[r] and p.rank[a] <= p.spec_of(r).max_rank and budget.left[r] >= 1]
    came: dict[int, tuple[int, int] | None] = dict.fromkeys(start)
    queue, seen = list(start), set()
    for r in queue:
        for m in sorted(p.held[r] - seen):
            seen.add(m)
            previous = came[r]
            needs = int(p.nbytes[a if previous is None else previous[0]])
            if p.free_bytes[r] + p.nbytes[m] < needs:
                continue
            for t in p.rows():
                if t in came or m in p.held[t] or p.rank[m] > p.spec_of(t).max_rank or budget.left[t] < 1:
                    continue
                came[t] = (m, r)
                if p.free_slots[t] > 0 and p.free_bytes[t] >= p.nbytes[m]:
                    return _path(came, t)
                queue.append(t)
    return None


def _path(came: dict[int, tuple[int, int] | None], end: int) -> list[tuple[int, int, int]]:
    path, at = [], end
    while (step := came[at]) is not None:
        path.append((step[0], step[1], at))
        at = step[1]
    return path


def guarantee(p: Placement, budget: Budget, open_replicas: OpenReplicas) -> None:
    """Brings every adapter to its minimum copies as far as possible, hottest first."""
    short = np.flatnonzero(p.alive & (p.count < p.low))
    chains = 0
    for a in short[np.lexsort((short, -p.load[short]))].tolist():
        while p.count[a] < p.low[a]:
            taken = p.nodes_of(a)
            warm = [r for r in p.resident_at.get(a, ()) if p.can_take(a, r) and p.spec_of(r).node not in taken]
            r = min(warm, key=lambda r: (p.busy[r], r)) if warm else open_replicas.best(a, None)
            if r is None or p.spec_of(r).node in p.nodes_of(a):
                room = cheapest_room(p, budget, a)
                if room is not None and (r is None or p.spec_of(room[0]).node not in p.nodes_of(a)):
                    r = room[0]
                    for m in room[1]:
                        p.drop(m, r)
            if r is None and chains < CHAINS:
                chains += 1
                path = chain_for(p, budget, a)
                if path is not None:
                    for m, source, target in path:
                        p.drop(m, source)
                        budget.add(p, m, target)
                    r = path[-1][1]
            if r is None or not p.can_take(a, r):
                break
            budget.add(p, a, r)


def spread(p: Placement, budget: Budget, rows: list[int]) -> bool:
    """Moves a guaranteed copy away from a node that holds two when a node without one has room.

    True if the budget may have kept it from finishing, so that the next plan must look again.
    """
    crowded = False
    for a in rows:
        nodes = [p.spec_of(r).node for r in p.holders.get(a, ())]
        if len(set(nodes)) >= min(len(nodes), int(p.low[a])):
            continue
        crowded = True
        room = cheapest_room(p, budget, a)
        if room is None or p.spec_of(room[0]).node in nodes:
            continue
        doubled = [r for r in p.holders[a] if nodes.count(p.spec_of(r).node) > 1]
        p.drop(a, max(doubled, key=lambda r: (p.busy[r], r)))
        for m in room[1]:
            p.drop(m, room[0])
        budget.add(p, a, room[0])
    return crowded and any(left < 1 for left in budget.left.values())


def candidates(p: Placement, want: np.ndarray, least_value: float) -> tuple[list[int], list[float]]:
    """Copies still wanted, most valuable first: (adapter rows, load the copy would carry)."""
    lack = np.where(p.alive, np.minimum(want, p.high) - p.count, 0)
    rows = np.flatnonzero((lack > 0) & (p.load > least_value * (p.count + 1)))
    repeat = lack[rows]
    a = np.repeat(rows, repeat)
    nth = np.arange(len(a)) - np.repeat(np.cumsum(repeat) - repeat, repeat) + 1
    value = p.load[a] / (p.count[a] + nth)
    order = np.lexsort((nth, a, -value))
    order = order[value[order] > least_value]
    return a[order].tolist(), value[order].tolist()


def grow(p: Placement, budget: Budget, open_replicas: OpenReplicas, want: np.ndarray, cap: dict[str, int]) -> None:
    """Fills free slots with wanted copies, most valuable first; where it already is in memory before elsewhere."""
    misses = 0
    for a in candidates(p, want, 0.0)[0]:
        if open_replicas.is_empty() or misses > 8 * WINDOW:
            return
        if p.tenant_count.get(p.tenant[a], 0) >= cap.get(p.tenant[a], p.tenant_count.get(p.tenant[a], 0) + 1):
            continue
        warm = [r for r in p.resident_at.get(a, ()) if p.can_take(a, r)]
        r = min(warm, key=lambda r: (p.busy[r], r)) if warm else open_replicas.best(a, WINDOW)
        if r is None:
            misses += 1
            continue
        misses = 0
        budget.add(p, a, r)
