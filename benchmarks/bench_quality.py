"""Does FLoRA keep LoRA's quality? Code in eight languages and speech in five, base / IA3 / LoRA / FLoRA.

    python benchmarks/bench_quality.py --quick                           # two languages of each, prints the summary
    python benchmarks/bench_quality.py --budget-hours 8                  # everything that fits; run again to go on
    python benchmarks/bench_quality.py --multipl-e ../data/multipl-e     # with pass@1 by execution

Every cell (task, language, method, rank, seed) trains one adapter by `flora-vllm train`'s own code, equal steps and
tokens for all methods, each method's rate from the same sweep on one language's dev split, and measures it on held-out
files or clips. A finished cell is a row of benchmarks/results/quality.jsonl and is not done again with the same set-up.
The adapters are then served by vLLM, all languages of a task in one batch, and compared with PEFT's own forward.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import quality_code
import quality_speech
import torch
from harness import RESULTS, append_rows, environment, finish, progress
from quality_data import CODE, SPEECH, code_data, speech_data
from quality_plan import (
    FINE,
    FULL,
    QUICK,
    Cell,
    FineSearch,
    Size,
    find_row,
    full_plan,
    quick_plan,
    read_rows,
    search,
    setup_hash,
    setup_of,
    sweep_cell,
)
from quality_stats import summarise

from flora_vllm.demo.model_assets import fetch_smollm2, fetch_whisper_base
from flora_vllm.environment import cache_root
from flora_vllm.errors import ConfigError
from flora_vllm.train_request import RATES, Request
from flora_vllm.training.checkpoint import training_directory
from flora_vllm.training.run import sweep, train_one

MODULES: dict[str, Any] = {"code": quality_code, "speech": quality_speech}
FETCH_DATA = {"code": code_data, "speech": speech_data}
FETCH_MODEL = {"code": ("smollm2", fetch_smollm2), "speech": ("whisper-base", fetch_whisper_base)}
MODEL_NAMES = {"code": "SmolLM2-135M-Instruct", "speech": "whisper-base"}
PARTS = ("cells", "served", "pass")
DTYPE = "bfloat16"


@dataclass
class Run:
    """One run of this program: where things are, how large cells are, what has been found, when to stop."""

    options: argparse.Namespace
    folder: Path
    adapters: Path
    sizes: dict[str, Size]
    rows: list[dict]
    stop_at: float

    def model(self, task: str) -> Path:
        name, fetch = FETCH_MODEL[task]
        return fetch(self.folder / name)

    def data(self, cell: Cell) -> Path:
        return FETCH_DATA[cell.task](self.folder / "quality" / "data", cell.language)

    @property
    def kind(self) -> str:
        """Of the rows that training adds."""
        factor = self.options.rate_factor
        return "cell" if factor == 1 else f"cell at {factor:g} of the rate"

    def setup(self, cell: Cell) -> dict:
        module = MODULES[cell.task]
        size = self.sizes[cell.task]
        return setup_of(size, MODEL_NAMES[cell.task], module.TARGETS, DTYPE, self.data(cell))

    def row(self, cell: Cell) -> dict | None:
        """The newest row of `cell` at the rate that was chosen for it; None before one is chosen."""
        if cell.method == "base":
            return find_row(self.rows, "cell", cell, self.setup(cell))
        rate = self.chosen_rate(cell)
        if rate is None:
            return None
        return find_row(self.rows, self.kind, cell, self.setup(cell), rate=rate * self.options.rate_factor)

    def chosen_rate(self, cell: Cell) -> float | None:
        """What the search for this cell's task, method and rank found; None before it came to its end."""
        chosen = sweep_cell(cell)
        row = find_row(self.rows, "rate", chosen, self.setup(chosen))
        return None if row is None else row["rate"]

    def out(self, cell: Cell, rate: float) -> Path:
        return self.adapters / setup_hash(self.setup(cell)) / f"{cell.name}-{rate:g}"

    def add(self, row: dict) -> None:
        row = {**environment(), "benchmark": "quality", "threads": torch.get_num_threads(), **row}
        self.rows.append(row)
        if not self.options.quick:
            append_rows(RESULTS / "quality.jsonl", [row])


def main() -> int:
    options = _arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = cache_root()
    with contextlib.ExitStack() as stack:
        adapters = folder / "quality" / "adapters"
        if options.quick:
            adapters = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flora-quality-")))
        rows = [] if options.quick else read_rows(RESULTS / "quality.jsonl")
        stop_at = time.monotonic() + options.budget_hours * 3600
        run = Run(options, folder, adapters, QUICK if options.quick else FULL, rows, stop_at)
        try:
            _work(run, quick_plan() if options.quick else full_plan())
        except KeyboardInterrupt:
            progress("interrupted; the same command goes on in the middle of this cell")
            return 130
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two languages of each task, few steps, nothing written")
    parser.add_argument(
        "--budget-hours", type=float, default=8.0, help="start no new cell after this time (default: 8)"
    )
    parser.add_argument("--multipl-e", type=Path, help="directory with humaneval-<language>.jsonl, for pass@1")
    parser.add_argument("--tasks", type=int, default=20, help="problems of a language for pass@1 (default: 20)")
    parser.add_argument(
        "--task", choices=MODULES, help="train and serve one task alone, so that two runs can share the work"
    )
    parser.add_argument("--language", choices=[*CODE, *SPEECH], help="train one language alone, for the same reason")
    parser.add_argument("--method", choices=RATES, help="train one method alone")
    parser.add_argument(
        "--rate-factor",
        type=float,
        default=1.0,
        help="train at this multiple of the rate that the sweep chose, to see what it does; no comparison counts these",
    )
    parser.add_argument(
        "--only",
        choices=(*PARTS, "summary"),
        help="one part of the work without the summary row and the plots, or these alone, from the rows there are",
    )
    options = parser.parse_args()
    if options.only == "pass" and options.multipl_e is None:
        parser.error("--only pass needs --multipl-e")
    return options


def _work(run: Run, plan: list[Cell]) -> None:
    parts = PARTS if run.options.only is None else (run.options.only,)
    if "cells" in parts:
        _train_cells(run, plan)
    if "served" in parts:
        _serve(run, plan)
    if "pass" in parts and run.options.multipl_e is not None:
        from quality_pass import pass_rows

        options = run.options
        for row in pass_rows(
            run.model("code"), _trained(run, plan, "code"), options.multipl_e, options.tasks, run.rows
        ):
            run.add(row)
    cells = [row for cell in plan if (row := run.row(cell)) is not None]
    comparisons, result = summarise(cells, run.rows, quick=run.options.quick)
    done = {(row["task"], row["language"], row["method"], row["rank"], row["seed"]) for row in cells}
    result["cells_missing"] = [cell.name for cell in plan if astuple(cell) not in done]
    for row in comparisons:
        print(json.dumps(row))
    if not run.options.quick and run.options.only in (None, "summary"):
        from quality_plots import plot

        run.add({"kind": "comparisons", "comparisons": comparisons})
        run.add(result)
        plot(cells, RESULTS)
    finish(result)


def _train_cells(run: Run, plan: list[Cell]) -> None:
    options = run.options
    wanted = {"task": options.task, "language": options.language, "method": options.method}
    mine = [c for c in plan if all(value in (None, getattr(c, name)) for name, value in wanted.items())]
    if options.rate_factor != 1:
        mine = [cell for cell in mine if cell.method != "base"]
    left = [cell for cell in mine if run.row(cell) is None]
    _estimate(run, left)
    for cell in left:
        if time.monotonic() > run.stop_at:
            progress("the time is over; the same command goes on from here")
            return
        _do(run, cell)


def _do(run: Run, cell: Cell) -> None:
    """Train and measure one cell; its row is added."""
    began = time.monotonic()
    size, model, data = run.sizes[cell.task], run.model(cell.task), run.data(cell)
    row: dict[str, Any] = {"kind": run.kind, **asdict(cell), "setup": run.setup(cell)}
    rate = None if cell.method == "base" else _rate(run, cell) * run.options.rate_factor
    if run.row(cell) is not None:  # at the rate that was only now chosen
        return
    base, split = MODULES[cell.task].prepare(model, data, size)
    if rate is not None:
        request = _request(run, cell, rate)
        is_resumed, trained = training_directory(request.out).exists(), time.monotonic()
        measured = train_one(request, base, split, rate)
        row |= {
            "rate": rate,
            "train_s": None if is_resumed else round(time.monotonic() - trained, 1),
            "train_tokens": size.steps * size.batch * size.length if cell.task == "code" else None,
            "train_clips": size.steps * size.batch if cell.task == "speech" else None,
            "parameters": sum(p.numel() for p in base.parameters() if p.requires_grad),
            "dev_loss": measured.adapter,
            "dev_loss_base": measured.base,
        }
    row |= MODULES[cell.task].score(base, model, data, size)
    run.add({**row, "cell_s": round(time.monotonic() - began, 1)})
    measure = "bpb" if cell.task == "code" else "wer"
    progress(f"{cell.name:28} {measure} {row[measure]:.4f} ({time.monotonic() - began:.0f} s)")


def _request(run: Run, cell: Cell, rate: float) -> Request:
    size = run.sizes[cell.task]
    return Request(
        base=str(run.model(cell.task)),
        data=run.data(cell) / "train.jsonl",
        out=run.out(cell, rate),
        method=cell.method,
        rank=cell.rank,
        targets=MODULES[cell.task].TARGETS,
        steps=size.steps,
        lr=rate,
        batch=size.batch,
        length=size.length,
        save_every=8,
        seed=cell.seed,
    )


def _rate(run: Run, cell: Cell) -> float:
    """The rate with the lowest dev loss for this task, method and rank; searched for if it isn't known.

    Every method is searched alike: its default rate, 4 and 16 times that, further by 4 while the best is at an end,
    then twice and half the best. (A climb by doubling stops in the noise where a rate is too low to move anything.)
    For a task with a finer search, then whole runs from the best down, further by 2 while the best is at an end.
    Every rate tried is a row.
    """
    chosen, default = sweep_cell(cell), RATES[cell.method]
    if (known := run.chosen_rate(cell)) is not None:
        return known
    if run.options.quick:
        best = default * QUICK_FACTORS[cell.task][cell.method]
    else:
        coarse_loss = partial(_dev_loss, run, chosen)
        best = search(coarse_loss, default, (1.0, 4.0, 16.0), 4)
        best = search(coarse_loss, best, (1.0, 2.0, 0.5))
        if fine := FINE.get(cell.task):
            best = search(partial(_fine_loss, run, chosen, fine), best, fine.factors, 2)
    run.add({"kind": "rate", **asdict(chosen), "setup": run.setup(chosen), "rate": best})
    return best


def _fine_loss(run: Run, chosen: Cell, fine: FineSearch, rate: float) -> float:
    """Mean dev loss of whole runs at `rate` over the finer search's seeds."""
    return statistics.mean(_dev_loss(run, replace(chosen, seed=seed), rate, fine.dev) for seed in fine.seeds)


def _dev_loss(run: Run, chosen: Cell, rate: float, whole_run_on: int = 0) -> float:
    """Dev loss at `rate` after a sweep's steps, or after a whole run on so many examples, infinite if it diverged.

    From the rows if it is there.
    """
    size, setup = run.sizes[chosen.task], run.setup(chosen)
    kind, dev, share = ("whole run", whole_run_on, 1.0) if whole_run_on else ("sweep", size.dev, size.sweep_share)
    asked = {"rate": rate, "dev_examples": dev} if whole_run_on else {"rate": rate}
    row = find_row(run.rows, kind, chosen, setup, **asked)
    if row is None:
        progress(f"{kind} of {chosen.name} at {rate:g}")
        began = time.monotonic()
        base, split = MODULES[chosen.task].prepare(run.model(chosen.task), run.data(chosen), replace(size, dev=dev))
        try:
            loss = sweep(_request(run, chosen, rate), base, split, (1.0,), share)[rate]
        except ConfigError:  # it diverged
            loss = None
        row = {"kind": kind, **asdict(chosen), "setup": setup, **asked, "dev_loss": loss}
        run.add({**row, "cell_s": round(time.monotonic() - began, 1)})
    return math.inf if row["dev_loss"] is None else row["dev_loss"]


# A quick run doesn't search: multiples of each method's default rate that the full run's search found.
QUICK_FACTORS = {
    "code": {"flora": 2.0, "lora": 128.0, "ia3": 4.0},
    "speech": {"flora": 0.25, "lora": 4.0, "ia3": 0.5},
}


def _estimate(run: Run, left: list[Cell]) -> None:
    """Say how long what is left will take, from the cells measured so far or one step timed now."""
    total = 0.0
    for task in MODULES:
        mine = [cell for cell in left if cell.task == task and cell.method != "base"]
        if not mine:
            continue
        size = asdict(run.sizes[task]).items()
        known = [
            row["cell_s"]
            for row in run.rows
            if (row.get("kind"), row.get("task")) in (("cell", task), ("timing", task))
            and row.get("method") != "base"
            and row.get("setup", {}).items() >= size
        ]
        seconds = statistics.median(known) if known else _cell_seconds(run, mine[0])
        total += len(mine) * seconds
        progress(f"{task}: {len(mine)} cells to train, {seconds:.0f} s each")
    progress(f"about {total / 3600:.1f} h left, the budget is {run.options.budget_hours:g} h")


def _cell_seconds(run: Run, cell: Cell) -> float:
    """A cell's time from one training step, half as much again for measuring."""
    from flora_vllm.training.data import as_batch
    from flora_vllm.training.loop import backward
    from flora_vllm.training.run import attach

    size = run.sizes[cell.task]
    base, split = MODULES[cell.task].prepare(run.model(cell.task), run.data(cell), size)
    adapted = attach(_request(run, cell, RATES[cell.method]), base)
    batch = as_batch(split.train[list(range(size.batch))], next(adapted.parameters()).device)
    backward(adapted, [batch])  # the first one sets up
    began = time.monotonic()
    backward(adapted, [batch])
    seconds = 1.5 * size.steps * (time.monotonic() - began)
    run.add({"kind": "timing", "task": cell.task, "setup": asdict(size), "cell_s": round(seconds, 1)})
    return seconds


def _trained(run: Run, plan: list[Cell], task: str) -> dict[Cell, Path]:
    """The task's adapters of rank 1 and seed 0 that are there."""
    trained = {}
    for cell in plan:
        if cell.task == task and cell.method != "base" and (cell.rank, cell.seed) == (1, 0):
            row = run.row(cell)
            if row is not None and (out := run.out(cell, row["rate"])).exists():
                trained[cell] = out
    return trained


def _serve(run: Run, plan: list[Cell]) -> None:
    """Those adapters through vLLM against PEFT; a row for each task that has some."""
    from quality_served import served_equals_peft

    for task in MODULES:
        trained = _trained(run, plan, task)
        if not trained or run.options.task not in (None, task):
            continue
        progress(f"serving {len(trained)} adapters in one batch")
        data = {cell: run.data(cell) for cell in trained}
        row = served_equals_peft(task, run.model(task), trained, data, run.sizes[task])
        run.add({"kind": "served", **row})
        progress(f"{task} served against PEFT: {row['served_equals_peft']:.2e}")


if __name__ == "__main__":
    sys.exit(main())
