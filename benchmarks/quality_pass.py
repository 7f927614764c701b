"""pass@1 on MultiPL-E's HumanEval: greedy programs from vLLM, every method of a language in one batch, then executed.

A language whose interpreter isn't there gets a row with None and the reason. Scores are for the first `--tasks`
problems of each language, and near 0 for a model of this size.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import progress
from quality_data import CODE
from quality_plan import Cell
from quality_sandbox import missing, run
from quality_served import open_engine, requests_for
from tqdm import tqdm

NEW_TOKENS, PROMPT_TOKENS = 96, 864


def pass_rows(
    model: Path, adapters: Mapping[Cell, Path], problems: Path, tasks: int, done: Sequence[dict]
) -> list[dict]:
    """A row for every language and method (the bare model too) that `done` has none of."""
    languages = list(dict.fromkeys(cell.language for cell in adapters))
    wanted: list[Cell] = []
    rows = []
    for language in languages:
        mine = [Cell("code", language, "base"), *(cell for cell in adapters if cell.language == language)]
        mine = [cell for cell in mine if not _is_done(done, cell, tasks)]
        reason = missing(language) if mine else None
        if reason is None:
            wanted += mine
        else:
            progress(f"pass@1 of {language}: null, {reason}")
            rows += [_row(cell, tasks, None, reason) for cell in mine]
    if wanted:
        rows += _measure(model, adapters, wanted, problems, tasks)
    return rows


def _measure(
    model: Path, adapters: Mapping[Cell, Path], wanted: Sequence[Cell], problems: Path, tasks: int
) -> list[dict]:
    import vllm

    asked = [(cell, problem) for cell in wanted for problem in read_problems(problems, cell.language, tasks)]
    began = time.monotonic()
    with open_engine(
        model, adapters, dtype="bfloat16", max_model_len=PROMPT_TOKENS + NEW_TOKENS, max_num_seqs=32
    ) as llm:
        sampling = [
            vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, stop=problem["stop_tokens"])
            for _, problem in asked
        ]
        lora: list[Any] = requests_for(adapters, [None if cell.method == "base" else cell for cell, _ in asked])
        outputs = llm.generate([problem["prompt"] for _, problem in asked], sampling, lora_request=lora)
    progress(f"{len(asked)} programs written in {time.monotonic() - began:.0f} s")
    passed: dict[Cell, int] = dict.fromkeys(wanted, 0)
    for (cell, problem), output in zip(asked, tqdm(outputs, desc="running programs"), strict=True):
        program = f"{problem['prompt']}{output.outputs[0].text}\n{problem['tests']}"
        passed[cell] += run(cell.language, program)
    return [_row(cell, tasks, passed[cell] / tasks, None) for cell in wanted]


def read_problems(folder: Path, language: str, tasks: int) -> list[dict]:
    """The first `tasks` problems whose prompts fit. Raises SystemExit if the file isn't there."""
    file = folder / f"humaneval-{CODE[language].multipl_e}.jsonl"
    if not file.exists():
        raise SystemExit(f"{file} is not there; --multipl-e wants MultiPL-E's HumanEval, one .jsonl a language")
    problems = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    short = [problem for problem in problems if len(problem["prompt"].encode()) <= PROMPT_TOKENS]
    if len(short) < tasks:
        raise SystemExit(f"{file} has {len(short)} problems that fit, --tasks wants {tasks}")
    return short[:tasks]


def _row(cell: Cell, tasks: int, score: float | None, reason: str | None) -> dict:
    return {**_setup(cell, tasks), "dtype": "bfloat16", "pass_at_1": score, "reason": reason}


def _is_done(rows: Sequence[dict], cell: Cell, tasks: int) -> bool:
    return any(all(row.get(key) == value for key, value in _setup(cell, tasks).items()) for row in rows)


def _setup(cell: Cell, tasks: int) -> dict:
    return {"kind": "pass", **asdict(cell), "tasks": tasks, "new_tokens": NEW_TOKENS}
