"""The placement policy: how many copies of each adapter, and on which replicas. Pure, no Ray.

An adapter's load is its mean number of requests in flight. One copy should carry at most `copy_share` of what a replica
carries on average, so the rule needs no knowledge of model or hardware, and an overload, which raises all loads alike,
does not raise copies. Decisions:
  hysteresis    more copies above `up` times the copies' load, fewer below `down`: a fixed threshold thrashed
  move budget   each load pauses decoding, so a serving replica gets at most `moves_per_replica` per plan
  reserve       slots that the plan never uses, for adapters that come on demand
  swap gain     a copy gives way only to one worth clearly more
Ranks above a replica's class never go there. A tenant's share limits its copies, not its minimum copies.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from flora_vllm.cluster.rules import moves, trades
from flora_vllm.cluster.rules.demand import Demand
from flora_vllm.cluster.rules.placement import AdapterSpec, Placement, ReplicaSpec
from flora_vllm.errors import ConfigError


@dataclass(frozen=True)
class PolicyOptions:
    """`copy_share`: the load one copy should carry, as a share of the mean load of a replica.

    `least_load_per_copy`: below this many requests in flight one copy is enough. `tenant_shares`: tenant to the share
    of all planned slots its copies may take; a tenant not named has no limit. Other fields: module docstring.
    """

    copy_share: float = 0.75
    least_load_per_copy: float = 0.5
    up: float = 1.2
    down: float = 0.6
    swap_gain: float = 1.5
    balance_band: float = 0.5
    moves_per_replica: int = 2
    reserve_slots: int = 1
    fast_half_life_s: float = 5.0
    slow_half_life_s: float = 60.0
    tenant_shares: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        faults = []
        if not 0 < self.copy_share <= 1:
            faults.append(f"copy_share must be in (0, 1], got {self.copy_share}")
        if self.least_load_per_copy <= 0:
            faults.append(f"least_load_per_copy must be > 0, got {self.least_load_per_copy}")
        if not 0 < self.down < 1 <= self.up:
            faults.append(f"need 0 < down < 1 <= up, got down {self.down} and up {self.up}")
        if self.swap_gain <= 1 or self.balance_band <= 0:
            faults.append(f"need swap_gain > 1 and balance_band > 0, got {self.swap_gain} and {self.balance_band}")
        if self.moves_per_replica < 1 or self.reserve_slots < 0:
            faults.append(
                f"need moves_per_replica >= 1 and reserve_slots >= 0, got {self.moves_per_replica} "
                f"and {self.reserve_slots}"
            )
        if not 0 < self.fast_half_life_s <= self.slow_half_life_s:
            faults.append(
                "need 0 < fast_half_life_s <= slow_half_life_s, got "
                f"{self.fast_half_life_s} and {self.slow_half_life_s}"
            )
        for tenant, share in (self.tenant_shares or {}).items():
            if not 0 <= share <= 1:
                faults.append(f"tenant_shares[{tenant}] must be in [0, 1], got {share}")
        if faults:
            raise ConfigError("placement policy: " + "; ".join(faults))


@dataclass(frozen=True)
class Plan:
    """What one plan changed. `moves` counts added copies that were not in memory there."""

    added: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]
    moves: int


@dataclass(frozen=True)
class Explanation:
    """Why an adapter is where it is; `reasons` are sentences for a person."""

    adapter: str
    load: float
    load_per_copy: float
    copies_wanted: int
    holders: tuple[tuple[str, str], ...]
    reasons: tuple[str, ...]


class Planner:
    """Owns the placement. Equal calls in equal order give equal plans."""

    def __init__(self, options: PolicyOptions | None = None) -> None:
        self.options = options or PolicyOptions()
        self.placement = Placement(self.options.reserve_slots)
        self.demand = Demand(self.options.fast_half_life_s, self.options.slow_half_life_s)
        self._joined = False

    def put_adapters(self, specs: Iterable[AdapterSpec]) -> None:
        for spec in sorted(specs, key=lambda s: s.name):
            self.placement.put_adapter(spec)
            self._joined = self._joined or spec.min_copies > 1

    def remove_adapter(self, name: str, heir: str | None = None) -> None:
        """Forgets the adapter; `heir`, its new version if there is one, inherits its demand."""
        row = self.placement.adapters.row
        self.demand.move(row[name], None if heir is None else row[heir])
        self.placement.remove_adapter(name)

    def put_replica(self, spec: ReplicaSpec, resident: Iterable[str] = ()) -> None:
        """Announces a replica, or changes it; `resident` is what it has in memory."""
        self._joined = self._joined or spec.id not in self.placement.replicas.row
        self.placement.put_replica(spec)
        self.placement.set_resident(spec.id, resident)

    def remove_replica(self, replica_id: str) -> None:
        self.placement.remove_replica(replica_id)

    def set_load(self, loads: Mapping[str, float]) -> None:
        """Requests in flight, mean over the recent past, for adapters whose load changed; unknown names are ignored."""
        row = self.placement.adapters.row
        for name, load in loads.items():
            if name in row:
                if not (load >= 0 and math.isfinite(load)):
                    raise ConfigError(f"load of {name} must be a finite number >= 0, got {load}")
                self.placement.load[row[name]] = load

    def observe(self, busy_s: Mapping[str, float]) -> None:
        """Adds request-seconds per adapter since the last `refresh_load`; unknown names are ignored."""
        row = self.placement.adapters.row
        known = [n for n in busy_s if n in row]
        self.demand.observe([row[n] for n in known], [busy_s[n] for n in known])

    def refresh_load(self, now_s: float) -> None:
        """Takes every adapter's load from what was observed."""
        self.placement.load[:] = self.demand.level(now_s, len(self.placement.load))

    def load_per_copy(self) -> float:
        """The load one copy should carry now."""
        p = self.placement
        total = float(p.load[p.alive].sum())
        return max(self.options.least_load_per_copy, self.options.copy_share * total / max(1, len(p.replicas.row)))

    def wanted_copies(self) -> np.ndarray:
        """(A,) copies each adapter should have, with hysteresis around the copies it has."""
        p, o, per_copy = self.placement, self.options, self.load_per_copy()
        base = np.ceil(p.load / per_copy)
        is_more = p.load > o.up * per_copy * np.maximum(p.count, 1)
        is_less = (p.count > 1) & (p.load < o.down * per_copy * (p.count - 1))
        want = np.where(is_more, base, np.where(is_less, np.ceil(p.load / (o.down * per_copy)), p.count))
        want = np.maximum(want, p.load > 0)
        # A single cold copy stays until something better wants its slot.
        want = np.where(is_less, np.maximum(want, 1), want).astype(np.int64)
        want = np.clip(want, p.low, np.maximum(p.low, p.high))
        return np.where(p.alive, np.minimum(want, len(p.replicas.row)), 0)

    def plan(self) -> Plan:
        """One step towards the best placement for the present load, within the move budget."""
        p, o = self.placement, self.options
        rows = p.rows()
        budget = moves.Budget({r: math.inf if p.spec_of(r).is_warming else o.moves_per_replica for r in rows})
        p.journal.clear()
        p.settle()
        if rows:
            moves.drop_surplus(p, self.wanted_copies())
            open_replicas, cap = moves.OpenReplicas(p, budget), self._tenant_caps()
            moves.guarantee(p, budget, open_replicas)
            if self._joined:
                self._joined = moves.spread(p, budget, np.flatnonzero(p.low > 1).tolist())
            want = self.wanted_copies()
            moves.grow(p, budget, open_replicas, want, cap)
            trades.swap(p, budget, want, cap, o.swap_gain)
            trades.balance(p, budget, open_replicas, o.balance_band)
        return self._delta(budget.moves)

    def _tenant_caps(self) -> dict[str, int]:
        p = self.placement
        slots = sum(p.free_slots[r] + len(p.held[r]) for r in p.rows())
        return {tenant: math.floor(share * slots) for tenant, share in (self.options.tenant_shares or {}).items()}

    def _delta(self, count: int) -> Plan:
        p = self.placement
        named = sorted((p.replicas.name_of(r), p.adapters.name_of(a), net) for (r, a), net in p.journal.items())
        return Plan(
            tuple((r, a) for r, a, net in named if net > 0), tuple((r, a) for r, a, net in named if net < 0), count
        )

    def wanted(self, replica_id: str) -> tuple[str, ...]:
        """Adapters that the replica should hold, hottest copy first."""
        p = self.placement
        rows = sorted(p.held[p.replicas.row[replica_id]], key=lambda a: (-p.share(a), p.adapters.name_of(a)))
        return tuple(p.adapters.name_of(a) for a in rows)

    def holders(self, name: str) -> tuple[tuple[str, str], ...]:
        """(replica, node) of each planned copy."""
        p = self.placement
        rows = p.holders.get(p.adapters.row[name], {})
        return tuple(sorted((p.replicas.name_of(r), p.spec_of(r).node) for r in rows))

    def guaranteed(self) -> list[str]:
        """Adapters with minimum copies."""
        return [self.placement.adapters.name_of(a) for a in np.flatnonzero(self.placement.low > 0).tolist()]

    def explain(self, name: str) -> Explanation:
        """Why the adapter has the copies it has. Raises ConfigError for an unknown name."""
        p = self.placement
        if name not in p.adapters.row:
            raise ConfigError(f"no adapter {name} in the catalogue")
        a = p.adapters.row[name]
        wanted = int(self.wanted_copies()[a])
        holders = self.holders(name)
        return Explanation(
            name, float(p.load[a]), self.load_per_copy(), wanted, holders, tuple(_reasons(self, a, wanted))
        )

    def faults(self) -> dict[str, str]:
        """Adapters that cannot have their minimum copies, or any copy at all, with the reason."""
        p = self.placement
        specs = [p.spec_of(r) for r in p.rows()]
        out: dict[str, str] = {}
        if not specs:
            return out
        for name, spec in p.spec.items():
            count = int(p.count[p.adapters.row[name]])
            able = [s for s in specs if s.max_rank >= spec.rank and s.nbytes >= spec.nbytes]
            nodes = {s.node for s in able}
            if not able:
                out[name] = _too_large(spec, specs)
            elif spec.min_copies > len(nodes):
                out[name] = (
                    f"min_copies {spec.min_copies} but only {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} "
                    f"can hold it: {'copies share nodes' if count > len(nodes) else f'{count} placed'}"
                )
            elif count < spec.min_copies:
                out[name] = f"has {count} of {spec.min_copies} minimum copies"
        return out


def _too_large(spec: AdapterSpec, replicas: list[ReplicaSpec]) -> str:
    max_rank, nbytes = max(r.max_rank for r in replicas), max(r.nbytes for r in replicas)
    faults = []
    if spec.rank > max_rank:
        faults.append(f"rank {spec.rank} is above max_rank {max_rank}")
    if spec.nbytes > nbytes:
        faults.append(f"its {spec.nbytes} bytes are more than adapter_bytes {nbytes}")
    # Each of them fits somewhere, but not on one replica.
    return "no replica can hold it: " + ("; ".join(faults) or f"none allows rank {spec.rank} and {spec.nbytes} bytes")


def _reasons(planner: Planner, a: int, wanted: int) -> list[str]:
    p, o = planner.placement, planner.options
    load, per_copy, count = float(p.load[a]), planner.load_per_copy(), int(p.count[a])
    out = [f"load {load:.3g} requests in flight, {per_copy:.3g} per copy: {wanted} copies wanted, {count} planned"]
    if p.low[a]:
        out.append(f"minimum {p.low[a]} copies on distinct nodes")
    if wanted >= p.high[a]:
        out.append(f"limited by max_copies {p.high[a]}")
    for r, _ in sorted(p.holders.get(a, {}).items()):
        out.append(f"{p.replicas.name[r]} on {p.spec_of(r).node}: carries {p.share(a):.3g} of {p.busy[r]:.3g} there")
    rows = p.rows()
    able = [r for r in rows if p.spec_of(r).max_rank >= p.rank[a] and p.spec_of(r).nbytes >= p.nbytes[a]]
    if count >= wanted and (able or not rows):
        return out
    tenant = p.tenant[a]
    cap = planner._tenant_caps().get(tenant)
    if not able:
        out.append(_too_large(p.spec[p.adapters.name_of(a)], [p.spec_of(r) for r in rows]))
    elif cap is not None and p.tenant_count.get(tenant, 0) >= cap:
        out.append(f"tenant {tenant} uses its share of {cap} slots")
    elif any(p.can_take(a, r) for r in able):
        out.append(f"waits for the move budget of {o.moves_per_replica} loads per replica and plan")
    else:
        out.append(f"no free slot; a copy there gives way only to {o.swap_gain:g} times its load")
    return out
