"""Eight adapters trained in one batch against the same eight one after another; writes benchmarks/results/train.jsonl.

    python benchmarks/bench_train.py --quick   # 16 tokens a job and step, prints the summary, writes nothing
    python benchmarks/bench_train.py           # 64 tokens as well, more steps; appends its rows

Both ways are the loop of `flora-vllm train` (`--jobs` for the batch; LoRA, which PEFT mixes only for inference, goes
through the same loop): the same initial factors, data, rates and steps, so the losses must agree, and are compared
before a speed is reported. Every job has an example of its own source file from Python's library in each step. One
thread, float32 (bfloat16's losses differ by its rounding, and many CPUs emulate it); a sample is a step of all eight
jobs in CPU time of this process, which the machine's other work moves little. The first step warms up and is left out.
"""

import argparse
import os
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# One thread from the start: OpenMP pools are sized when they are made.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flora_vllm.demo.model_assets import fetch_smollm2
from flora_vllm.environment import cache_root
from flora_vllm.train_request import RATES
from flora_vllm.training.build import METHODS, add_adapter, load_base
from flora_vllm.training.checkpoint import Settings
from flora_vllm.training.data import Blocks, pack
from flora_vllm.training.jobs import job_name
from flora_vllm.training.loop import Job, train

# A job each: files of every Python's standard library.
SOURCES = ("argparse", "ast", "bdb", "calendar", "configparser", "difflib", "doctest", "inspect")
RANK = 8
# LoRA starts at B = 0: at its usual rate so few steps would leave the adapters too alike to tell one from another.
RATE_FACTORS = {"flora": 1.0, "lora": 10.0}
# Of a loss. Rows of a larger batch are summed in another order: float32 ulps, grown by Adam, which divides each
# gradient by its size. An adapter mixed up with another's moves a loss more than this.
TOLERANCE = 1e-3


@dataclass
class Timed:
    """Losses by job and what each step cost, in seconds."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def step_clock(self) -> Callable[[dict[str, float], int], None]:
        """For `train`'s `seen`: adds the time since the step before to this step's; jobs in turn add up."""
        marks = [time.process_time(), time.perf_counter()]
        step = 0

        def seen(_losses: dict[str, float], _tokens: int) -> None:
            nonlocal step
            now = [time.process_time(), time.perf_counter()]
            for seconds, before, after in zip((self.cpu_s, self.wall_s), marks, now, strict=True):
                seconds.extend([0.0] * (step + 1 - len(seconds)))
                seconds[step] += after - before
            marks[:] = now
            step += 1

        return seen


def make_jobs(tokenizer: PreTrainedTokenizerBase, method: str, length: int, steps: int) -> list[Job]:
    """A job per source file, one example of `length` tokens in each step."""
    jobs = []
    for index, source in enumerate(SOURCES):
        path = Path(sysconfig.get_path("stdlib")) / f"{source}.py"
        examples = pack([path.read_text(encoding="utf-8")], tokenizer, length)
        rate = RATES[method] * RATE_FACTORS[method]
        settings = Settings(
            "", method, RANK, None, str(path), examples.numel(), length, batch=1, steps=steps, rate=rate, seed=index
        )
        jobs.append(Job(job_name(index), settings, Blocks(examples, examples[:0])))
    return jobs


def attach(model: PreTrainedModel, jobs: list[Job]) -> PeftModel:
    """The model with every job's adapter, the same initial factors at each call."""
    adapted: PeftModel | None = None
    for job in jobs:
        torch.manual_seed(job.settings.seed)
        config = METHODS[job.settings.method](RANK, None, model.config.model_type)
        if adapted is None:
            adapted = add_adapter(model, config, job.name)
        else:
            adapted.add_adapter(job.name, config)
    assert adapted is not None, "no jobs"
    return adapted


def together(model: PreTrainedModel, jobs: list[Job]) -> Timed:
    """All jobs in shared batches."""
    adapted, timed = attach(model, jobs), Timed()
    adapted.set_requires_grad([job.name for job in jobs])
    timed.losses = train(adapted, jobs, seen=timed.step_clock())
    adapted.unload()
    return timed


def one_by_one(model: PreTrainedModel, jobs: list[Job]) -> Timed:
    """One job after another, each with its adapter alone active."""
    adapted, timed = attach(model, jobs), Timed()
    for job in jobs:
        adapted.set_adapter(job.name)
        timed.losses |= train(adapted, [job], seen=timed.step_clock())
    adapted.unload()
    return timed


def loss_difference(batched: Timed, sequential: Timed, what: str) -> float:
    """The largest difference of two losses of one job and step, in nats.

    Raises AssertionError where one is more than rounding.
    """
    largest = 0.0
    for name, losses in sequential.losses.items():
        for step, (alone, mixed) in enumerate(zip(losses, batched.losses[name], strict=True), 1):
            difference = abs(alone - mixed)
            assert difference <= TOLERANCE * alone, (
                f"{what}: {name} has loss {mixed:.6f} in the batch and {alone:.6f} alone at step {step}, "
                f"and at most {TOLERANCE:g} of it is rounding: its examples went through another adapter"
            )
            largest = max(largest, difference)
    return largest


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, method: str, length: int, steps: int) -> dict:
    """The row of one method and length."""
    jobs = make_jobs(tokenizer, method, length, steps)
    batched, sequential = together(model, jobs), one_by_one(model, jobs)
    what = f"{method} r={RANK}, {length} tokens a job"
    difference = loss_difference(batched, sequential, what)
    row: dict = {"method": method, "rank": RANK, "jobs": len(jobs), "length": length, "batch": 1, "steps": steps}
    for clock in ("cpu_s", "wall_s"):
        row[f"batched_{clock}"] = harness.summary(getattr(batched, clock)[1:])
        row[f"sequential_{clock}"] = harness.summary(getattr(sequential, clock)[1:])
    speed_up = row["sequential_cpu_s"]["median"] / row["batched_cpu_s"]["median"]
    harness.progress(
        f"{what}: {speed_up:.2f} times as fast together ({row['batched_cpu_s']['median']} s a step against "
        f"{row['sequential_cpu_s']['median']} s), losses differ by {difference:.1e} at most"
    )
    return row | {"batched_over_sequential": round(speed_up, 3), "largest_loss_difference": difference}


def summarise(rows: list[dict], quick: bool) -> dict:
    """Geometric means over the lengths, and of the two methods."""
    speed_ups = {
        method: harness.geometric_mean(row["batched_over_sequential"] for row in rows if row["method"] == method)
        for method in RATE_FACTORS
    }
    return {
        "batched_over_sequential": round(harness.geometric_mean(speed_ups.values()), 3),
        **{f"batched_over_sequential_{method}": round(value, 3) for method, value in speed_ups.items()},
        "largest_loss_difference": max(row["largest_loss_difference"] for row in rows),
        "quick": quick,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 tokens a job and step, 4 steps; writes no rows")
    parser.add_argument("--base", type=Path, help="directory of a causal language model (default: SmolLM2)")
    options = parser.parse_args(arguments)
    quick = options.quick
    torch.set_num_threads(1)
    base = options.base or fetch_smollm2(cache_root() / "smollm2")
    model, tokenizer = load_base(str(base))
    model.float()
    setup = harness.environment() | {"bench": "train", "base": base.name, "threads": 1, "dtype": "float32"}
    lengths, steps = ((16,), 4) if quick else ((16, 64), 12)
    rows = [measure(model, tokenizer, method, length, steps) for length in lengths for method in RATE_FACTORS]
    result = summarise(rows, quick)
    if not quick:
        harness.append_rows(harness.RESULTS / "train.jsonl", [setup | row for row in [*rows, result]])
    harness.finish(result)


if __name__ == "__main__":
    main()
