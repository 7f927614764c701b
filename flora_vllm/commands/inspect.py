"""`flora-vllm inspect DIR`: what an adapter is and whether it can be served, without starting an engine."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora_vllm.errors import AdapterError, in_kinds

if TYPE_CHECKING:
    from flora_vllm.formats import Examination

EXAMPLES = """\
examples:
  flora-vllm inspect ./adapters/haiku
  flora-vllm inspect ./adapters/haiku --base ./SmolLM2-135M   # check modules and shapes against a model too
  flora-vllm inspect ./adapters/haiku --json | jq .faults     # all of them, not one of each kind
  flora-vllm inspect ./adapters/haiku --plot                  # haiku.png: norms by layer and module, rank spectrum

Exit status: 0 if the adapter can be served, 1 if not; every reason is listed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show an adapter's family, rank, modules, size and digest, or everything wrong with it."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dir", metavar="DIR", help="adapter directory, or directory#task")
    parser.add_argument("--base", metavar="MODEL", help="model directory or hub id whose shapes the adapter must fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", nargs="?", const="", metavar="FILE", help="draw the factors (default: NAME.png here)")


def run(args: argparse.Namespace) -> int:
    """0 if the adapter can be served, 1 if not or if `--base` cannot be read."""
    # Imported here so that `--help` does not wait for torch.
    from flora_vllm.formats import Examination, examine, split_task
    from flora_vllm.formats.base_model import base_layout, open_base

    path, task = split_task(args.dir)
    try:
        layout = None if args.base is None else base_layout(open_base(args.base))
        found = examine(path, layout=layout, task=task)
    except AdapterError as error:
        # The base model is at fault; what can be said without it still is.
        alone = examine(path, task=task)
        found = Examination(None, (str(error), *alone.faults), alone.family, alone.digest)
    summary = summarise(found)
    if args.plot is not None and summary["servable"]:
        from flora_vllm.commands.plot import draw

        name = Path(path).resolve().name
        print(f"drawn: {draw(Path(path), Path(args.plot or f'{name}.png'))}", file=sys.stderr)
    if args.json:
        json.dump(summary, sys.stdout)
        print()
    else:
        print(_as_text(summary))
    return 0 if summary["servable"] else 1


def summarise(found: "Examination") -> dict[str, Any]:
    """The object of `--json`: null where unknown; `modules` are sorted paths, `bytes` those of all factors."""
    adapter = found.adapter
    return {
        "family": found.family,
        "rank": None if adapter is None else adapter.rank,
        "modules": [] if adapter is None else sorted(adapter.modules),
        "bytes": None if adapter is None else adapter.nbytes,
        "digest": found.digest,
        "servable": adapter is not None,
        "caution": _caution(found),
        "faults": list(found.faults),
    }


def _caution(found: "Examination") -> str | None:
    """What a user of this family must know."""
    from flora_vllm.formats import FAMILIES

    family = FAMILIES.get(found.family or "")
    return (family.caution or None) if family is not None else None


def _as_text(summary: dict[str, Any]) -> str:
    shown = {**summary, "modules": len(summary["modules"]), "servable": "yes" if summary["servable"] else "no"}
    faults, caution = shown.pop("faults"), shown.pop("caution")
    lines = [f"{key:9} {'unknown' if value is None else value}" for key, value in shown.items()]
    if caution is not None:
        lines.append(f"caution   {caution}")
    return "\n".join([*lines, *(f"  - {line}" for line in in_kinds(faults))])
