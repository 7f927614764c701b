"""What operators feel: streams while adapters load, more active adapters than slots, memory over cycles, start-up.

    python benchmarks/bench_operate.py --quick     # at most 12 minutes on 2 cores, prints the summary
    python benchmarks/bench_operate.py             # everything, a row in benchmarks/results/operate.jsonl

SmolLM2-135M behind real servers: this plugin, and vLLM's own LoRA beside it for the time of a load. A quick run
registers 1,000 adapters and starts with 500, both counted as if they were 10,000 and 2,000, and cycles 200 times;
`quick` in its row says so. Registered adapters' memory is that of all processes, host memory of as many as fit included
(`--adapter-memory`); their copies on disk, `registered_copies_gib`, are memory too where the temporary directory is.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from harness import RESULTS, append_rows, environment, finish, progress
from operate_streams import (
    cpu_s,
    first_token_s,
    gaps_while,
    in_parallel,
    load,
    load_phases_s,
    names,
    resident_bytes,
    thrash,
    unload,
)
from serving_adapters import make_pool
from serving_load import percentile

from flora_vllm.commands.server_process import ServerProcess
from flora_vllm.demo.model_assets import fetch_smollm2
from flora_vllm.environment import cache_root
from flora_vllm.formats.files import FILE_NAMES

SLOTS, STREAMS = 8, 16
LOADS = 22  # of which one costs what is told; two more come first
# Of registered adapters: about 400 of SmolLM2's of rank 1, which FILLING more than fill.
HOST_MEMORY, FILLING = "256MiB", 500
PARTS = ("loads", "thrash", "cycles", "start", "registered")


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `started` and `registered` are scaled to 2,000 and 10,000."""

    loads: int
    thrash_requests: int
    cycles: int
    started: int
    registered: int


FULL = Sizes(loads=200, thrash_requests=256, cycles=2000, started=2000, registered=10_000)
QUICK = Sizes(loads=24, thrash_requests=96, cycles=200, started=500, registered=1000)


def main() -> None:
    options = _arguments()
    sizes = QUICK if options.quick else FULL
    model = fetch_smollm2(cache_root() / "smollm2")
    os.environ.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    result: dict = {"benchmark": "operate", "quick": options.quick, "slots": SLOTS, "streams": STREAMS}
    with tempfile.TemporaryDirectory(prefix="flora-operate-") as text:
        folder = Path(text)
        os.environ["VLLM_LORA_RESOLVER_CACHE_DIR"] = text  # adapters are also found by name, at their first use
        progress("writing adapters")
        pool = make_pool(folder, model, "flora", 8, max(sizes.loads, 4 * SLOTS))
        lora = make_pool(folder, model, "lora", 8, sizes.loads if "loads" in options.parts else 0)
        if {"loads", "thrash", "cycles"} & set(options.parts):
            with _server(model) as server:
                if "loads" in options.parts:
                    result |= asyncio.run(_loads(server, {"flora": pool, "lora": lora}, sizes))
                if "thrash" in options.parts:
                    result |= asyncio.run(_thrash(server.url, pool, sizes))
                if "cycles" in options.parts:
                    result |= asyncio.run(_cycles(server, pool, sizes))
        if "loads" in options.parts:
            with _server(model, flora=False) as server:
                result |= asyncio.run(_load_cost(server, lora, "vllm_lora_r8"))
        small = make_pool(folder, model, "flora", 1, _small(options.parts, sizes))
        if "start" in options.parts:
            result |= _start(model, small, sizes)
        if "registered" in options.parts:
            with _server(model, "--adapter-memory", HOST_MEMORY) as server:
                result |= asyncio.run(_registered(server, small, sizes))
    row = {**environment(), **result}
    if not options.quick or options.write:
        append_rows(RESULTS / "operate.jsonl", [row])
    finish(row)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything, nothing written")
    parser.add_argument("--write", action="store_true", help="write a quick run's row all the same")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these (default: all)")
    return parser.parse_args()


def _small(parts: tuple[str, ...], sizes: Sizes) -> int:
    return max(sizes.started if "start" in parts else 0, sizes.registered if "registered" in parts else 0)


@contextlib.contextmanager
def _server(
    model: Path, *options: str, flora: bool = True, adapters: Mapping[str, Path] | None = None
) -> Iterator[ServerProcess]:
    common = ["--enable-lora", "--max-loras", str(SLOTS), "--max-num-seqs", str(2 * STREAMS), "--max-lora-rank", "8"]
    common += ["--no-enable-prefix-caching"]
    cached = [] if "--max-cpu-loras" in options else ["--max-cpu-loras", "512"]
    more = [*common, *cached, *options]
    with ServerProcess(model, adapters, flora=flora, served_name="base", quiet=True, options=more) as server:
        progress("a server is up")
        yield server


async def _load_cost(server: ServerProcess, pool: Mapping[str, Path], name: str) -> dict:
    """Median milliseconds of a load by the API, nothing else running, and means of those that it works in the engine
    (read, check, cut, keep, write; of ours only) and that all processes take of a core, HTTP and idle ones included."""
    items = list(pool.items())[: 2 + LOADS]
    async with aiohttp.ClientSession() as session:
        for adapter, path in items[:2]:
            await load(session, server.url, adapter, path)
        began, worked = cpu_s(server.pid), load_phases_s(server.url)
        times = [await load(session, server.url, adapter, path) for adapter, path in items[2:]]
        took = (cpu_s(server.pid) - began) / len(times)
        worked = (load_phases_s(server.url) - worked) / len(times)
        for adapter, _ in items:
            await unload(session, server.url, adapter)
    return {
        f"load_ms_{name}": round(1e3 * statistics.median(times), 2),
        f"load_cpu_ms_{name}": round(1e3 * took, 2),
        **({f"load_work_ms_{name}": round(1e3 * worked, 2)} if worked else {}),
    }


async def _loads(server: ServerProcess, pools: Mapping[str, Mapping[str, Path]], sizes: Sizes) -> dict:
    """Streams with and without adapters loading: one after another, eight at once, and at their first use. And with the
    same requests as the first uses were, of adapters that are there, eight at once (all their prompts are one step's)
    and one after another: what they cost whoever loads them when."""
    url = server.url
    result = await _load_cost(server, pools["flora"], "flora_r8") | await _load_cost(server, pools["lora"], "lora_r8")
    undisturbed = await gaps_while(url, ["base"] * STREAMS, lambda _: asyncio.sleep(10.0))
    quiet = percentile(undisturbed, 99)
    result["itl_p99_quiet_ms"] = round(1e3 * quiet, 2)
    result["itl_p50_quiet_ms"] = round(1e3 * statistics.median(undisturbed), 2)
    for family, pool in pools.items():
        gaps = await _gaps_by_kind_of_load(url, list(pool.items())[: sizes.loads])
        shown = "" if family == "flora" else f"{family}_"
        for kind, of_kind in gaps.items():
            result[f"itl_p99_{shown}{kind}_over_quiet"] = round(percentile(of_kind, 99) / quiet, 3)
        busy = [gap for kind, of_kind in gaps.items() if not kind.startswith("warm") for gap in of_kind]
        result[f"itl_p99_{shown}loads_ms"] = round(1e3 * percentile(busy, 99), 2)
        result[f"itl_p99_{shown}loads_over_quiet"] = round(percentile(busy, 99) / quiet, 3)
        result[f"itl_max_{shown}loads_over_quiet"] = round(max(busy) / quiet, 3)
    progress(f"loads: {result}")
    return result


async def _gaps_by_kind_of_load(url: str, wanted: Sequence[tuple[str, Path]]) -> dict[str, list[float]]:
    """Seconds between tokens of the streams, a third of the adapters loading in each of three ways; warm uses last."""
    third = len(wanted) // 3
    found = [name for name, _ in wanted[2 * third :]]
    warm = [*found[-SLOTS:]] * (len(found) // SLOTS)

    async def by_api(session: aiohttp.ClientSession, some: Sequence[tuple[str, Path]], width: int) -> None:
        await in_parallel([lambda n=n, p=p: load(session, url, n, p) for n, p in some], width)

    async def by_use(session: aiohttp.ClientSession, used: Sequence[str], width: int) -> None:
        await in_parallel([lambda n=n: first_token_s(session, url, n) for n in used], width)

    works = {
        "one_by_one": lambda session: by_api(session, wanted[:third], 1),
        "eight_at_once": lambda session: by_api(session, wanted[third : 2 * third], 8),
        "first_use": lambda session: by_use(session, found, 8),
        "warm_use": lambda session: by_use(session, warm, 8),
        "warm_one_by_one": lambda session: by_use(session, warm, 1),
    }
    gaps = {kind: await gaps_while(url, ["base"] * STREAMS, work) for kind, work in works.items()}
    async with aiohttp.ClientSession() as session:
        for name in names(url) & {name for name, _ in wanted}:
            await unload(session, url, name)
    return gaps


async def _thrash(url: str, pool: Mapping[str, Path], sizes: Sizes) -> dict:
    """As many active adapters as slots, twice and four times as many."""
    async with aiohttp.ClientSession() as session:
        for name, path in list(pool.items())[: 4 * SLOTS]:
            await load(session, url, name, path)
    found = {}
    for times in (1, 2, 4):
        models = list(pool)[: times * SLOTS]
        await thrash(url, models, len(models), SLOTS)  # warm
        found[times] = await thrash(url, models, sizes.thrash_requests, STREAMS)
    warm = statistics.median(found[1][1])
    async with aiohttp.ClientSession() as session:
        for name in names(url) & set(pool):
            await unload(session, url, name)
    result = {
        "thrash2_throughput": round(found[2][0] / found[1][0], 3),
        "thrash4_throughput": round(found[4][0] / found[1][0], 3),
        "thrash2_ttft_p50_over_warm": round(statistics.median(found[2][1]) / warm, 3),
        "thrash2_ttft_max_s": round(max(found[2][1]), 3),
    }
    progress(f"thrash: {result}")
    return result


async def _cycles(server: ServerProcess, pool: Mapping[str, Path], sizes: Sizes) -> dict:
    """Memory after a tenth of the cycles against after all of them, as a fraction."""
    items = list(pool.items())[:16]
    start = 0
    async with aiohttp.ClientSession() as session:
        for cycle in range(sizes.cycles):
            name, path = items[cycle % len(items)]
            await load(session, server.url, name, path)
            if cycle % 10 == 0:
                await first_token_s(session, server.url, name)
            await unload(session, server.url, name)
            if cycle == sizes.cycles // 10:
                start = resident_bytes(server.pid)
    growth = resident_bytes(server.pid) / start - 1
    progress(f"{sizes.cycles} cycles: memory {growth:+.2%}")
    return {"cycles": sizes.cycles, "cycles_rss_growth": round(growth, 4)}


def _start(model: Path, small: Mapping[str, Path], sizes: Sizes) -> dict:
    """Seconds that 2,000 adapters on the command line add to a server's start."""
    seconds = []
    for adapters in (None, dict(list(small.items())[: sizes.started])):
        begin = time.perf_counter()
        with _server(model, "--max-cpu-loras", str(sizes.started + SLOTS), adapters=adapters):
            seconds.append(time.perf_counter() - begin)
    added = (seconds[1] - seconds[0]) * 2000 / sizes.started
    progress(f"start: {seconds}")
    return {"start_empty_s": round(seconds[0], 1), "start_2000_s": round(added, 1)}


async def _registered(server: ServerProcess, small: Mapping[str, Path], sizes: Sizes) -> dict:
    """GiB that 10,000 adapters of rank 1 take beside the engine: what its host memory holds, and each one more."""
    items = list(small.items())
    taken = [resident_bytes(server.pid)]
    async with aiohttp.ClientSession() as session:
        for some in (items[:FILLING], items[FILLING : sizes.registered]):
            await in_parallel([lambda n=n, p=p: load(session, server.url, n, p) for n, p in some], 4)
            taken.append(resident_bytes(server.pid))
    each = (taken[2] - taken[1]) / (sizes.registered - FILLING)
    total = taken[1] - taken[0] + each * (10_000 - FILLING)
    copy = sum(file.stat().st_size for file in items[0][1].iterdir() if file.name in FILE_NAMES)
    result = {
        "registered_10000_gib": round(total / 2**30, 3),
        "registered_each_kib": round(each / 1024, 2),
        "registered_copies_gib": round(10_000 * copy / 2**30, 3),
    }
    progress(f"registered: {result}")
    return result


if __name__ == "__main__":
    main()
