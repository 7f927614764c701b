"""`flora-vllm train BASE DATA OUT`: the command's arguments and body; the work is in training/."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flora_vllm.errors import ConfigError, check_installed
from flora_vllm.options import add_flags, flags_of, given
from flora_vllm.train_request import RATES, Request

if TYPE_CHECKING:
    from flora_vllm.training.run import Measured

EXAMPLES = """\
examples:
  flora-vllm train ./SmolLM2-135M notes.jsonl ./adapters/notes
  flora-vllm train HuggingFaceTB/SmolLM2-135M-Instruct src/ ./adapters/code --rank 4 --targets q_proj,k_proj
  flora-vllm train ./SmolLM2-135M chats.jsonl ./adapters/helper --sweep --epochs 2
  flora-vllm train ./SmolLM2-135M notes.jsonl ./adapters/notes-lora --method lora --rank 8
  flora-vllm train openai/whisper-base clips.jsonl ./adapters/dictation --batch 6
  flora-vllm train --jobs jobs.yaml

DATA is a .jsonl file of {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]} lines, a
directory of text files, or one text file. For a Whisper base it is a .jsonl file of
{"audio": "clip.flac", "text": "what is said", "language": "fr"} lines: paths are relative to that file, any sound
format and rate will do, and a line without a language gets the one the model hears.

OUT becomes a directory that the server loads; the command that serves it is printed at the end. OUT.training beside
it holds the log and what is needed to go on: run the same command again after Ctrl-C or a crash. With --lr left out
each method gets its own rate (RATES); FLoRA's factors multiply the weights and need tens of
times LoRA's rate. All of it needs pip install "flora-vllm[train]".

With --jobs one run trains many FLoRA adapters in shared batches, each example through its own:

  base: ./SmolLM2-135M
  steps: 200                 # any option, for all jobs or inside one
  jobs:
    - {data: notes.jsonl, out: adapters/notes}
    - {data: src/, out: adapters/code, rank: 4, lr: 0.01}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train an adapter that flora-vllm serves."
    parser.epilog = EXAMPLES.replace("RATES", ", ".join(f"{method} {rate:g}" for method, rate in RATES.items()))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("base", metavar="BASE", nargs="?", help="model directory or hub id")
    parser.add_argument(
        "data", metavar="DATA", nargs="?", type=Path, help=".jsonl of texts, chats or clips, text file or directory"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="directory to write the adapter to")
    add_flags(Request, parser)
    parser.add_argument("--sweep", action="store_true", help="first try five rates shortly and take the best")
    parser.add_argument("--restart", action="store_true", help="forget the run that OUT.training holds")
    parser.add_argument("--jobs", type=Path, metavar="FILE", help="train the adapters this YAML file lists, together")


def run(args: argparse.Namespace) -> int:
    """0 when every adapter is in its OUT, 130 after Ctrl-C. Raises an error of ours or OSError otherwise."""
    check_installed("flora-vllm train", "train", "peft", "transformers")
    try:
        if args.jobs is not None:
            _train_jobs(args)
        else:
            _train(args)
    except KeyboardInterrupt:
        print("\nflora-vllm train: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def _train(args: argparse.Namespace) -> None:
    # Imported here so that `--help` does not wait for torch, transformers and PEFT.
    from flora_vllm.training.run import prepare, sweep, train_one

    if args.base is None or args.data is None or args.out is None:
        raise ConfigError("give BASE DATA OUT, or --jobs FILE; --help has examples")
    if args.sweep and args.lr is not None:
        raise ConfigError("--sweep looks for the rate that --lr gives; leave one out")
    request = Request(args.base, args.data, args.out, **given(Request, args))
    model, blocks = prepare(request)
    rate = next(iter(sweep(request, model, blocks))) if args.sweep else request.rate
    measured = train_one(request, model, blocks, rate, restart=args.restart)
    print(_losses(measured))
    print(
        f"adapter: {request.out}\nserve it:\n  {serve_line(request.base, {request.out: request.rank}, request.method)}"
    )


def _train_jobs(args: argparse.Namespace) -> None:
    from flora_vllm.training.jobs import read_jobs, train_together

    said = [name for name in ("base", "data", "out") if getattr(args, name) is not None]
    said += [flags_of(Request, [name]) for name in given(Request, args)]
    if said or args.sweep:
        raise ConfigError(f"--jobs says all of it in its file; leave out {', '.join(said or ['--sweep'])}")
    requests = read_jobs(args.jobs)
    report = train_together(requests, restart=args.restart)
    for out, measured in report.measured.items():
        print(f"{out}: {_losses(measured)}")
    print(f"steps took {report.seconds:.1f} s together; one job after another they take about {report.alone_s:.1f} s")
    print(f"serve them:\n  {serve_line(requests[0].base, {request.out: request.rank for request in requests})}")


def _losses(measured: "Measured") -> str:
    return f"held-out loss (nats a token): base {measured.base:.4f}, adapter {measured.adapter:.4f}"


def serve_line(base: str, rank_of: dict[Path, int], method: str = "flora") -> str:
    """The command that serves `base` with the adapters; limits are raised where a rank is above vLLM's or ours."""
    import shlex

    rank = max(rank_of.values())
    words = ["vllm", "serve", base, "--enable-flora"]
    if method == "flora" and rank > 16:
        words += ["--max-flora-rank", str(rank)]
    if method == "lora" and rank > 16:
        words += ["--max-lora-rank", str(next((r for r in (32, 64, 128, 256, 320) if r >= rank), 512))]
    if len(rank_of) > 1:
        words += ["--max-loras", str(len(rank_of))]
    return shlex.join([*words, "--lora-modules", *(f"{adapter_name(out, rank_of)}={out}" for out in rank_of)])


def adapter_name(out: Path, all_outs: Iterable[Path]) -> str:
    """The directory's name, after as many of its parents' as tell it from the others."""
    parts, others = out.absolute().parts, [other.absolute().parts for other in all_outs if other != out]
    length = next((n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)), len(parts))
    return "-".join(parts[-length:])
