"""`flora-vllm train BASE DATA OUT`: the command's arguments and body; the work is in training/."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flora_vllm.errors import ConfigError, FloraError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flora_vllm.training.checkpoint import Settings
    from flora_vllm.training.data import Blocks

EXAMPLES = """\
examples:
  flora-vllm train ./SmolLM2-135M notes.jsonl ./adapters/notes
  flora-vllm train HuggingFaceTB/SmolLM2-135M-Instruct src/ ./adapters/code --rank 4 --targets q_proj,k_proj
  flora-vllm train ./SmolLM2-135M chats.jsonl ./adapters/helper --sweep --epochs 2
  flora-vllm train ./SmolLM2-135M notes.jsonl ./adapters/notes-lora --method lora --rank 8

DATA is a .jsonl file of {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]} lines, a
directory of text files, or one text file. OUT becomes a directory that the server loads; the command that serves it
is printed at the end. OUT.training beside it holds the log and what is needed to go on: run the same command again
after Ctrl-C or a crash. With --lr left out each method gets its own rate (flora 8e-3, lora 2e-4, ia3 5e-3);
FLoRA's factors multiply the weights and need tens of times LoRA's rate.
"""

SWEEP_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train an adapter that flora-vllm serves."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("base", metavar="BASE", help="model directory or hub id")
    parser.add_argument("data", metavar="DATA", type=Path, help=".jsonl file, text file or directory of text files")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write the adapter to")
    parser.add_argument("--method", choices=("flora", "lora", "ia3"), default="flora", help="default: flora")
    parser.add_argument("--rank", type=int, default=1, help="default: 1, where FLoRA is cheapest to serve")
    parser.add_argument("--targets", help="module names with commas, a regex or all-linear (default: PEFT's choice)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default: one epoch")
    length.add_argument("--epochs", type=float, help="passes over the training blocks, instead of --steps")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the method's own, see below)")
    parser.add_argument("--sweep", action="store_true", help="first try five rates shortly and take the best")
    parser.add_argument("--batch", type=int, default=4, help="blocks in a step (default: 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a block (default: 256)")
    parser.add_argument(
        "--held-out", type=float, default=0.05, help="share of the text to measure with (default: 0.05)"
    )
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS", help="default: 50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restart", action="store_true", help="forget the run that OUT.training holds")


def run(args: argparse.Namespace) -> int:
    """0 when the adapter is in OUT, 1 with the reason on stderr, 130 after Ctrl-C."""
    try:
        _check(args)
        _train(args)
    except KeyboardInterrupt:
        print(f"\nflora-vllm train: interrupted; the same command goes on from {args.out}.training", file=sys.stderr)
        return 130
    except (FloraError, OSError) as error:
        print(f"flora-vllm train: {error}", file=sys.stderr)
        return 1
    return 0


def _check(args: argparse.Namespace) -> None:
    limits = {"rank": (1, None), "steps": (1, None), "batch": (1, None), "length": (2, None), "save_every": (1, None)}
    faults = [
        f"--{name.replace('_', '-')} is {value}, must be at least {low}"
        for name, (low, _) in limits.items()
        if (value := getattr(args, name)) is not None and value < low
    ]
    if args.epochs is not None and args.epochs <= 0:
        faults.append(f"--epochs is {args.epochs}, must be above 0")
    if args.lr is not None and not args.lr > 0:
        faults.append(f"--lr is {args.lr}, must be above 0")
    if not 0 < args.held_out < 1:
        faults.append(f"--held-out is {args.held_out}, must be between 0 and 1")
    if args.sweep and args.lr is not None:
        faults.append("--sweep looks for the rate that --lr gives; leave one out")
    if faults:
        raise ConfigError("; ".join(faults))


def _train(args: argparse.Namespace) -> None:
    # Imported here so that `--help` does not wait for torch, transformers and PEFT.
    import shutil

    from flora_vllm.training.build import METHODS, load_base
    from flora_vllm.training.checkpoint import training_directory
    from flora_vllm.training.learning_rate import warn_if_lora_sized

    if args.restart:
        shutil.rmtree(training_directory(args.out), ignore_errors=True)
    model, tokenizer = load_base(args.base)
    blocks = _read_blocks(args, tokenizer)
    rate = args.lr or METHODS[args.method].rate
    if args.sweep:
        rate = _sweep(args, model, blocks)
    if args.method == "flora":
        warn_if_lora_sized(rate)
    settings = _settings(args, blocks, rate)
    measured = _run_to_end(args, model, blocks, settings)
    print(f"held-out loss (nats a token): base {measured.base:.4f}, adapter {measured.adapter:.4f}")
    print(f"adapter: {args.out}\nserve it:\n  {serve_line(args)}")


def _read_blocks(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> "Blocks":
    from flora_vllm.training.data import make_blocks, read_documents

    documents = read_documents(args.data, tokenizer)
    blocks = make_blocks(documents, tokenizer, args.length, args.held_out, args.seed, str(args.data))
    print(
        f"data: {len(documents)} documents, {blocks.train.numel()} tokens to train on, "
        f"{blocks.held_out.numel()} held out"
    )
    return blocks


def _settings(args: argparse.Namespace, blocks: "Blocks", rate: float) -> "Settings":
    from flora_vllm.training.checkpoint import Settings

    epoch = -(-len(blocks.train) // args.batch)
    steps = args.steps or max(1, round(epoch * (args.epochs or 1)))
    return Settings(
        base=args.base,
        method=args.method,
        rank=args.rank,
        targets=args.targets,
        data=str(args.data),
        tokens=blocks.train.numel(),
        length=args.length,
        batch=args.batch,
        steps=steps,
        rate=rate,
        seed=args.seed,
    )


@dataclass(frozen=True)
class Measured:
    """Held-out losses in nats per token."""

    base: float
    adapter: float


def _attach(args: argparse.Namespace, model: "PreTrainedModel") -> "PeftModel":
    import torch

    from flora_vllm.training.build import METHODS, add_adapter, parse_targets

    torch.manual_seed(args.seed)
    config = METHODS[args.method].config(args.rank, parse_targets(args.targets), model.config.model_type)
    return add_adapter(model, config)


def _sweep(args: argparse.Namespace, model: "PreTrainedModel", blocks: "Blocks") -> float:
    """A tenth of the run at each of five rates around the method's own; the rate with the lowest held-out loss."""
    from dataclasses import replace

    from flora_vllm.training.build import METHODS
    from flora_vllm.training.loop import DivergedError, Job, held_out_loss, train

    settings = _settings(args, blocks, METHODS[args.method].rate)
    settings = replace(settings, steps=max(10, settings.steps // 10))
    losses: dict[float, float] = {}
    for factor in SWEEP_FACTORS:
        rate = METHODS[args.method].rate * factor
        peft_model = _attach(args, model)
        job = Job("default", replace(settings, rate=rate), blocks)
        try:
            with _bar(settings.steps, 0, f"sweep {rate:g}") as bar:
                train(peft_model, [job], seen=bar.seen)
            losses[rate] = held_out_loss(peft_model, blocks.held_out, args.batch)
            print(f"sweep: rate {rate:g} gives held-out loss {losses[rate]:.4f} after {settings.steps} steps")
        except DivergedError:
            print(f"sweep: rate {rate:g} diverges")
        model = peft_model.unload()
    if not losses:
        raise ConfigError(f"every rate of the sweep diverged on {args.data}; is the text what you meant?")
    return min(losses, key=losses.__getitem__)


def _run_to_end(args: argparse.Namespace, model: "PreTrainedModel", blocks: "Blocks", settings: "Settings") -> Measured:
    from flora_vllm.training.checkpoint import load_state, log_row, publish_adapter
    from flora_vllm.training.loop import DivergedError, Job, held_out_loss, train

    dtype = next(model.parameters()).dtype
    base = held_out_loss(model, blocks.held_out, args.batch)
    peft_model = _attach(args, model)
    peft_model.print_trainable_parameters()
    job = Job("default", settings, blocks, args.out)
    before = load_state(args.out, settings)
    done = before["step"] if before is not None else 0
    if done:
        print(f"going on after step {done} of {settings.steps}")
    try:
        with _bar(settings.steps, done, "training") as bar:
            train(peft_model, [job], save_every=args.save_every, seen=bar.seen)
    except DivergedError as error:
        raise DivergedError(f"{error}. {_kept(args.out, settings)}") from None
    # What is published is in the model's dtype; measure that, not the float32 factors.
    _round_factors(peft_model, dtype)
    adapter = held_out_loss(peft_model, blocks.held_out, args.batch)
    publish_adapter(peft_model, args.out, "default", dtype, args.base)
    log_row(args.out, {"held_out_base": base, "held_out_adapter": adapter})
    return Measured(base, adapter)


def _kept(out: Path, settings: "Settings") -> str:
    from flora_vllm.training.checkpoint import load_state

    state = load_state(out, settings)
    if state is None:
        return "No checkpoint had been written yet"
    return f"The checkpoint after step {state['step']} was kept; the same command with a lower --lr goes on from it"


def _round_factors(model: "PeftModel", dtype: "torch.dtype") -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


class _Bar:
    """A progress bar over steps with the smoothed loss and tokens per second since this process began."""

    def __init__(self, steps: int, done: int, label: str) -> None:
        from time import perf_counter

        from tqdm import tqdm

        self._clock, self._start, self._tokens, self._loss = perf_counter, perf_counter(), 0, None
        self._bar = tqdm(total=steps, initial=done, desc=label, unit="step", file=sys.stderr)

    def seen(self, losses: dict[str, float], tokens: int) -> None:
        loss = sum(losses.values()) / len(losses)
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        self._tokens += tokens
        rate = self._tokens / (self._clock() - self._start)
        self._bar.set_postfix_str(f"loss {self._loss:.3f}, {rate:.0f} tokens/s", refresh=False)
        self._bar.update()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


def _bar(steps: int, done: int, label: str) -> _Bar:
    return _Bar(steps, done, label)


def serve_line(args: argparse.Namespace) -> str:
    """The command that serves the base with the adapter of this run."""
    import shlex

    words = ["vllm", "serve", args.base, "--enable-flora"]
    if args.method == "flora" and args.rank > 16:
        words += ["--max-flora-rank", str(args.rank)]
    if args.method == "lora" and args.rank > 16:
        words += ["--max-lora-rank", str(next((r for r in (32, 64, 128, 256, 320) if r >= args.rank), 512))]
    return shlex.join([*words, "--lora-modules", f"{args.out.name}={args.out}"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flora-vllm train")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
