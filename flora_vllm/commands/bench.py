"""`flora-vllm bench`: runs the repository's benchmarks one after another; they are not part of an installed package."""

import argparse
import subprocess
import sys
from pathlib import Path

from flora_vllm.errors import ConfigError

EXAMPLES = """\
examples:
  flora-vllm bench             # all of them, shortened
  flora-vllm bench ops         # one
  flora-vllm bench ops --full  # as published: appends rows to benchmarks/results/ops.jsonl

The last line of each is one JSON object.
"""
BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run the benchmarks of this repository."
    parser.epilog = EXAMPLES
    parser.add_argument("names", metavar="NAME", nargs="*", help="which ones (default: all that are there)")
    parser.add_argument("--full", action="store_true", help="full length instead of a few minutes each")


def run(args: argparse.Namespace) -> int:
    """0 if every benchmark ended well, else the first bad exit status. Raises ConfigError for a name not there."""
    found = {path.stem.removeprefix("bench_"): path for path in sorted(BENCHMARKS.glob("bench_*.py"))}
    missing = [name for name in args.names if name not in found]
    if missing or not found:
        raise ConfigError(f"no benchmark {' '.join(missing)} in {BENCHMARKS}; there are: {', '.join(found) or 'none'}")
    for name in args.names or found:
        print(f"== {name}", file=sys.stderr, flush=True)
        command = [sys.executable, str(found[name]), *([] if args.full else ["--quick"])]
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            return status
    return 0
