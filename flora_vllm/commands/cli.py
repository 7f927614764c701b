"""`flora-vllm`: one table of commands, each imported only when it is the one asked for.

A command's module offers `add_arguments(parser)`, which also sets the help text with its examples, and
`run(args) -> exit status`. A command whose module is not installed is not offered.
"""

import argparse
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from flora_vllm import __version__
from flora_vllm.environment import VARIABLES
from flora_vllm.errors import FloraError


@dataclass(frozen=True)
class Command:
    name: str
    module: str
    summary: str


COMMANDS = (
    Command("demo", "flora_vllm.demo.run", "serve a small model with several adapters and check what each request got"),
    Command("serve", "flora_vllm.commands.serve", "vllm serve --enable-flora, set up for this machine"),
    Command(
        "doctor", "flora_vllm.commands.doctor", "say whether this installation can serve adapters, and if not, why"
    ),
    Command("inspect", "flora_vllm.commands.inspect", "show what an adapter is, or everything wrong with it"),
    Command("merge", "flora_vllm.commands.merge", "write a model with an adapter merged into its weights"),
    Command("convert", "flora_vllm.commands.convert", "turn an adapter of another family into FLoRA"),
    Command("train", "flora_vllm.commands.train", "train an adapter that the server loads"),
    Command("cluster", "flora_vllm.cluster.command", "serve from many engines behind one endpoint"),
    Command("deploy", "flora_vllm.commands.deploy", "print a file for Docker, Compose, Kubernetes or Grafana"),
    Command("top", "flora_vllm.commands.top", "watch a server's adapters, tokens and queue"),
    Command("completion", "flora_vllm.commands.completion", "print a script for your shell"),
    Command("model", "flora_vllm.commands.model", "put a small offline model into a directory"),
    Command("bench", "flora_vllm.commands.bench", "run this repository's benchmarks"),
)

INDENT: Any = {"initial_indent": "  ", "subsequent_indent": "      "}
EPILOG = """\
examples:
  flora-vllm doctor
  flora-vllm inspect ./adapters/haiku
  vllm serve MODEL --enable-flora --lora-modules haiku=./adapters/haiku

`flora-vllm COMMAND --help` shows each command's own examples.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: the command's own; 1 with one message for an error of ours or the system's; 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = make_parser(arguments).parse_args(arguments)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (`| head`) went away; without this Python complains about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FloraError, OSError) as error:
        if "--debug" in arguments[:1]:
            traceback.print_exc()
        print(f"flora-vllm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nflora-vllm: interrupted", file=sys.stderr)
        return 130


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `arguments`: it knows all commands by name, and the options of the one they ask for."""
    parser = argparse.ArgumentParser(
        prog="flora-vllm",
        description="Serve FLoRA, LoRA, IA3 and HiRA adapters from stock vLLM, mixed in one batch.",
        epilog=EPILOG + environment_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error was found; comes before COMMAND")
    parser.add_argument("--version", action="version", version=f"flora-vllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    asked_for = next((word for word in arguments if not word.startswith("-")), None)
    for command in available():
        subparser = commands.add_parser(
            command.name, help=command.summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if command.name == asked_for:
            module = import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def environment_table() -> str:
    lines = [textwrap.fill(f"{name}: {text}", 80, **INDENT) for name, text in VARIABLES.items()]
    return "\n".join(["", "environment variables:", *lines])


def available() -> list[Command]:
    """The commands whose modules are there."""
    return [command for command in COMMANDS if find_spec(command.module) is not None]


if __name__ == "__main__":
    sys.exit(main())
