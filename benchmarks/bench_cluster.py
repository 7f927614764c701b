"""The cluster: placement and routing replayed at scale, a Serve cluster with stand-in engines, real vLLM replicas.

    python benchmarks/bench_cluster.py --quick          # within 10 minutes on 2 cores
    python benchmarks/bench_cluster.py                  # a million requests, more time per part, rows and plots
    python benchmarks/bench_cluster.py --parts a        # only the replay; figures of the other parts are null

The last line on stdout is one JSON object. Full runs append rows to results/cluster.jsonl and write cluster_*.png.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
from cluster_replay import (
    LANES,
    LOAD_S,
    POLICIES,
    SERVICE_S,
    SLOTS,
    Outcome,
    Traffic,
    after_warm_up,
    make_traffic,
    replay,
)

from flora_vllm.cluster.rules.placement import AdapterSpec, ReplicaSpec
from flora_vllm.cluster.rules.policy import Planner

REPLICAS, ADAPTERS = 1000, 100_000
FILE = harness.RESULTS / "cluster.jsonl"


def plan_times() -> dict:
    """Milliseconds for a plan from nothing, and for updates after 1 % of the loads changed."""
    rng = np.random.default_rng(0)
    load = 4800 / np.arange(1, ADAPTERS + 1) / np.sum(1 / np.arange(1, ADAPTERS + 1))
    names = [f"a{i:06d}" for i in range(ADAPTERS)]
    planner = Planner()
    planner.put_adapters(AdapterSpec(name) for name in names)
    for r in range(REPLICAS):
        planner.put_replica(ReplicaSpec(f"r{r:04d}", f"n{r // 8}", SLOTS, SLOTS, is_warming=True))
    planner.set_load(dict(zip(names, load.tolist(), strict=True)))
    start = time.perf_counter()
    moves = planner.plan().moves
    whole_ms = 1e3 * (time.perf_counter() - start)
    for r in range(REPLICAS):
        planner.put_replica(ReplicaSpec(f"r{r:04d}", f"n{r // 8}", SLOTS, SLOTS), planner.wanted(f"r{r:04d}"))
    updates: list[float] = []
    for _ in range(15):
        changed = rng.choice(ADAPTERS, ADAPTERS // 100, replace=False)
        factors = rng.uniform(0.5, 2, len(changed))
        planner.set_load(
            {names[i]: float(load[i] * f) for i, f in zip(changed.tolist(), factors.tolist(), strict=True)}
        )
        start = time.perf_counter()
        planner.plan()
        updates.append(1e3 * (time.perf_counter() - start))
    return {
        "part": "a",
        "load": "plan",
        "plan_ms": round(whole_ms, 1),
        "moves": moves,
        "update_ms": harness.summary(updates),
    }


def replay_row(outcome: Outcome, traffic: Traffic) -> dict:
    wait, hit = after_warm_up(traffic, outcome.wait_s), after_warm_up(traffic, outcome.hit)
    p50, p95, p99 = (round(float(v), 3) for v in np.percentile(wait, [50, 95, 99]))
    row = {"part": "a", "policy": outcome.policy, "replicas": traffic.replicas, "adapters": traffic.adapters}
    row |= {"requests": len(traffic.times_s), "slots": SLOTS, "lanes": LANES, "load_s": LOAD_S, "service_s": SERVICE_S}
    row |= {"hit_rate": round(float(hit.mean()), 4), "p50_s": p50, "p95_s": p95, "p99_s": p99}
    row |= {"loads": outcome.loads, "moves": outcome.moves, "hot_copies": outcome.hot_copies}
    if outcome.plan_ms:
        row["plan_in_replay_ms"] = harness.summary(outcome.plan_ms)
    return row | {"seconds": round(outcome.seconds, 1)}


def run_replay(requests: int, policies: list[str]) -> tuple[Traffic, dict[str, Outcome], list[dict]]:
    traffic = make_traffic(REPLICAS, ADAPTERS, requests)
    outcomes, rows = {}, []
    for name in policies:
        harness.progress(f"(a) {requests} requests, {name}")
        outcomes[name] = replay(name, traffic)
        rows.append(replay_row(outcomes[name], traffic))
    return traffic, outcomes, rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests and seconds; writes no files")
    parser.add_argument("--parts", default="abc", help="a replay, b stand-in cluster, c real replicas (default: abc)")
    parser.add_argument("--model", type=Path, help="base model for part c (default: SmolLM2 from the cache)")
    args = parser.parse_args()
    if not args.parts or set(args.parts) - set("abc"):
        parser.error(f"--parts takes letters of abc, got {args.parts!r}")
    return args


def smollm2() -> Path:
    from flora_vllm.demo.model_assets import fetch_smollm2
    from flora_vllm.environment import cache_root

    return fetch_smollm2(cache_root() / "smollm2")


def find(rows: list[dict], key: str, **fields: Any) -> Any:
    """`key` of the row with these fields; None if the part was not run."""
    return next((row.get(key) for row in rows if all(row.get(k) == v for k, v in fields.items())), None)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else round(a / b, 5)


def result_of(rows: list[dict], quick: bool) -> dict:
    silent = [row["silent"] for row in rows if "silent" in row]
    return {
        "benchmark": "cluster",
        "quick": quick,
        "plan_ms_1000x100000": find(rows, "plan_ms", load="plan"),
        "update_ms_1000x100000": (find(rows, "update_ms", load="plan") or {}).get("median"),
        "hit_rate_ours": find(rows, "hit_rate", policy="ours", part="a"),
        "hit_rate_stock": find(rows, "hit_rate", policy="stock", part="a"),
        "p99_ours_over_stock": ratio(
            find(rows, "p99_s", policy="ours", part="a"), find(rows, "p99_s", policy="stock", part="a")
        ),
        "hot_copies": find(rows, "hot_copies", policy="ours", load="hot"),
        "hot_p95_ours_over_stock": ratio(
            find(rows, "p95_s", policy="ours", load="hot"), find(rows, "p95_s", policy="stock", load="hot")
        ),
        "lost_on_node_kill": find(rows, "lost", part="b", load="node_kill"),
        "lost_elsewhere_on_node_kill": find(rows, "lost_elsewhere", part="b", load="node_kill"),
        "in_flight_there_on_node_kill": find(rows, "in_flight_there", part="b", load="node_kill"),
        "silent_truncations": sum(silent) if silent else None,
        "real_two_over_one": find(rows, "two_over_one", load="ratio"),
    }


def main() -> int:
    args = parse_arguments()
    rows: list[dict] = []
    if "a" in args.parts:
        harness.progress("(a) plan times")
        rows.append(plan_times())
        policies = ["ours", "stock", "hash_bounded"] if args.quick else list(POLICIES)
        traffic, outcomes, more = run_replay(300_000 if args.quick else 1_000_000, policies)
        rows += more
        if not args.quick:
            from cluster_plots import plot_shift

            plot_shift(traffic, outcomes, harness.RESULTS)
        del traffic, outcomes
    if "b" in args.parts:
        from cluster_live import stand_in_cluster

        rows += stand_in_cluster(25.0 if args.quick else 75.0)
    if "c" in args.parts:
        from cluster_live import real_replicas

        rows += real_replicas(args.model or smollm2(), 15.0 if args.quick else 60.0)
    result = result_of(rows, args.quick)
    for row in rows:
        harness.progress(str(row))
    if not args.quick:
        shared = harness.environment()
        harness.append_rows(FILE, [{**shared, **row} for row in [*rows, result]])
    harness.finish(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
