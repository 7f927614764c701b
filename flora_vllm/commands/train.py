"""`flora-vllm train BASE DATA OUT`: the command's arguments and body; the work is in training/."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flora_vllm.errors import ConfigError, FloraError

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
each method gets its own rate (flora 8e-3, lora 2e-4, ia3 5e-3); FLoRA's factors multiply the weights and need tens of
times LoRA's rate.

With --jobs one run trains many FLoRA adapters in shared batches, each example through its own:

  base: ./SmolLM2-135M
  steps: 200                 # any option, for all jobs or inside one
  jobs:
    - {data: notes.jsonl, out: adapters/notes}
    - {data: src/, out: adapters/code, rank: 4, lr: 0.01}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train an adapter that flora-vllm serves."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("base", metavar="BASE", nargs="?", help="model directory or hub id")
    parser.add_argument(
        "data", metavar="DATA", nargs="?", type=Path, help=".jsonl of texts, chats or clips, text file or directory"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="directory to write the adapter to")
    # What is not given is left to training.run.Request, which holds the defaults for jobs files too.
    unset = argparse.SUPPRESS
    parser.add_argument("--method", choices=("flora", "lora", "ia3"), default=unset, help="default: flora")
    parser.add_argument("--rank", type=int, default=unset, help="default: 1, where FLoRA is cheapest to serve")
    targets = "module names with commas, a regex or all-linear (default: PEFT's choice for the architecture)"
    parser.add_argument("--targets", default=unset, help=targets)
    parser.add_argument("--steps", type=int, default=unset, help="default: one epoch")
    parser.add_argument("--epochs", type=float, default=unset, help="passes over the training blocks")
    parser.add_argument("--lr", type=float, default=unset, help="peak learning rate (default: the method's, see below)")
    parser.add_argument("--batch", type=int, default=unset, help="blocks in a step (default: 4)")
    parser.add_argument(
        "--length", type=int, default=unset, help="tokens in a block, or the most in a transcript (256)"
    )
    parser.add_argument("--held-out", type=float, default=unset, help="share of the text to measure with (0.05)")
    parser.add_argument("--save-every", type=int, default=unset, metavar="STEPS", help="default: 50")
    parser.add_argument("--seed", type=int, default=unset, help="default: 0")
    parser.add_argument("--sweep", action="store_true", help="first try five rates shortly and take the best")
    parser.add_argument("--restart", action="store_true", help="forget the run that OUT.training holds")
    parser.add_argument("--jobs", type=Path, metavar="FILE", help="train the adapters this YAML file lists, together")


OPTIONS = ("method", "rank", "targets", "steps", "epochs", "lr", "batch", "length", "held_out", "save_every", "seed")


def run(args: argparse.Namespace) -> int:
    """0 when every adapter is in its OUT, 1 with the reason on stderr, 130 after Ctrl-C."""
    try:
        if args.jobs is not None:
            _train_jobs(args)
        else:
            _train(args)
    except KeyboardInterrupt:
        print("\nflora-vllm train: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    except (FloraError, OSError) as error:
        print(f"flora-vllm train: {error}", file=sys.stderr)
        return 1
    return 0


def _train(args: argparse.Namespace) -> None:
    # Imported here so that `--help` does not wait for torch, transformers and PEFT.
    from flora_vllm.training.run import Request, prepare, sweep, train_one

    if args.base is None or args.data is None or args.out is None:
        raise ConfigError("give BASE DATA OUT, or --jobs FILE; --help has examples")
    if args.sweep and hasattr(args, "lr"):
        raise ConfigError("--sweep looks for the rate that --lr gives; leave one out")
    request = Request(args.base, args.data, args.out, **{k: getattr(args, k) for k in OPTIONS if hasattr(args, k)})
    if args.restart:
        _forget(request.out)
    model, blocks = prepare(request)
    rate = next(iter(sweep(request, model, blocks))) if args.sweep else request.rate
    measured = train_one(request, model, blocks, rate)
    print(_losses(measured))
    print(
        f"adapter: {request.out}\nserve it:\n  {serve_line(request.base, {request.out: request.rank}, request.method)}"
    )


def _train_jobs(args: argparse.Namespace) -> None:
    from flora_vllm.training.jobs import read_jobs, train_together

    given = [name for name in ("base", "data", "out") if getattr(args, name) is not None]
    given += [f"--{name.replace('_', '-')}" for name in OPTIONS if hasattr(args, name)]
    if given or args.sweep:
        raise ConfigError(f"--jobs says all of it in its file; leave out {', '.join(given or ['--sweep'])}")
    requests = read_jobs(args.jobs)
    if args.restart:
        for request in requests:
            _forget(request.out)
    report = train_together(requests)
    for out, measured in report.measured.items():
        print(f"{out}: {_losses(measured)}")
    print(f"steps took {report.seconds:.1f} s together; one job after another they take about {report.alone_s:.1f} s")
    print(f"serve them:\n  {serve_line(requests[0].base, {request.out: request.rank for request in requests})}")


def _forget(out: Path) -> None:
    import shutil

    from flora_vllm.training.checkpoint import training_directory

    shutil.rmtree(training_directory(out), ignore_errors=True)


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
    return shlex.join([*words, "--lora-modules", *(f"{out.name}={out}" for out in rank_of)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flora-vllm train")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
