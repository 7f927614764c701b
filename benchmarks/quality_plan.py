"""What the quality benchmark runs, in which order, and how a finished cell is known again.

A cell is one (task, language, method, rank, seed); before the first one of a (task, method, rank) a sweep on the task's
first language chooses the rate. Finished work is a row of quality.jsonl and counts for the set-up it was made with.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quality_data import CODE, SPEECH, digest

METHODS = ("base", "flora", "lora", "ia3")
SEEDED, RANKED = 2, ("flora", "lora")  # languages with three seeds; methods with a rank 4
SEEDS, HIGHER_RANK = (1, 2), 4


@dataclass(frozen=True)
class Size:
    """What a cell trains on and is measured with: steps of `batch` examples; blocks or clips of the other splits.

    `length`: tokens in a block of code, and the most in a transcript. `sweep_share`: steps of a sweep's run.
    """

    steps: int
    batch: int
    length: int
    dev: int
    test: int
    sweep_share: float = 0.25


FULL = {
    "code": Size(32, 4, 128, dev=16, test=64, sweep_share=0.375),
    "speech": Size(32, 1, 128, dev=6, test=48, sweep_share=0.375),
}


@dataclass(frozen=True)
class FineSearch:
    """A second search for the rate: whole runs at `factors` of the first one's, mean over `seeds`, on `dev` clips."""

    factors: tuple[float, ...] = (1.0, 0.5, 0.25)
    seeds: tuple[int, ...] = (0, 1)
    dev: int = 16


# Steps of one clip are noisy and six clips few: what the first search finds for a third of the run is too high for all.
FINE = {"speech": FineSearch()}
QUICK = {"code": Size(10, 4, 128, dev=4, test=12), "speech": Size(10, 1, 128, dev=2, test=6)}


@dataclass(frozen=True)
class Cell:
    """One adapter to train and measure, or, of method base, the bare model to measure."""

    task: str
    language: str
    method: str
    rank: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.task}-{self.language}-{self.method}-r{self.rank}-s{self.seed}"


def full_plan() -> list[Cell]:
    """Every language once for every method, task by task; then seeds, then ranks: a partial run is balanced."""
    cells = [
        Cell(task, language, method)
        for task, languages in (("code", CODE), ("speech", SPEECH))
        for language in languages
        for method in METHODS
    ]
    cells += [
        Cell(task, language, method, seed=seed)
        for task, languages in (("code", CODE), ("speech", SPEECH))
        for language in list(languages)[:SEEDED]
        for seed in SEEDS
        for method in METHODS[1:]
    ]
    cells += [Cell("code", language, method, HIGHER_RANK) for language in list(CODE)[:SEEDED] for method in RANKED]
    return cells


def quick_plan() -> list[Cell]:
    """Two languages of each task, every method once."""
    two = [("code", language) for language in list(CODE)[:2]] + [("speech", language) for language in SPEECH[:2]]
    return [Cell(task, language, method) for task, language in two for method in METHODS]


def setup_of(size: Size, model: str, targets: str, dtype: str, data: Path) -> dict:
    """What must be the same for two rows to be compared, but for the data, which are one language's."""
    return {**asdict(size), "model": model, "targets": targets, "dtype": dtype, "data": digest(data)}


def setup_hash(setup: dict) -> str:
    return hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()[:8]


def read_rows(file: Path) -> list[dict]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def find_row(rows: Iterable[dict], kind: str, cell: Cell, setup: dict, **wanted: Any) -> dict | None:
    """The newest row of this kind about `cell`, made with `setup` and with the fields `wanted`."""
    wanted |= {"kind": kind, **asdict(cell), "setup": setup}
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return found[-1] if found else None


def sweep_cell(cell: Cell) -> Cell:
    """The cell whose language, the task's first, chooses the rate for all languages."""
    return replace(cell, language=next(iter(CODE)) if cell.task == "code" else SPEECH[0], seed=0)


def search(loss: Callable[[float], float], start: float, factors: Sequence[float], widen: int = 0) -> float:
    """The multiple of `start` with the lowest loss; further by `widen` while that is the lowest or highest tried."""
    losses = {factor: loss(start * factor) for factor in factors}
    while True:
        best = min(losses, key=losses.__getitem__)
        if not widen or min(losses) < best < max(losses):
            return start * best
        factor = best * widen if best == max(losses) else best / widen
        losses[factor] = loss(start * factor)


def complete_languages(rows: Sequence[dict], task: str) -> Iterator[str]:
    """Languages for which every method has a row at rank 1, seed 0."""
    for language in CODE if task == "code" else SPEECH:
        have = {r["method"] for r in rows if (r["task"], r["language"], r["rank"], r["seed"]) == (task, language, 1, 0)}
        if have >= set(METHODS):
            yield language
