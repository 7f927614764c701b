"""Who holds which adapter: the table that the placement policy works on.

Numbers live in numpy arrays so that a plan for 100,000 adapters stays in milliseconds; sets and dicts answer
"who holds it" during the greedy loops. Copies are rows of one flat table (adapter row, replica row), chosen over a
slots matrix because replicas differ in slots. The table keeps the capacity rules; it decides nothing.
Rows are never renumbered; freed rows are reused in the order they were freed, so the same calls give the same table.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flora_vllm.errors import ConfigError

UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter as the policy sees it. `name` carries the version (name@digest)."""

    name: str
    nbytes: int = 1
    rank: int = 1
    tenant: str = "default"
    min_copies: int = 0
    max_copies: int = UNLIMITED

    def __post_init__(self) -> None:
        if self.nbytes < 0 or self.rank < 1:
            raise ConfigError(f"adapter {self.name}: nbytes {self.nbytes} must be >= 0 and rank {self.rank} >= 1")
        if not 0 <= self.min_copies <= self.max_copies or self.max_copies < 1:
            raise ConfigError(
                f"adapter {self.name}: need 0 <= min_copies <= max_copies and max_copies >= 1, "
                f"got {self.min_copies} and {self.max_copies}"
            )


@dataclass(frozen=True)
class ReplicaSpec:
    """One engine. `is_warming`: it takes no traffic yet, so loading adapters disturbs nobody."""

    id: str
    node: str
    slots: int
    nbytes: int
    max_rank: int = UNLIMITED
    is_warming: bool = False

    def __post_init__(self) -> None:
        if self.slots < 1 or self.nbytes < 0 or self.max_rank < 1:
            raise ConfigError(
                f"replica {self.id}: slots {self.slots} and max_rank {self.max_rank} must be >= 1, "
                f"nbytes {self.nbytes} >= 0"
            )


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with room for `size` rows, new rows zero."""
    if size <= len(array):
        return array
    out = np.zeros(max(size, 2 * len(array), 64), dtype=array.dtype)
    out[: len(array)] = array
    return out


class Rows:
    """Names to row numbers, with reuse."""

    def __init__(self) -> None:
        self.row: dict[str, int] = {}
        self.name: list[str | None] = []
        self._free: list[int] = []

    def add(self, name: str) -> int:
        if self._free:
            row = self._free.pop(0)
            self.name[row] = name
        else:
            row = len(self.name)
            self.name.append(name)
        self.row[name] = row
        return row

    def remove(self, name: str) -> int:
        row = self.row.pop(name)
        self.name[row] = None
        self._free.append(row)
        return row

    def name_of(self, row: int) -> str:
        name = self.name[row]
        assert name is not None, f"row {row} is free"
        return name


class Placement:
    """Adapters, replicas and copies. Letters: A adapter rows, R replica rows, C copy rows.

    adapters (A,): nbytes, rank, tenant, low, high (copies), load (mean requests in flight), count (copies now)
    replicas (R,), as lists: replica (its spec), free_slots (without the reserve), free_bytes, busy, held, resident
    `busy` is the load a replica carries if each adapter's load is split evenly over its copies; refreshed by `settle`.
    """

    def __init__(self, reserve_slots: int) -> None:
        self.reserve_slots = reserve_slots
        self.adapters = Rows()
        self.spec: dict[str, AdapterSpec] = {}
        self.alive = np.zeros(0, dtype=bool)
        self.nbytes = np.zeros(0, dtype=np.int64)
        self.rank = np.zeros(0, dtype=np.int64)
        self.low = np.zeros(0, dtype=np.int64)
        self.high = np.zeros(0, dtype=np.int64)
        self.load = np.zeros(0)
        self.count = np.zeros(0, dtype=np.int64)
        self.tenant: list[str] = []
        self.tenant_count: dict[str, int] = {}
        self.holders: dict[int, dict[int, int]] = {}
        self.replicas = Rows()
        self.replica: list[ReplicaSpec | None] = []
        self.free_slots: list[int] = []
        self.free_bytes: list[int] = []
        self.busy: list[float] = []
        self.held: list[set[int]] = []
        self.resident: list[frozenset[int]] = []
        self.resident_at: dict[int, set[int]] = {}
        self.copy_adapter = np.full(0, 0, dtype=np.int64)
        self.copy_replica = np.full(0, 0, dtype=np.int64)
        self._copy_free: list[int] = []
        self._copies = 0
        # (replica row, adapter row) -> +1 added, -1 dropped, since the owner last cleared it.
        self.journal: dict[tuple[int, int], int] = {}

    def put_adapter(self, spec: AdapterSpec) -> None:
        """Adds the adapter or changes its limits; a changed size or rank drops its copies first."""
        old = self.spec.get(spec.name)
        if old is not None and (old.nbytes, old.rank, old.tenant) != (spec.nbytes, spec.rank, spec.tenant):
            load = float(self.load[self.adapters.row[spec.name]])
            self.remove_adapter(spec.name)
            self.put_adapter(spec)
            self.load[self.adapters.row[spec.name]] = load
            return
        a = self.adapters.row[spec.name] if old is not None else self.adapters.add(spec.name)
        self.spec[spec.name] = spec
        size = len(self.adapters.name)
        if size > len(self.alive):
            for field in ("alive", "nbytes", "rank", "low", "high", "load", "count"):
                setattr(self, field, _grown(getattr(self, field), size))
        if a == len(self.tenant):
            self.tenant.append(spec.tenant)
        self.tenant[a] = spec.tenant
        self.alive[a], self.nbytes[a], self.rank[a] = True, spec.nbytes, spec.rank
        self.low[a], self.high[a] = spec.min_copies, spec.max_copies

    def remove_adapter(self, name: str) -> None:
        a = self.adapters.row[name]
        for r in list(self.holders.get(a, ())):
            self.drop(a, r)
        for r in self.resident_at.pop(a, set()):
            self.resident[r] = self.resident[r] - {a}
        self.adapters.remove(name)
        del self.spec[name]
        self.alive[a], self.load[a], self.low[a], self.count[a] = False, 0.0, 0, 0

    def put_replica(self, spec: ReplicaSpec) -> None:
        """Adds the replica; a replica that comes back with other limits loses what it held."""
        r = self.replicas.row.get(spec.id)
        if r is not None:
            old = self.replica[r]
            assert old is not None
            if (old.node, old.slots, old.nbytes, old.max_rank) == (spec.node, spec.slots, spec.nbytes, spec.max_rank):
                self.replica[r] = spec
                return
            self.remove_replica(spec.id)
        r = self.replicas.add(spec.id)
        if r == len(self.replica):
            self.replica.append(None)
            self.free_slots.append(0)
            self.free_bytes.append(0)
            self.busy.append(0.0)
            self.held.append(set())
            self.resident.append(frozenset())
        self.replica[r] = spec
        self.free_slots[r] = max(0, spec.slots - self.reserve_slots)
        self.free_bytes[r], self.busy[r], self.held[r] = spec.nbytes, 0.0, set()

    def remove_replica(self, replica_id: str) -> None:
        r = self.replicas.row[replica_id]
        for a in list(self.held[r]):
            self.drop(a, r)
        self.set_resident(replica_id, ())
        self.replicas.remove(replica_id)
        self.replica[r] = None
        self.free_slots[r] = self.free_bytes[r] = 0

    def set_resident(self, replica_id: str, names: Iterable[str]) -> None:
        """What the replica says it has in memory now, planned or loaded on demand; unknown names are ignored."""
        row = self.adapters.row
        self.set_resident_rows(self.replicas.row[replica_id], frozenset(row[n] for n in names if n in row))

    def set_resident_rows(self, r: int, rows: frozenset[int]) -> None:
        """`set_resident` with rows for names."""
        for a in self.resident[r] - rows:
            self.resident_at[a].discard(r)
        for a in rows - self.resident[r]:
            self.resident_at.setdefault(a, set()).add(r)
        self.resident[r] = rows

    def rows(self) -> list[int]:
        """Replica rows in use, in the order of their ids."""
        return [self.replicas.row[i] for i in sorted(self.replicas.row)]

    def spec_of(self, r: int) -> ReplicaSpec:
        spec = self.replica[r]
        assert spec is not None, f"replica row {r} is free"
        return spec

    def share(self, a: int) -> float:
        """Load per copy; all of it while there is none."""
        return float(self.load[a]) / max(1, int(self.count[a]))

    def can_take(self, a: int, r: int) -> bool:
        """Slots, bytes and rank allow one more copy here and there is none yet."""
        return (
            self.free_slots[r] > 0
            and self.free_bytes[r] >= self.nbytes[a]
            and self.rank[a] <= self.spec_of(r).max_rank
            and a not in self.held[r]
        )

    def add(self, a: int, r: int) -> None:
        assert self.can_take(a, r), f"replica {self.replicas.name[r]} cannot take {self.adapters.name[a]}"
        if self._copy_free:
            c = self._copy_free.pop()
        else:
            c = self._copies
            self._copies += 1
            if self._copies > len(self.copy_adapter):
                self.copy_adapter = _grown(self.copy_adapter, self._copies)
                self.copy_replica = _grown(self.copy_replica, self._copies)
        self.copy_adapter[c], self.copy_replica[c] = a, r
        self._shift(a, r, c, 1)

    def drop(self, a: int, r: int) -> None:
        c = self.holders[a][r]
        self.copy_replica[c] = -1
        self._copy_free.append(c)
        self._shift(a, r, c, -1)

    def _shift(self, a: int, r: int, c: int, step: int) -> None:
        """Books the copy in or out and spreads the adapter's load over its new number of copies."""
        holders = self.holders.setdefault(a, {})
        load, count = float(self.load[a]), len(holders)
        if load and count:
            change = load / (count + step) - load / count if count + step else 0.0
            for h in holders:
                self.busy[h] += change
        if step > 0:
            holders[r] = c
            self.held[r].add(a)
            self.busy[r] += load / (count + 1)
        else:
            del holders[r]
            self.held[r].remove(a)
            self.busy[r] -= load / (count - 1) if count > 1 else load
            if not holders:
                del self.holders[a]
        net = self.journal.pop((r, a), 0) + step
        if net:
            self.journal[r, a] = net
        self.count[a] = count + step
        self.free_slots[r] -= step
        self.free_bytes[r] -= step * int(self.nbytes[a])
        tenant = self.tenant[a]
        self.tenant_count[tenant] = self.tenant_count.get(tenant, 0) + step

    def copies(self) -> tuple[np.ndarray, np.ndarray]:
        """(adapter row, replica row) of every copy, both (C,)."""
        used = np.flatnonzero(self.copy_replica[: self._copies] >= 0)
        return self.copy_adapter[used], self.copy_replica[used]

    def settle(self) -> None:
        """Recomputes `busy` from the loads; call after loads changed."""
        adapters, replicas = self.copies()
        weights = self.load[adapters] / np.maximum(self.count[adapters], 1)
        self.busy[:] = np.bincount(replicas, weights=weights, minlength=len(self.busy)).tolist()

    def nodes_of(self, a: int) -> set[str]:
        return {self.spec_of(r).node for r in self.holders.get(a, ())}
