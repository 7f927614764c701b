"""The Triton kernels on the GPU at hand: are they right, are they fast, do CUDA graphs hold them.

Needs torch and Triton, no vLLM.

    python benchmarks/bench_gpu.py              everything, up to 15 minutes; writes results/gpu.jsonl and gpu.png
    python benchmarks/bench_gpu.py --quick      the same on fewer shapes and ranks; writes nothing
    python benchmarks/bench_gpu.py --interpret  no GPU: Triton's interpreter, tiny shapes, no times
    compute-sanitizer python benchmarks/bench_gpu.py --only checks

Parts: `checks`, every kind of term against the equation; `graphs`, a graph captured with empty slots follows what comes
into them; `ops`, our op against cuBLAS, LoRA two ways and the paper's stacking; `decode`, a Llama-shaped model's step.
The last line is one JSON object: comparisons made and failed, the worst error in units of the reference's root mean
square, launches of a layer with FLoRA of rank 1 and 8, and the host's microseconds for a layer call.
"""

# ruff: noqa: E402 - how the kernels run is decided before they are imported.

import argparse
import os
import sys
from collections.abc import Sequence

import harness
import torch

PARTS = ("checks", "graphs", "ops", "decode")
INTERPRETS = "--interpret" in sys.argv or ("--quick" in sys.argv and not torch.cuda.is_available())
if INTERPRETS:
    # Triton decides when kernels are defined; those come with the imports below.
    os.environ["TRITON_INTERPRET"] = "1"

import gpu_checks
import gpu_decode
import gpu_launches
import gpu_ops

from flora_vllm.ops.gpu.check import why_graphs_wrong


def check(device: torch.device, shapes, result: dict) -> list[dict]:
    """Compare, and count into `result`; a row for each failure."""
    rows = []
    for what, error, allowed in gpu_checks.checks(device, shapes):
        result["checked"] += 1
        # Not >: a NaN is a failure too.
        if not error <= allowed:
            result["failed"] += 1
            rows.append({"part": "checks", "what": what, "error": error, "allowed": allowed})
            harness.progress(f"FAILED {what}: error {error:.3g}, allowed {allowed:.1g}")
        result["worst_error"] = max(result["worst_error"], error if error == error else float("inf"))
    harness.progress(f"{result['checked']} comparisons, {result['failed']} failed")
    return rows


def check_graphs(device: torch.device, result: dict) -> None:
    capture = gpu_launches.capture_for(device)
    for dtype in (torch.float32,) if INTERPRETS else (torch.bfloat16, torch.float16, torch.float32):
        fault = why_graphs_wrong(device, dtype, capture)
        result["checked"] += 1
        result["failed"] += fault is not None
        harness.progress(f"graphs {dtype}: {fault or 'follow slots, ranks and segments'}")


def timed_rows(device: torch.device, parts: Sequence[str], quick: bool) -> list[dict]:
    rows = []
    if "ops" in parts:
        for row in gpu_ops.op_rows(device, (1, 8) if quick else gpu_ops.RANKS):
            rows.append({"part": "ops"} | row)
            if "vs_base" in row:
                text = f"{row['mix']}, {row['candidate']} {row['rank']}: {row['device_us']['median']:.1f} µs"
                harness.progress(f"{row['in']}x{row['out']} {text}, {row['vs_base']} of base")
    if "decode" in parts:
        for row in gpu_decode.decode_rows(device):
            rows.append({"part": "decode"} | row)
            if "of_base" in row:
                harness.progress(f"{row['sequences']} sequences, {row['adapters']} adapters: {row['of_base']} of base")
    return rows


def draw(rows: list[dict]) -> None:
    """Predicted beside measured ratios; nothing without matplotlib."""
    try:
        from figure import drawn
    except ImportError:
        harness.progress("no plot: matplotlib is not installed")
        return
    points = [row for row in rows if "predicted_vs_base" in row]
    with drawn(harness.RESULTS / "gpu.png", width=8, height=8) as (axes,):
        for candidate in ("flora", "lora"):
            of_candidate = [(r["predicted_vs_base"], r["vs_base"]) for r in points if r["candidate"] == candidate]
            axes.scatter(*zip(*of_candidate, strict=True), label=candidate)
        axes.axline((1, 1), slope=1, color="grey")
        axes.set(xlabel="predicted, of base", ylabel="measured, of base", xscale="log", yscale="log")
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="no GPU: Triton's interpreter, tiny shapes")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and ranks, no rows written")
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts only")
    options = parser.parse_args()
    if not INTERPRETS and not torch.cuda.is_available():
        parser.error("there is no GPU; --interpret runs the kernels in Triton's interpreter")
    device = torch.device("cpu" if INTERPRETS else "cuda:0")
    harness.progress("in Triton's interpreter: no times" if INTERPRETS else torch.cuda.get_device_name(device))
    torch.manual_seed(0)
    parts: list[str] = options.only or list(PARTS)
    rows: list[dict] = []
    result = {"bench": "gpu", "interpreted": INTERPRETS, "checked": 0, "failed": 0, "worst_error": 0.0}
    with torch.inference_mode():
        if "checks" in parts:
            shapes = gpu_checks.TINY if INTERPRETS else gpu_checks.SHAPES[:3] if options.quick else gpu_checks.SHAPES
            rows += check(device, shapes, result)
        if "graphs" in parts:
            check_graphs(device, result)
        result |= {f"launches_r{rank}": gpu_launches.launches_of(device, rank) for rank in (1, 8)}
        host_us = gpu_launches.host_us(device)
        result |= {"host_us_per_layer": host_us["median"], "host_us_spread": host_us["spread"]}
        # A wrong kernel's speed is no speed.
        if not result["failed"]:
            rows += timed_rows(device, parts, options.quick)
    if not INTERPRETS and not options.quick:
        setup = harness.environment()
        harness.append_rows(harness.RESULTS / "gpu.jsonl", [setup | row for row in [*rows, result | {"quick": False}]])
        draw(rows)
    harness.finish(result)
    raise SystemExit(1 if result["failed"] else 0)


if __name__ == "__main__":
    main()
