"""`flora-vllm merge`: the command's arguments and body.

The work is in formats/merge.py (an adapter into its base) and formats/lora_merges.py (adapters into one).
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flora_vllm.errors import AdapterError

if TYPE_CHECKING:
    from flora_vllm.formats.base_model import BaseModel

EXAMPLES = """\
examples:
  flora-vllm merge ./SmolLM2-135M ./adapters/haiku ./haiku-merged
  flora-vllm merge HuggingFaceTB/SmolLM2-135M-Instruct ./adapters/haiku ./haiku-merged
  vllm serve ./haiku-merged

  flora-vllm merge --method ties --weights 1,0.7 --density 0.5 ./adapters/haiku ./adapters/legal ./both
  flora-vllm merge --method dare_linear --weights=1,-0.5 --density 0.3 --seed 7 ./adapters/haiku ./adapters/legal ./both
  flora-vllm merge --method arrow --top-k 2 --general ./adapters/english ./adapters/haiku ./adapters/legal ./routed

BASE is a model directory or hub id with safetensors weights, ADAPTER a directory of any supported family.
The result has the base model's dtypes, sharding, configuration and tokenizer.

With --method the adapters are plain LoRAs, and OUT is the LoRA that PEFT's add_weighted_adapter makes of them: linear,
cat, svd, ties, magnitude_prune, dare_linear, dare_ties, or one of the last four and _svd. The names are PEFT's: linear
is not the weighted sum (cat is). dare's choices follow from --seed and each module's name. A base model is needed only
for adapters whose files hold weights of it whole (PEFT saves an adapted embedding so): --base.

--method arrow keeps the adapters apart: in every layer each token chooses --top-k of them by their prototypes, as
PEFT's create_arrow_model has it. The mean of the --general adapters is taken from each first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a copy of a model with an adapter merged into its weights, or LoRA adapters as one."
    parser.usage = (
        "%(prog)s [-h] BASE ADAPTER OUT\n       %(prog)s --method METHOD --weights W,W,... [--density D]"
        " [--majority-sign-method SIGNS]\n           [--seed N] [--svd-rank N] [--base MODEL] ADAPTER ADAPTER ... OUT"
        "\n       %(prog)s --method arrow [--top-k N] [--temperature T] [--seed N] [--general DIR]..."
        " [--base MODEL] ADAPTER ADAPTER ... OUT"
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--method", help="merge LoRA adapters as PEFT's method of this name does")
    parser.add_argument("--weights", metavar="W,W,...", help="one for each ADAPTER")
    parser.add_argument("--density", type=float, help="share of the entries that ties, magnitude_prune and dare keep")
    parser.add_argument("--majority-sign-method", metavar="SIGNS", help="of ties: total (default) or frequency")
    parser.add_argument("--seed", type=int, help="of dare, and of arrow's prototypes (default there: 0)")
    parser.add_argument("--svd-rank", type=int, help="of svd and *_svd (default: the adapters' largest)")
    parser.add_argument("--top-k", type=int, help="of arrow: adapters that a token takes (default: 3)")
    parser.add_argument("--temperature", type=float, help="of arrow: of the softmax over them (default: 1)")
    parser.add_argument("--general", action="append", metavar="DIR", help="of arrow: an adapter of general knowledge")
    parser.add_argument(
        "--base",
        dest="trained_on",
        metavar="MODEL",
        help="with --method, the base model: what an adapter's file holds whole of it, unchanged, is passed over",
    )
    parser.add_argument("base", metavar="BASE", help="model directory or hub id; with --method the first adapter")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", help="adapter directory, or directory#task")
    parser.add_argument("out", metavar="OUT", help="directory to write; must be absent or empty")


def run(args: argparse.Namespace) -> int:
    """0 if OUT was written. Raises AdapterError or OSError if not."""
    print(_into_base(args) if args.method is None else _into_one(args))
    return 0


def _into_base(args: argparse.Namespace) -> str:
    # Imported here so that `--help` does not wait for torch.
    from tqdm import tqdm

    from flora_vllm.formats import read_adapter, split_task
    from flora_vllm.formats.base_model import base_layout, open_base
    from flora_vllm.formats.merge import merge_model
    from flora_vllm.formats.out import replaceable
    from flora_vllm.formats.reader import warn_of

    if len(args.adapters) > 1:
        raise AdapterError(f"{len(args.adapters)} adapters need --method; else give BASE ADAPTER OUT")
    _refuse(args, "what merges LoRA adapters, by --method", "seed", "trained_on", *_OF_MERGES, *_OF_ARROW)
    out = replaceable(Path(args.out))
    (given_adapter,) = args.adapters
    base = open_base(args.base)
    path, task = split_task(given_adapter)
    adapter = read_adapter(path, layout=base_layout(base), task=task)
    warn_of(adapter.family, given_adapter)
    total = sum((base.directory / name).stat().st_size for name in base.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", file=sys.stderr) as bar:
        merge_model(base, adapter, out, bar)
    return f"merged {adapter.family} adapter ({len(adapter.modules)} modules) into {args.out}"


# Options beside --seed, which both have.
_OF_MERGES = ("weights", "density", "majority_sign_method", "svd_rank")
_OF_ARROW = ("top_k", "temperature", "general")


def _refuse(args: argparse.Namespace, for_what: str, *names: str) -> None:
    """Raises AdapterError for options that would have no effect."""
    flags = {"trained_on": "--base"}
    given = [flags.get(name, f"--{name.replace('_', '-')}") for name in names if getattr(args, name) is not None]
    if given:
        raise AdapterError(f"{', '.join(given)}: for {for_what}")


def _into_one(args: argparse.Namespace) -> str:
    from flora_vllm.formats.lora_merges import merged_lora, read_part
    from flora_vllm.formats.lora_writer import write_lora
    from flora_vllm.formats.merge_methods import Method
    from flora_vllm.formats.out import replaceable

    if args.method == "arrow":
        return _into_arrow(args)
    _refuse(args, "--method arrow", *_OF_ARROW)
    method = Method(args.method, args.density, args.majority_sign_method, args.seed, args.svd_rank)
    paths = [args.base, *args.adapters]
    weights = _weights(args.weights, len(paths))
    out = replaceable(Path(args.out))
    base = _trained_on(args)
    parts = [read_part(weight, path, base) for weight, path in zip(weights, paths, strict=True)]
    found = merged_lora(parts, method)
    write_lora(out, found, parts[0].adapter.base_model)
    rank = max(len(down) for down, _ in found.pairs.values())
    return (
        f"merged {len(parts)} LoRA adapters by {args.method} into {args.out}: {len(found.pairs)} modules, rank {rank}"
    )


def _trained_on(args: argparse.Namespace) -> "BaseModel | None":
    from flora_vllm.formats.base_model import open_base

    return None if args.trained_on is None else open_base(args.trained_on)


def _into_arrow(args: argparse.Namespace) -> str:
    from flora_vllm.formats.arrow import Routing, write_arrow
    from flora_vllm.formats.lora_merges import read_part
    from flora_vllm.formats.out import replaceable

    _refuse(args, "methods other than arrow", *_OF_MERGES)
    given = {"top_k": args.top_k, "temperature": args.temperature, "seed": args.seed}
    routing = Routing(**{name: value for name, value in given.items() if value is not None})
    out = replaceable(Path(args.out))
    base = _trained_on(args)
    tasks = [read_part(1, path, base) for path in (args.base, *args.adapters)]
    general = [read_part(1, path, base) for path in args.general or ()]
    write_arrow(out, tasks, general, routing)
    return f"{args.out}: each token chooses {routing.top_k} of {len(tasks)} LoRA adapters in each layer"


def _weights(text: str | None, number: int) -> list[float]:
    try:
        weights = [float(word) for word in (text or "").split(",")]
    except ValueError:
        weights = []
    if len(weights) != number or not all(map(math.isfinite, weights)):
        raise AdapterError(
            f"--weights is {text!r}, must be {number} finite numbers with commas between, one an adapter"
        )
    return weights
