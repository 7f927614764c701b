"""The cluster benchmark's parts on a real Serve: (b) four nodes with stand-in engines, (c) two real vLLM replicas."""

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster_fleet as fleets
import harness

HOT_SHARE, RATE_PER_S, NODES, SLOTS = 0.7, 20.0, 4, 6
NAMES = [f"a{i}" for i in range(16)]


def hot(i: int) -> str:
    """70 % of the requests are for a0, the rest even over a1 to a7; the same sequence every time."""
    return "a0" if i % 10 < 10 * HOT_SHARE else NAMES[1 + i % 7]


def zipf(i: int) -> str:
    """Ranks of a Zipf law with exponent 1 over 16 adapters, dealt by a fixed generator."""
    return NAMES[_ZIPF[i % len(_ZIPF)]]


def _zipf_ranks() -> list[int]:
    import numpy as np

    weights = 1 / np.arange(1, len(NAMES) + 1)
    return np.random.default_rng(0).choice(len(NAMES), 4096, p=weights / weights.sum()).tolist()


_ZIPF = _zipf_ranks()


def _drive_handle(handle: Any, entries: dict[str, Any], pick: Callable[[int], str], seconds: float) -> list[Any]:
    """Open-loop load through a deployment handle: Serve's own router, no HTTP. (arrival s, latency s) each.

    Each adapter is asked for once before, quietly, as adapters are that turn hot later.
    """
    handles = {
        name: handle.options(stream=True, multiplexed_model_id=entry.id).completions for name, entry in entries.items()
    }

    async def send(i: int, begin: float) -> tuple[float, float]:
        name, at = pick(i), time.monotonic()
        async for _ in handles[name].remote({}, None, entries[name]):
            pass
        return at - begin, time.monotonic() - at

    async def run() -> list[Any]:
        for i in range(len(NAMES)):
            async for _ in handles[NAMES[i]].remote({}, None, entries[NAMES[i]]):
                pass
        return (await fleets.drive(seconds, RATE_PER_S, send, patience_s=1.2 * seconds))[0]

    return asyncio.run(run())


def _latency(samples: list[Any], from_s: float, seconds: float) -> dict[str, float]:
    """Of requests that arrived after `from_s`; those that never ended count as the longest."""
    expected = int((seconds - from_s) * RATE_PER_S)
    late = [s for at, s in samples if at >= from_s]
    late += [float("inf")] * max(0, expected - len(late) - 1)
    return {f"p{p}_s": round(fleets.percentile(late, p / 100), 3) for p in (50, 95, 99)}


def stand_in_cluster(seconds: float) -> list[dict]:
    """Rows for hot load (ours, stock), Zipf load (ours, stock) and a killed node (ours)."""
    from cluster_standin import STAND_IN, STOCK, EngineSize, make_adapters, stand_in_app, stock_app

    from flora_vllm.cluster.config import ClusterConfig, parse
    from flora_vllm.cluster.store import Catalogue

    folder, engine, port = Path(tempfile.mkdtemp(prefix="flora-bench-")), EngineSize(), fleets.free_port()
    make_adapters(folder / "adapters", NAMES)
    model = {
        "name": "base",
        "source": "none",
        "adapters": [str(folder / "adapters")],
        "slots": SLOTS,
        "replicas": NODES,
        "cpus": 0.5,
        "routing": {"spill_queue": engine.lanes},
    }
    config = parse(ClusterConfig, {"models": [model], "store": {"cache_dir": str(folder / "cache"), "scan_s": 5.0}})
    entries = {e.name: e for e in Catalogue([str(folder / "adapters")]).scan()[0]}
    bundle = {"CPU": 0.5, "GPU": 1}
    setup = {"nodes": NODES, "slots": SLOTS, "rate_per_s": RATE_PER_S, "seconds": seconds, **vars(engine)}
    rows = []
    with fleets.fleet(NODES, port, gpus=1) as fleet:
        import ray
        from ray import serve

        from flora_vllm.cluster.ray_hooks import find_controller

        from_s = min(60.0, 0.7 * seconds)
        serve.run(stock_app(NODES, SLOTS, engine, bundle), name="stock", route_prefix=None)
        for load in (hot, zipf):
            harness.progress(f"(b) stock router, {load.__name__} load")
            samples = _drive_handle(serve.get_deployment_handle(STOCK, "stock"), entries, load, seconds)
            latency = _latency(samples, from_s, seconds)
            rows.append({"part": "b", "policy": "stock", "load": load.__name__, **setup, "from_s": from_s, **latency})
        serve.delete("stock")
        serve.run(stand_in_app(config, engine, bundle), name="flora", route_prefix="/")

        def copies(name: str) -> int:
            state: Any = ray.get(find_controller("flora", STAND_IN).status.remote(), timeout=30)
            return sum(entries[name].id in x["resident"] for x in state["replicas"].values())

        for load in (hot, zipf):
            harness.progress(f"(b) ours, {load.__name__} load")
            samples = _drive_handle(serve.get_deployment_handle(STAND_IN, "flora"), entries, load, seconds)
            latency = _latency(samples, from_s, seconds)
            row = {"part": "b", "policy": "ours", "load": load.__name__, **setup, "from_s": from_s, **latency}
            rows.append({**row, "hot_copies": copies("a0")})
        harness.progress("(b) ours, node killed under load")
        rows.append({**setup, **_node_kill(fleet, port)})
    return rows


def _node_kill(fleet: Any, port: int) -> dict:
    """Zipf load through the ingress while a node dies, between the kill and the moment Ray knows of it."""
    victim, moments = fleet.nodes[0], []

    def kill() -> None:
        moments.append(time.monotonic())
        fleet.kill_node(victim)
        moments.append(time.monotonic())

    samples = fleets.drive_http(f"http://127.0.0.1:{port}", 15, RATE_PER_S, zipf, [(4.0, kill)])
    killed, noticed = moments
    lost = [s for s in samples if s.kind != "ok"]
    there = [s for s in samples if s.node == victim.node_id and s.began < noticed and s.began + s.seconds > killed]
    return {
        "part": "b",
        "policy": "ours",
        "load": "node_kill",
        "requests": len(samples),
        "kinds": fleets.kinds(samples),
        "lost": len(lost),
        "lost_elsewhere": sum(s.node != victim.node_id for s in lost),
        "in_flight_there": len(there),
        "noticed_after_s": round(noticed - killed, 2),
        "silent": sum(s.kind == "silent" for s in samples),
    }


def _llm_config(model: Path, adapters: Path, cache: Path, port: int) -> Any:
    from flora_vllm.cluster.config import ClusterConfig, parse

    return parse(
        ClusterConfig,
        {
            "models": [
                {
                    "name": "base",
                    "source": str(model),
                    "adapters": [str(adapters)],
                    "slots": 8,
                    "replicas": 2,
                    "device": "cpu",
                    "cpus": 1,
                    "defaults": {"min_copies": 2},
                    "routing": {"spill_queue": 8},
                    "engine": {
                        "dtype": "bfloat16",
                        "enforce_eager": True,
                        "max_model_len": 512,
                        "max_num_seqs": 16,
                        "kv_cache_memory_bytes": 128 << 20,
                    },
                    "environment": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"},
                }
            ],
            "store": {"cache_dir": str(cache)},
            "ingress": {"port": port, "cpus": 1},
            "timing": {"lost_s": 15},
        },
    )


def _write_adapters(model: Path, folder: Path, count: int) -> list[str]:
    """FLoRA adapters of rank 4 on the attention of `model`; random factors near one."""
    import torch
    from safetensors import safe_open

    import flora_vllm

    shapes = {}
    with safe_open(model / "model.safetensors", "pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a dict
            if key.endswith(("q_proj.weight", "v_proj.weight", "o_proj.weight")):
                shapes[key.removesuffix(".weight")] = tuple(weights.get_slice(key).get_shape())
    names = [f"flora{i}" for i in range(count)]
    for seed, name in enumerate(names):
        g = torch.Generator().manual_seed(seed)
        factors = {
            module: (1 + 0.1 * torch.randn(4, i, generator=g), 1 + 0.1 * torch.randn(o, 4, generator=g))
            for module, (o, i) in shapes.items()
        }
        flora_vllm.write_flora(folder / name, factors, reduction="mean")
    return names


def _throughput(url: str, models: list[str], seconds: float, clients: int = 16, tokens: int = 32) -> dict:
    """Closed loop: `clients` ask one after the other for `tokens` tokens each; only whole answers inside count."""
    import httpx

    async def run() -> tuple[int, int]:
        done = failed = 0
        end = time.monotonic() + seconds

        async def work(i: int, client: httpx.AsyncClient) -> None:
            nonlocal done, failed
            body = {"prompt": "The quick brown fox", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            while time.monotonic() < end:
                i += 1
                answer = await client.post(f"{url}/v1/completions", json={**body, "model": models[i % len(models)]})
                if time.monotonic() <= end:
                    done += answer.status_code == 200
                    failed += answer.status_code != 200

        async with httpx.AsyncClient(timeout=120) as client:
            await asyncio.gather(*(work(i, client) for i in range(clients)))
        return done, failed

    done, failed = asyncio.run(run())
    return {"tokens_per_s": round(done * tokens / seconds, 1), "answers": done, "failed": failed, "clients": clients}


def _homes(config: Any) -> set[str]:
    """Nodes that replicas report from; empty while there is no controller."""
    import ray
    from ray.exceptions import RayError

    from flora_vllm.cluster.ray_hooks import controller_names, find_controller

    try:
        (deployment,) = controller_names(config.name)
        state: Any = ray.get(find_controller(config.name, deployment).status.remote(), timeout=30)
    except (ValueError, RayError):
        return set()
    return {x["node"] for x in state["replicas"].values()}


def real_replicas(model: Path, seconds: float) -> list[dict]:
    """Rows for two real replicas, a node killed under streams, and the one that is left."""
    from flora_vllm.cluster import operate

    folder, port = Path(tempfile.mkdtemp(prefix="flora-bench-")), fleets.free_port()
    models = ["base", *_write_adapters(model, folder / "adapters", 4)]
    url = f"http://127.0.0.1:{port}"
    setup = {"part": "c", "model": model.name, "adapters": len(models) - 1, "rank": 4, "seconds": seconds}
    # Two engines and the ingress take all three CPUs of the fleet, so no node has two of them.
    with fleets.fleet(2, port, head_cpus=1, cpus=1) as fleet:
        harness.progress("(c) starting two vLLM replicas")
        config = _llm_config(model, folder / "adapters", folder / "cache", port)
        operate.up(config)
        assert len(_homes(config)) == 2, "each replica has a node of its own"
        _throughput(url, models, 5)
        harness.progress("(c) two replicas")
        two = _throughput(url, models, seconds)
        harness.progress("(c) node killed under streams")
        homes = _homes(config)
        victim = next(n for n in fleet.nodes if n.node_id in homes)
        body = {"prompt": "The quick brown fox", "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        samples = fleets.drive_http(
            url, 10, 3, lambda i: models[i % len(models)], [(4.0, lambda: fleet.kill_node(victim))], body
        )
        assert fleets.wait_for(lambda: len(_homes(config)) == 1, 60), "one replica is left"
        kill = {
            "load": "node_kill",
            "kinds": fleets.kinds(samples),
            "requests": len(samples),
            "silent": sum(s.kind == "silent" for s in samples),
        }
        harness.progress("(c) one replica")
        one = _throughput(url, models, seconds)
    ratio = round(two["tokens_per_s"] / one["tokens_per_s"], 3) if one["tokens_per_s"] else None
    return [
        {**setup, "load": "two", **two},
        {**setup, **kill},
        {**setup, "load": "one", **one},
        {**setup, "load": "ratio", "two_over_one": ratio},
    ]
