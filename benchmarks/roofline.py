"""The roofline page: what the rows model predicts beside what was measured, and what it predicts for GPUs.

    python benchmarks/roofline.py        # rewrites the tables of benchmarks/README.md from the last full runs

The model: a step costs the rows that W is multiplied with, but never less than reading W and the adapters once. A
segment of m tokens and rank r costs the cheaper of m·r rows (stacked) and m + c(r) rows (modulated); LoRA's rows are
r (I + O) / (I O) of a row for each token. Measured: geometric means over the layer shapes, bfloat16, thread CPU time.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_ops import MIXES, RANKS
from harness import RESULTS, geometric_mean
from rows_model import RIDGES, flora_ratio, gpu_modulation, lora_ratio

from flora_vllm.ops.gpu.config import low_rank_config

PAGE = Path(__file__).with_name("README.md")
GPU_WIDTH = 4096
MARKS = "<!-- tables: python benchmarks/roofline.py -->", "<!-- end of tables -->"


def last_run(file: Path) -> tuple[list[dict], dict]:
    """The rows of the last full run and its summary."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ends = [i for i, row in enumerate(rows) if row.get("quick") is False]
    before = ends[-2] + 1 if len(ends) > 1 else 0
    return rows[before : ends[-1]], rows[ends[-1]]


def ops_table() -> list[str]:
    rows, _ = last_run(RESULTS / "ops.jsonl")
    rows = [row for row in rows if row["dtype"] == "bfloat16"]
    lines = ["| mix of one step | rank | FLoRA predicted | FLoRA measured | LoRA predicted | LoRA measured |"]
    lines.append("|---|---|---|---|---|---|")
    for (name, mix), rank in ((item, rank) for item in MIXES.items() for rank in RANKS):
        measured = {kind: _rows_of(rows, name, kind, rank) for kind in ("flora", "lora")}
        shapes = [((row["in"], row["out"]), row["rule"]) for row in measured["flora"]]
        flora = geometric_mean(
            flora_ratio(mix, rank, shape, RIDGES["CPU"], lambda _, c=rule["constant"] + rule["slope"] * rank: c)
            for shape, rule in shapes
        )
        lora = geometric_mean(lora_ratio(mix, rank, shape, RIDGES["CPU"]) for shape, _ in shapes)
        seen = {kind: geometric_mean(row["vs_base"] for row in found) for kind, found in measured.items()}
        lines.append(f"| {name} | {rank} | {flora:.2f} | {seen['flora']:.2f} | {lora:.2f} | {seen['lora']:.2f} |")
    return lines


def _rows_of(rows: Sequence[dict], mix: str, candidate: str, rank: int) -> list[dict]:
    return [row for row in rows if (row["mix"], row["candidate"], row["rank"]) == (mix, candidate, rank)]


def serving_table() -> list[str]:
    _, summary = last_run(RESULTS / "serving.jsonl")
    predicted, measured = summary["predicted_vs_base_only"], summary["measured_vs_base_only"]
    lines = ["| traffic, Zipf over 64 adapters | predicted, of base-only traffic | measured |", "|---|---|---|"]
    for name, value in predicted.items():
        lines.append(f"| FLoRA rank {name.removeprefix('flora_r')} | {value:.2f} | {measured[name]:.2f} |")
    return lines


def gpu_table() -> list[str]:
    mixes = {**MIXES, "64 decode/64 adapters": [1] * 64, "64 decode/64 adapters + 2048 prefill": [1] * 64 + [2048]}
    lines = [
        "| mix of one step | rank | H100: FLoRA | LoRA | H200: FLoRA | LoRA | better |",
        "|---|---|---|---|---|---|---|",
    ]
    shape = (GPU_WIDTH, GPU_WIDTH)

    for (name, mix), rank in ((item, rank) for item in mixes.items() for rank in RANKS):
        cells, better = [], set()
        for chip in ("H100", "H200"):
            pair = (
                flora_ratio(mix, rank, shape, RIDGES[chip], gpu_modulation),
                lora_ratio(mix, rank, shape, RIDGES[chip]),
            )
            cells += [f"{value:.2f}" for value in pair]
            better.add("LoRA" if pair[0] > pair[1] + 0.005 else "FLoRA" if pair[1] > pair[0] + 0.005 else "equal")
        lines.append(f"| {name} | {rank} | {' | '.join(cells)} | {' or '.join(sorted(better))} |")
    return lines


def low_rank_table() -> list[str]:
    """Bytes that a step's low-rank terms move beside the base product, ours and vLLM's punica pair."""
    mixes = {
        "64 decode/64 adapters": [1] * 64,
        "32 decode/32 adapters + 512 prefill": MIXES["32 decode/32 adapters + 512 prefill"],
        "2048 prefill/1 adapter": [2048],
    }
    lines = ["| mix of one step, rank | slices | ours, MB | of them the middle | vLLM's, MB | of them the middle |"]
    lines.append("|---|---|---|---|---|---|")
    for (name, mix), rank, sizes in (
        (item, rank, sizes)
        for item in mixes.items()
        for rank in (8, 16)
        for sizes in ((GPU_WIDTH,), (GPU_WIDTH, GPU_WIDTH // 4, GPU_WIDTH // 4))
    ):
        tokens, outputs, numbers = sum(mix), sum(sizes), sum(mix) * len(sizes) * rank
        # x, down, up and y, which is read and written; bfloat16, as each engine holds them.
        shared = 2 * (tokens * GPU_WIDTH + len(mix) * rank * (len(sizes) * GPU_WIDTH + outputs) + 2 * tokens * outputs)
        blocks = sum(-(-count // 16) for count in mix)
        split = low_rank_config(torch.bfloat16, 16, GPU_WIDTH, len(sizes), blocks).split
        # Ours: every run of in features writes its part of the middle, which is read once. vLLM 0.32's: zeroed, added
        # to by every run (read and written), read (lora/ops/triton_ops, lora_shrink_op.py; utils.py, no tuned file).
        runs = 64 if tokens < 128 else 8
        ours, punica = 4 * numbers * 2 * split, 4 * numbers * (2 + 2 * runs)
        cells = [(shared + ours) / 1e6, ours / 1e6, (shared + punica) / 1e6, punica / 1e6]
        lines.append(f"| {name}, {rank} | {len(sizes)} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return lines


def main() -> None:
    sections = {
        "One core, measured": ops_table,
        "The engine, measured": serving_table,
        "H100 and H200, predicted": gpu_table,
        "LoRA alone on a GPU: bytes beside the base product, counted": low_rank_table,
    }
    text = "\n\n".join(f"### {title}\n\n" + "\n".join(table()) for title, table in sections.items())
    page = PAGE.read_text()
    start, end = (page.index(mark) for mark in MARKS)
    PAGE.write_text(page[: start + len(MARKS[0])] + "\n\n" + text + "\n\n" + page[end:])
    print(text)


if __name__ == "__main__":
    main()
