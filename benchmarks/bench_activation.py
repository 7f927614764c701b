"""What adapters that choose cost: mixes and gates in a layer, the first token of activated adapters in an engine.

    python benchmarks/bench_activation.py            # appends to benchmarks/results: ops.jsonl, serving.jsonl
    python benchmarks/bench_activation.py --quick    # three rounds, writes nothing

First ops_choices.py, in a process of its own: a mix of four adapters and MeteoRA's gate among 28, each over one adapter
of the summed ranks. Then the time to first token of aLoRA and aFLoRA on a context that the base has already read:
SmolLM2-135M in bfloat16, one engine in this process. Before each call the prefix cache is emptied and the base model
reads the context, as a conversation leaves it. Then one caller sends context, four tokens and a fresh tail and gets one
token: the base model, an activated LoRA of rank 8, an activated FLoRA of rank 2, and a LoRA of rank 8 that applies to
every token and so has to read the context again. All four take turns in every round. The row has milliseconds, tokens
taken from the cache, and each caller's median over the base model's in the same round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, append_rows, environment, finish, progress, summary
from serving_adapters import ENGINE_HERE, make_pool

from flora_vllm.commands.server_process import engine_threads
from flora_vllm.demo.model_assets import fetch_smollm2
from flora_vllm.environment import cache_root

INVOCATION = [30001, 30002, 30003, 30004]
TAIL = 16
CALLERS: tuple[str, ...] = ("base", "alora_r8", "aflora_r2", "lora_r8")


def main() -> None:
    options = _arguments()
    choices = _choices(options.quick)
    model = fetch_smollm2(cache_root() / "smollm2")
    with tempfile.TemporaryDirectory(prefix="flora-activation-") as folder:
        adapters = _adapters(Path(folder), model)
        progress("starting the engine")
        llm = _engine(model, options.context)
        seconds: dict[str, list[float]] = {caller: [] for caller in CALLERS}
        cached: dict[str, int] = {}
        for number in range(-1, options.rounds):  # the one before the first loads adapters and warms up
            for caller in CALLERS:
                took, cached[caller] = _call(llm, adapters[caller], options.context, seed=number + 1)
                if number >= 0:
                    seconds[caller].append(took)
            progress(f"round {number + 1}: " + ", ".join(f"{c} {s[-1] * 1e3:.0f} ms" for c, s in seconds.items() if s))
    row = {
        **environment(),
        "benchmark": "serving",
        "kind": "activation",
        "model": "SmolLM2-135M-Instruct bfloat16",
        "engine_threads": engine_threads(),
        "context_tokens": options.context,
        "new_tokens": len(INVOCATION) + TAIL,
        "cached_tokens": cached,
        "first_token_ms": {caller: summary([1e3 * s for s in seconds[caller]]) for caller in CALLERS},
        "vs_base": {
            caller: summary([a / b for a, b in zip(seconds[caller], seconds["base"], strict=True)])
            for caller in CALLERS[1:]
        },
    }
    if not options.quick:
        append_rows(RESULTS / "ops.jsonl", [{**environment(), "bench": "ops_choices", "threads": 1, **choices}])
        append_rows(RESULTS / "serving.jsonl", [row])
    finish({**row, "choices": choices})


def _choices(quick: bool) -> dict[str, Any]:
    """The result of ops_choices.py, which binds its process to one core."""
    command = [sys.executable, str(Path(__file__).with_name("ops_choices.py")), *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, write nothing")
    parser.add_argument("--rounds", type=int, default=None, help="default: 15, or 3 with --quick")
    parser.add_argument("--context", type=int, default=1500, help="tokens the base model has read (default: 1500)")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 15)
    return options


def _adapters(folder: Path, model: Path) -> dict[str, Path | None]:
    """Caller -> adapter directory."""
    found: dict[str, Path | None] = {"base": None}
    for caller, kind, rank in (("alora_r8", "lora", 8), ("aflora_r2", "flora", 2), ("lora_r8", "lora", 8)):
        (path,) = make_pool(folder / caller, model, kind, rank, 1).values()
        if caller.startswith("a"):
            config = json.loads((path / "adapter_config.json").read_text())
            text = json.dumps({**config, "alora_invocation_tokens": INVOCATION})
            (path / "adapter_config.json").write_text(text)
        found[caller] = path
    return found


def _engine(model: Path, context: int) -> Any:
    os.environ |= ENGINE_HERE
    import flora_vllm

    return flora_vllm.LLM(
        str(model),
        max_loras=4,
        max_model_len=context + 128,
        max_num_batched_tokens=max(2048, context + 128),
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        enforce_eager=True,
    )


def _call(llm: Any, adapter: Path | None, context: int, seed: int) -> tuple[float, int]:
    """(seconds to the first token, tokens of the prompt that came from the cache) on a context the base has read."""
    import vllm
    from vllm.lora.request import LoRARequest

    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(100, 30000, (context + TAIL,), generator=draw).tolist()
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False, ignore_eos=True)
    number = 0 if adapter is None else 1 + sorted(CALLERS).index(adapter.parent.name)
    request = None if adapter is None else LoRARequest(adapter.parent.name, number, str(adapter))
    llm.reset_prefix_cache()
    llm.generate([{"prompt_token_ids": tokens[:context]}], sampling, use_tqdm=False)
    prompt = {"prompt_token_ids": [*tokens[:context], *INVOCATION, *tokens[context:]]}
    start = time.perf_counter()
    (output,) = llm.generate([prompt], sampling, lora_request=[request], use_tqdm=False)
    return time.perf_counter() - start, output.num_cached_tokens


if __name__ == "__main__":
    main()
