"""Engines in lock-step: plain vLLM and this plugin on the same requests, one step each in turn.

    python benchmarks/bench_steps.py             # six passes; appends to benchmarks/results/serving.jsonl
    python benchmarks/bench_steps.py --quick     # two passes, writes nothing

Servers that take turns by the minute differ by tens of percent on a machine with noisy neighbours. Here two processes
hold an engine each, in vLLM's default (compiled) mode, without the HTTP server. Both get the same requests with
SmolLM2-135M in the same order, 16 at a time, with fixed output lengths, so that both schedule the same tokens step by
step; they step in turn, and the machine's mood meets both. A pass's ratio is plain vLLM's time over the plugin's, for
all steps of the pass: throughput, 1.0 = equal, higher is better. `step_ratio` is the median over single steps.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench_serving import CONCURRENCY, POOL, SLOTS
from harness import RESULTS, append_rows, environment, finish, progress, summary
from serving_adapters import ENGINE_HERE, make_pool
from serving_load import Request, make_requests, read_lengths
from tqdm import tqdm

from flora_vllm.commands.server_process import engine_threads
from flora_vllm.demo.model_assets import fetch_smollm2
from flora_vllm.environment import cache_root

TRAFFICS = ("base_only", "flora_r1", "lora_r8", "flora_r8")
# OpenMP's threads spin for a moment after a step; the other engine's step starts when they sleep.
PAUSE_S = 0.004


def main() -> None:
    options = _arguments()
    model = fetch_smollm2(cache_root() / "smollm2")
    lengths = read_lengths(options.lengths, options.scale)
    with tempfile.TemporaryDirectory(prefix="flora-steps-") as folder:
        pools = {"base_only": {"": Path()}}
        for traffic in options.traffics:
            if traffic == "base_only":
                continue
            kind, _, rank = traffic.partition("_r")
            pools[traffic] = make_pool(Path(folder), model, kind, int(rank), POOL)
        adapters = {name: path for pool in pools.values() for name, path in pool.items() if name}
        progress("starting two engines")
        plain, plugin = _Engine(model, None), _Engine(model, adapters)
        for engine in (plain, plugin):
            engine.hear()  # it is up
        ratios: dict[str, list[float]] = {traffic: [] for traffic in options.traffics}
        steps: dict[str, list[tuple[float, float]]] = {traffic: [] for traffic in options.traffics}
        for number in range(-1, options.passes):  # the one before the first warms up
            for traffic in options.traffics:
                requests = make_requests(lengths, options.requests, tuple(pools[traffic]), "zipf", seed=number + 1)
                pairs = _lock_step(plain, plugin, requests)
                if number >= 0:
                    ratios[traffic].append(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
                    steps[traffic] += pairs
                    progress(f"pass {number + 1}: {traffic:10} {len(pairs)} steps, ratio {ratios[traffic][-1]:.3f}")
        for engine in (plain, plugin):
            engine.end()
    rows = [_row(options, traffic, ratios[traffic], steps[traffic]) for traffic in options.traffics]
    for row in rows:
        print(json.dumps(row))
    if not options.quick:
        append_rows(RESULTS / "serving.jsonl", rows)
    finish({"benchmark": "steps", **{f"{t}_vs_vllm": round(statistics.median(ratios[t]), 4) for t in ratios}})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two passes, nothing written")
    parser.add_argument("--lengths", type=Path, help="CSV of prompt_tokens,output_tokens")
    parser.add_argument("--scale", type=float, default=0.125, help="factor on every length (default: 0.125)")
    parser.add_argument("--traffics", nargs="+", choices=TRAFFICS, default=TRAFFICS, help="default: all")
    parser.add_argument("--passes", type=int, help="passes over every traffic (default: 6, quick 2)")
    parser.add_argument("--requests", type=int, default=64, help="requests of a pass (default: 64)")
    options = parser.parse_args()
    options.passes = options.passes or (2 if options.quick else 6)
    return options


def _row(options: argparse.Namespace, traffic: str, ratios: Sequence[float], steps: Sequence[tuple]) -> dict:
    return {
        **environment(),
        "benchmark": "serving",
        "kind": "steps",
        "model": "SmolLM2-135M-Instruct bfloat16",
        "lengths": "ShareGPT" if options.lengths else "exponential with ShareGPT's means",
        "scale": options.scale,
        "concurrency": CONCURRENCY,
        "slots": SLOTS,
        "engine_threads": engine_threads(),
        "traffic": traffic,
        "pool": POOL,
        "requests": options.requests,
        "vs_vllm": summary(ratios, 4),
        "step_ratio": summary([a / b for a, b in steps], 4),
        "vllm_step_ms": summary([1e3 * a for a, _ in steps]),
        "plugin_step_ms": summary([1e3 * b for _, b in steps]),
    }


def _lock_step(plain: "_Engine", plugin: "_Engine", requests: Sequence[Request]) -> list[tuple[float, float]]:
    """(plain, plugin) seconds of every step; raises if the engines come to schedule different work."""
    bare = [Request(request.prompt, request.output_tokens, "") for request in requests]
    plain.ask(bare)
    plugin.ask(requests)
    for engine in (plain, plugin):
        engine.hear()
    pairs: list[tuple[float, float]] = []
    while True:
        found = {}
        for engine in (plain, plugin) if len(pairs) % 2 else (plugin, plain):
            engine.ask("step")
            found[engine] = engine.hear()
            time.sleep(PAUSE_S)
        if found[plain][1:] != found[plugin][1:]:
            raise RuntimeError(f"step {len(pairs)} differs: {found[plain]} {found[plugin]}")
        pairs.append((found[plain][0], found[plugin][0]))
        if found[plain][2] == 0:
            return pairs


class _Engine:
    """The parent's end of a process with an engine."""

    def __init__(self, model: Path, adapters: dict[str, Path] | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, str(model), adapters), daemon=True)
        self._process.start()
        other.close()

    def ask(self, what: Any) -> None:
        self._pipe.send(what)

    def hear(self) -> Any:
        return self._pipe.recv()

    def end(self) -> None:
        self.ask("end")
        self._process.join(30)


def _work(pipe: Connection, model: str, adapters: dict[str, Path] | None) -> None:
    """A process with an engine: plain vLLM if `adapters` is None, else the plugin. Answers (seconds, outputs, left)."""
    os.environ.update(ENGINE_HERE)
    import vllm
    from vllm.lora.request import LoRARequest

    import flora_vllm

    common: dict[str, Any] = {
        "model": model,
        "max_model_len": 2048,
        "max_num_seqs": CONCURRENCY,
        "kv_cache_memory_bytes": 512 << 20,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    named: dict[str, LoRARequest | None] = {"": None}
    if adapters is not None:
        llm = flora_vllm.LLM(max_loras=SLOTS, max_cpu_loras=1024, max_lora_rank=32, max_flora_rank=32, **common)
        for number, (name, path) in enumerate(tqdm(adapters.items(), desc="loading adapters", file=sys.stderr), 1):
            named[name] = LoRARequest(name, number, str(path))
            llm.llm_engine.add_lora(named[name])
    else:
        llm = vllm.LLM(**common)
    engine = llm.llm_engine
    pipe.send("up")
    waiting: list[Request] = []
    count = 0

    def fill(free: int) -> None:
        nonlocal count
        for _ in range(min(free, len(waiting))):
            request, count = waiting.pop(), count + 1
            sampling = vllm.SamplingParams(
                temperature=0, max_tokens=request.output_tokens, ignore_eos=True, detokenize=False
            )
            prompt: Any = {"prompt_token_ids": list(request.prompt)}
            engine.add_request(str(count), prompt, sampling, lora_request=named[request.model])

    while (message := pipe.recv()) != "end":
        if message != "step":
            waiting = list(reversed(message))
            fill(CONCURRENCY)
            pipe.send("ready")
            continue
        began = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - began
        fill(sum(output.finished for output in outputs))
        pipe.send((seconds, len(outputs), engine.get_num_unfinished_requests()))


if __name__ == "__main__":
    main()
