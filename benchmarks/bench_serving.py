"""The paper's serving experiment on this machine: every request its own adapter, through real OpenAI servers.

    python benchmarks/bench_serving.py --quick                  # 10 minutes on 2 cores, prints the summary
    python benchmarks/bench_serving.py --lengths LENGTHS.csv    # everything, rows and plots in benchmarks/results

Three servers run side by side and get traffic in turn, so that a ratio compares the same minutes of the machine:
plain vLLM, vLLM with its own LoRA, and vLLM with this plugin (FLoRA, LoRA, mixed and base-only traffic), each in its
default mode (vLLM's own LoRA turns torch.compile off on CPU). Request lengths are ShareGPT's, scaled by --scale.
LENGTHS.csv has columns prompt_tokens, output_tokens; without it lengths have ShareGPT's means, exponentially spread.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import RESULTS, append_rows, environment, finish, progress, summary
from serving_adapters import make_pool
from serving_bound import predicted_ratios
from serving_load import at_rate, make_requests, percentile, read_lengths, saturate
from tqdm import tqdm

from flora_vllm.commands.server_process import ServerProcess, engine_threads
from flora_vllm.demo.model_assets import fetch_smollm2
from flora_vllm.environment import cache_root

POOL, SLOTS, CONCURRENCY = 64, 32, 16
RANKS = (1, 2, 4, 8, 16, 32)
SCALE_POOLS = (64, 512, 2000)


@dataclass(frozen=True)
class Traffic:
    """One kind of traffic: which server gets it, which models it asks for, how they are drawn."""

    name: str
    server: str
    pool: tuple[str, ...]
    law: str = "zipf"


@dataclass
class Setup:
    """What one run needs; `rates` holds the measured tokens/s of every traffic, in order of rounds."""

    options: argparse.Namespace
    model: Path
    lengths: list[tuple[int, int]]
    servers: dict[str, ServerProcess] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)


def main() -> None:
    options = _arguments()
    setup = Setup(options, fetch_smollm2(cache_root() / "smollm2"), read_lengths(options.lengths, options.scale))
    os.environ.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flora-pools-")))
        pools = _start(setup, stack, folder)
        traffics = _traffics(options, pools)
        _throughput(setup, traffics)
        latencies = [] if options.quick else _latency(setup, traffics)
    result = _summary(setup)
    rows = _rows(setup, traffics, latencies)
    for row in rows:
        print(json.dumps(row))
    if options.write or not options.quick:
        append_rows(RESULTS / "serving.jsonl", [*rows, {**environment(), **result}])
    if not options.quick:
        from serving_plots import plot

        plot(rows, RESULTS)
    finish(result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ranks 1 and 8, fewer requests, nothing written")
    parser.add_argument("--write", action="store_true", help="write a quick run's rows all the same")
    parser.add_argument("--lengths", type=Path, help="CSV of prompt_tokens,output_tokens")
    parser.add_argument("--scale", type=float, default=0.125, help="factor on every length (default: 0.125)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 3)", default=3)
    parser.add_argument("--requests", type=int, help="requests of a traffic in a round (default: 40, quick 32)")
    options = parser.parse_args()
    options.requests = options.requests or (32 if options.quick else 40)
    options.ranks = (1, 8) if options.quick else RANKS
    options.scale_pools = (64, 2000) if options.quick else SCALE_POOLS
    return options


def _pools(setup: Setup, folder: Path) -> dict[str, dict[str, Path]]:
    progress("writing adapters")
    pools = {f"flora_r{r}": make_pool(folder, setup.model, "flora", r, POOL) for r in setup.options.ranks}
    pools["lora_r8"] = make_pool(folder, setup.model, "lora", 8, POOL)
    pools["scale"] = make_pool(folder, setup.model, "flora", 1, max(setup.options.scale_pools))
    return pools


def _start(setup: Setup, stack: contextlib.ExitStack, folder: Path) -> dict[str, dict[str, Path]]:
    """The servers, all starting at once while the adapters are written; returns the pools of adapters."""
    common = ["--max-num-seqs", str(CONCURRENCY), "--no-enable-prefix-caching"]
    adapted = [*common, "--enable-lora", "--max-loras", str(SLOTS), "--max-lora-rank", "32", "--max-cpu-loras", "4096"]
    wanted = {
        "vllm": (False, common),
        "vllm_lora": (False, adapted),
        "plugin": (True, [*adapted, "--max-flora-rank", "32"]),
    }
    for name, (flora, options) in wanted.items():
        setup.servers[name] = ServerProcess(
            setup.model, served_name="base", eager=False, quiet=True, flora=flora, options=options
        )
        stack.push(setup.servers[name])
    progress("starting three servers")
    with ThreadPoolExecutor(len(wanted)) as threads:
        starts = [threads.submit(server.__enter__) for server in setup.servers.values()]
        pools = _pools(setup, folder)
        for start in starts:
            start.result()
    progress("servers are up")
    _register(setup.servers["vllm_lora"], pools["lora_r8"])
    everything = {name: path for pool in pools.values() for name, path in pool.items()}
    _register(setup.servers["plugin"], everything)
    return pools


def _register(server: ServerProcess, adapters: dict[str, Path]) -> None:
    def load(item: tuple[str, Path]) -> None:
        body = json.dumps({"lora_name": item[0], "lora_path": str(item[1])}).encode()
        request = urllib.request.Request(f"{server.url}/load_lora_adapter", body, {"content-type": "application/json"})
        urllib.request.urlopen(request, timeout=600).close()

    with ThreadPoolExecutor(4) as pool:
        list(tqdm(pool.map(load, adapters.items()), total=len(adapters), desc="loading adapters", file=sys.stderr))


def _traffics(options: argparse.Namespace, pools: dict[str, dict[str, Path]]) -> list[Traffic]:
    lora = tuple(pools["lora_r8"])
    traffics = [
        Traffic("vllm", "vllm", ("base",)),
        Traffic("base_only", "plugin", ("base",)),
        Traffic("vllm_lora_r8", "vllm_lora", lora),
        Traffic("lora_r8", "plugin", lora),
    ]
    for rank in options.ranks:
        flora = tuple(pools[f"flora_r{rank}"])
        traffics.append(Traffic(f"flora_r{rank}", "plugin", flora))
        if not options.quick:
            traffics.append(Traffic(f"flora_r{rank}_uniform", "plugin", flora, "uniform"))
    half = POOL // 2
    mix = tuple(name for pair in zip(list(pools["flora_r8"])[:half], lora[:half], strict=True) for name in pair)
    traffics.append(Traffic("mix", "plugin", mix))
    for size in options.scale_pools:
        traffics.append(Traffic(f"adapters_{size}", "plugin", tuple(pools["scale"])[:size]))
    return traffics


def _throughput(setup: Setup, traffics: Sequence[Traffic]) -> None:
    """Rounds of all traffics, one after the other, every traffic of a round with the same request lengths."""
    for turn in range(-1, setup.options.rounds):
        for traffic in traffics:
            count = CONCURRENCY if turn < 0 else setup.options.requests
            requests = make_requests(setup.lengths, count, traffic.pool, traffic.law, seed=turn + 1)
            rate = asyncio.run(saturate(setup.servers[traffic.server].url, requests, CONCURRENCY))
            if turn >= 0:  # the round before the first one warms up
                setup.rates.setdefault(traffic.name, []).append(rate)
                progress(f"round {turn + 1}: {traffic.name:20} {rate:7.1f} tokens/s")


def _latency(setup: Setup, traffics: Sequence[Traffic]) -> list[dict]:
    """Streamed requests at fixed rates, as fractions of what plain vLLM can take at saturation."""
    mean_output = statistics.mean(output for _, output in setup.lengths)
    capacity_per_s = statistics.median(setup.rates["vllm"]) / mean_output
    chosen = [t for t in traffics if t.name in ("vllm", "vllm_lora_r8", "lora_r8", "flora_r1", "flora_r8", "mix")]
    rows = []
    for share in (0.2, 0.4, 0.6, 0.8):
        for traffic in chosen:
            requests = make_requests(setup.lengths, 24, traffic.pool, traffic.law, seed=7)
            url, rate = setup.servers[traffic.server].url, share * capacity_per_s
            found = asyncio.run(at_rate(url, requests, rate, seed=7))
            row = {"traffic": traffic.name, "rate_per_s": round(rate, 3), "requests": len(found)}
            for name, values in (
                ("first_token_s", [x.first_token_s for x in found]),
                ("per_token_s", [x.per_token_s for x in found]),
            ):
                row |= {f"{name}_p{p}": round(percentile(values, p), 4) for p in (50, 99)}
            progress(f"{share:.1f} of capacity: {traffic.name:16} first token p50 {row['first_token_s_p50']:.2f} s")
            rows.append(row)
    return rows


def _ratio(setup: Setup, name: str, against: str) -> float:
    """Median over rounds of one traffic's rate over another's in the same round."""
    pairs = zip(setup.rates[name], setup.rates[against], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)


def _summary(setup: Setup) -> dict:
    torch.set_num_threads(engine_threads())  # the bound is measured as the engines run
    token_s = 1 / statistics.median(setup.rates["base_only"])
    bounds = predicted_ratios(setup.model, setup.options.ranks, POOL, CONCURRENCY, token_s, setup.lengths)
    return {
        "benchmark": "serving",
        "quick": setup.options.quick,
        "base_only_vs_vllm": _ratio(setup, "base_only", "vllm"),
        "flora_r1_vs_vllm": _ratio(setup, "flora_r1", "vllm"),
        "flora_r8_vs_vllm": _ratio(setup, "flora_r8", "vllm"),
        "lora_r8_vs_vllm": _ratio(setup, "lora_r8", "vllm"),
        "flora_r8_vs_vllm_lora_r8": _ratio(setup, "flora_r8", "vllm_lora_r8"),
        "lora_r8_vs_vllm_lora_r8": _ratio(setup, "lora_r8", "vllm_lora_r8"),
        "flora_r8_vs_bound": round(_ratio(setup, "flora_r8", "base_only") / bounds[8], 4),
        "predicted_vs_base_only": {f"flora_r{rank}": round(bound, 4) for rank, bound in bounds.items()},
        "measured_vs_base_only": {f"flora_r{rank}": _ratio(setup, f"flora_r{rank}", "base_only") for rank in bounds},
        "mix_vs_vllm": _ratio(setup, "mix", "vllm"),
        "adapters_2000_vs_64": _ratio(setup, "adapters_2000", "adapters_64"),
    }


def _rows(setup: Setup, traffics: Sequence[Traffic], latencies: Sequence[dict]) -> list[dict]:
    common = {
        **environment(),
        "benchmark": "serving",
        "model": "SmolLM2-135M-Instruct bfloat16",
        "lengths": "ShareGPT" if setup.options.lengths else "exponential with ShareGPT's means",
        "scale": setup.options.scale,
        "concurrency": CONCURRENCY,
        "slots": SLOTS,
        "engine_threads": engine_threads(),
    }
    throughput = [
        {
            **common,
            "kind": "throughput",
            "traffic": t.name,
            "pool": len(t.pool),
            "law": t.law,
            "requests": setup.options.requests,
            "tokens_per_s": summary(setup.rates[t.name], 1),
        }
        for t in traffics
    ]
    return throughput + [{**common, "kind": "latency", **row} for row in latencies]


if __name__ == "__main__":
    main()
