"""`flora-vllm merge BASE ADAPTER OUT`: the command's arguments and body; the work is in formats/merge.py."""

import argparse
import sys
from pathlib import Path

from flora_vllm.errors import AdapterError

EXAMPLES = """\
examples:
  flora-vllm merge ./SmolLM2-135M ./adapters/haiku ./haiku-merged
  flora-vllm merge HuggingFaceTB/SmolLM2-135M-Instruct ./adapters/haiku ./haiku-merged
  vllm serve ./haiku-merged

BASE is a model directory or hub id with safetensors weights, ADAPTER a directory of any supported family.
The result has the base model's dtypes, sharding, configuration and tokenizer.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a copy of a model with an adapter merged into its weights."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("base", metavar="BASE", help="model directory or hub id")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter directory, or directory#task")
    parser.add_argument("out", metavar="OUT", help="directory to write; must be absent or empty")


def run(args: argparse.Namespace) -> int:
    """0 if OUT was written, 1 with the reason on stderr otherwise."""
    # Imported here so that `--help` does not wait for torch.
    from tqdm import tqdm

    from flora_vllm.formats import read_adapter, split_task
    from flora_vllm.formats.base_model import base_layout, open_base
    from flora_vllm.formats.merge import merge_model
    from flora_vllm.formats.reader import warn_of

    try:
        base = open_base(args.base)
        path, task = split_task(args.adapter)
        adapter = read_adapter(path, layout=base_layout(base), task=task)
        warn_of(adapter.family, args.adapter)
        total = sum((base.directory / name).stat().st_size for name in base.files)
        with tqdm(total=total, unit="B", unit_scale=True, desc="merging", file=sys.stderr) as bar:
            merge_model(base, adapter, Path(args.out), bar)
    except (AdapterError, OSError) as error:
        print(f"flora-vllm merge: {error}", file=sys.stderr)
        return 1
    print(f"merged {adapter.family} adapter ({len(adapter.modules)} modules) into {args.out}")
    return 0
