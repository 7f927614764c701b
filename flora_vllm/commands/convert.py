"""`flora-vllm convert`: the command's arguments and body.

The work is in training/fit.py and training/convert.py, of --to-lora in formats/lora_writer.py.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flora_vllm.commands import convert_files
from flora_vllm.errors import AdapterError, ConfigError, check_installed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flora_vllm.adapter import Adapter
    from flora_vllm.training.fit import Factors, Fit

EXAMPLES = f"""\
examples:
  flora-vllm convert --from-lora ./SmolLM2-135M ./adapters/haiku ./adapters/haiku-flora --rank 8 --text poems.jsonl
  flora-vllm convert --from-lora ./SmolLM2-135M ./adapters/haiku ./haiku-flora --rank 4 --text poems.jsonl --distill 100
  flora-vllm convert --from-ia3 ./SmolLM2-135M ./adapters/poet-ia3 ./adapters/poet
  flora-vllm convert --to-lora ./SmolLM2-135M ./adapters/haiku-pissa ./adapters/haiku
  flora-vllm convert --repair ./checkpoint-500 ./adapters/haiku
  flora-vllm convert --dlp folders_list.txt ./albert-base-v2 ./classifier.pth ./adapters/tasks --top-p 0.6
  flora-vllm convert --pickle ./final_checkpoint.pt ./adapters/tasks --alpha 16 --temperature 0.1

LoRA adds to the weights, FLoRA multiplies them: the fit is an approximation, and often a poor one. What it loses is
reported per layer, and with --text end to end, as the share of the LoRA's effect that is gone: 0 is the same adapter,
1 is none at all. More than --max-lost and nothing is written. --distill then moves the factors towards the LoRA's
answers on the text. IA3 converts exactly, or is refused: where it scales a bias, FLoRA can't follow.
Both need pip install "flora-vllm[train]".

--to-lora writes a plain LoRA, exactly: for families that are low rank once the base is known (PiSSA, OLoRA, KaSA,
PSOFT, OSF, AdaMSS, ...), whose loading would decompose every base weight each time. Others are refused.

{convert_files.EXAMPLES}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn an adapter of another family into FLoRA or LoRA, or its files into those that a server reads."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    family = parser.add_mutually_exclusive_group(required=True)
    family.add_argument("--from-lora", action="store_true", help="ADAPTER is LoRA")
    family.add_argument("--from-ia3", action="store_true", help="ADAPTER is IA3")
    family.add_argument("--to-lora", action="store_true", help="ADAPTER is of any family; OUT is LoRA")
    convert_files.add_arguments(parser, family)
    parser.add_argument("base", metavar="BASE", nargs="?", help="model directory or hub id (--repair: may be left out)")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter directory, or directory#task")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write the new adapter to")
    parser.add_argument("--rank", type=int, default=4, help="FLoRA's rank for --from-lora (default: 4)")
    parser.add_argument("--text", type=Path, help="measure and weigh the fit on this text (as `train` reads it)")
    parser.add_argument("--distill", type=int, default=0, metavar="STEPS", help="steps after the fit; needs --text")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate of --distill (default: 2e-3)")
    parser.add_argument("--batch", type=int, default=4, help="blocks in a batch (default: 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a block (default: 256)")
    parser.add_argument("--max-lost", type=float, default=0.5, help="largest lost share that is written (default: 0.5)")


def run(args: argparse.Namespace) -> int:
    """0 when OUT holds the adapter. Raises an error of ours or OSError if it does not."""
    _check(args)
    if args.repair or args.pickle or args.dlp is not None:
        convert_files.run(args)
    elif args.to_lora:
        _to_lora(args)
    else:
        check_installed("flora-vllm convert --from-lora and --from-ia3", "train", "peft", "transformers")
        from flora_vllm.training.checkpoint import check_out

        check_out(args.out)  # fits and distilling take long
        (_from_ia3 if args.from_ia3 else _from_lora)(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    faults = [
        f"--{name} is {getattr(args, name)}, must be at least {low}"
        for name, low in (("rank", 1), ("distill", 0), ("batch", 1), ("length", 2))
        if getattr(args, name) < low
    ]
    if not args.max_lost > 0:
        faults.append(f"--max-lost is {args.max_lost}, must be above 0")
    if not args.lr > 0:
        faults.append(f"--lr is {args.lr}, must be above 0")
    if args.distill and args.text is None:
        faults.append("--distill learns from the LoRA's answers on a text; give --text")
    if not args.from_lora and args.text is not None:
        faults.append("--text is for --from-lora; what is converted exactly needs none")
    files_only = args.repair or args.pickle
    if args.base is None and not files_only:
        faults.append("BASE is missing: BASE ADAPTER OUT")
    if not files_only and any(value is not None for value in (args.alpha, args.temperature, args.top_k)):
        faults.append("--alpha, --temperature and --top-k are for --pickle and --repair")
    if args.dlp is None and (args.top_p is not None or args.max_tokens is not None):
        faults.append("--top-p and --max-tokens are for --dlp")
    if faults:
        raise ConfigError("; ".join(faults))


def _read(args: argparse.Namespace, family: str) -> tuple["Adapter", "PreTrainedModel", "PreTrainedTokenizerBase"]:
    from flora_vllm.formats import read_adapter
    from flora_vllm.training.build import load_base

    adapter = read_adapter(args.adapter)
    if adapter.family != family:
        raise AdapterError(f"{args.adapter}: the adapter is {adapter.family}, not {family}")
    if adapter.invocation_tokens is not None:
        raise AdapterError(
            f"{args.adapter}: alora_invocation_tokens is set; what is measured and fitted here is an adapter of every "
            "token. Train a FLoRA adapter with alora_invocation_tokens instead"
        )
    if adapter.saved:
        _refuse_saved(args, adapter)
    return adapter, *load_base(args.base)


def _refuse_saved(args: argparse.Namespace, adapter: "Adapter") -> None:
    """Raises AdapterError for what is saved whole and is not the base's: the factors made here cannot hold it."""
    from flora_vllm.formats.base_model import open_base
    from flora_vllm.formats.repair import changed_of

    changed = changed_of(open_base(args.base), adapter.saved)
    if changed:
        raise AdapterError(
            f"{args.adapter}: {', '.join(sorted(changed))} saved whole and not equal to the base model's; what is made "
            "here holds factors only, so it would be lost. Serve the adapter as it is, or train FLoRA with "
            "modules_to_save"
        )


def _to_lora(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from flora_vllm.formats import read_adapter, split_task
    from flora_vllm.formats.base_model import base_layout, open_base
    from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME
    from flora_vllm.formats.lora_writer import lora_factors, write_lora
    from flora_vllm.formats.out import replaceable
    from flora_vllm.formats.reader import warn_of

    replaceable(args.out, (CONFIG_NAME, WEIGHTS_NAME))  # decomposing takes long
    base = open_base(args.base)
    path, task = split_task(args.adapter)
    adapter = read_adapter(path, layout=base_layout(base), task=task)
    warn_of(adapter.family, args.adapter)
    with tqdm(total=len(adapter.modules), unit="module", desc="converting", file=sys.stderr) as bar:
        found = lora_factors(base, adapter, bar)
    write_lora(args.out, found, args.base)
    rank = max(len(down) for down, _ in found.pairs.values())
    print(f"{len(found.pairs)} modules of {adapter.family} converted exactly to LoRA of rank {rank}: {args.out}")


def _from_ia3(args: argparse.Namespace) -> None:
    from flora_vllm.training.convert import linear_weights
    from flora_vllm.training.fit import ia3_factors

    adapter, model, _ = _read(args, "IA3")
    shapes = {name: (w.shape[0], w.shape[1]) for name, w in linear_weights(model, adapter.modules).items()}
    biased = {name for name in shapes if getattr(model.get_submodule(name), "bias", None) is not None}
    _write(args, ia3_factors(adapter, shapes, biased))
    print(f"{len(shapes)} modules converted exactly: {args.out}")


def _from_lora(args: argparse.Namespace) -> None:
    from flora_vllm.training.convert import input_energy, linear_weights
    from flora_vllm.training.data import make_blocks, read_documents
    from flora_vllm.training.fit import fit_lora

    adapter, model, tokenizer = _read(args, "LORA")
    weights = linear_weights(model, adapter.modules)
    if args.text is None:
        fit = fit_lora(adapter, weights, args.rank)
        _report_layers(fit)
        _refuse_if_lost(args, fit.total_lost, "of the update's weight")
        _write(args, fit.factors)
        print(f"wrote {args.out}; no --text was given, so what it does to the model's answers was not measured")
        return
    documents = read_documents(args.text, tokenizer)
    blocks = make_blocks(documents, tokenizer, args.length, 0.2, 0, str(args.text))
    energy = input_energy(model, list(adapter.modules), blocks.train[:64], args.batch)
    fit = fit_lora(adapter, weights, args.rank, energy)
    _report_layers(fit)
    factors, lost = _measure(args, model, fit.factors, blocks.train, blocks.held_out)
    _refuse_if_lost(args, lost, "of the LoRA's effect on the text")
    _write(args, factors)
    print(f"wrote {args.out}")


def _report_layers(fit: "Fit") -> None:
    width = max(map(len, fit.lost))
    print("lost share of each layer's update (0 exact, 1 nothing left):")
    for name, share in sorted(fit.lost.items(), key=lambda item: item[1]):
        print(f"  {name:<{width}}  {share:.3f}")
    print(f"  {'all layers':<{width}}  {fit.total_lost:.3f}")


def _measure(
    args: argparse.Namespace, model: "PreTrainedModel", factors: "Factors", train: "Tensor", held_out: "Tensor"
) -> "tuple[Factors, float]":
    """Distil if asked, then print perplexities; returns the factors and the lost share of the LoRA's effect."""
    from copy import deepcopy

    from peft import PeftModel

    from flora_vllm.training.convert import as_flora, distill, factors_of, mean_divergence
    from flora_vllm.training.loop import held_out_loss
    from flora_vllm.training.run import Bar

    teacher = PeftModel.from_pretrained(deepcopy(model), args.adapter).eval()
    student = as_flora(model, factors).eval()
    dtype = next(iter(factors.values()))[0].dtype

    def lost() -> float:
        return mean_divergence(teacher, student, held_out, args.batch) / effect

    with student.disable_adapter():
        effect = mean_divergence(teacher, student, held_out, args.batch)
        base = held_out_loss(student, held_out, args.batch)
    if not effect > 0:
        raise AdapterError(f"{args.adapter} does not change the model's answers on {args.text}; nothing to measure")
    share = lost()
    print(f"lost share of the LoRA's effect on held-out text: {share:.3f} after the fit")
    if args.distill:
        with Bar(args.distill, 0, "distilling") as bar:
            distill(teacher, student, train, steps=args.distill, rate=args.lr, batch=args.batch, seen=bar.seen)
        for parameter in student.parameters():
            if parameter.requires_grad:
                # What is served, and written below, is measured; the dtype of the fit's factors is the layers'.
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        share = lost()
        print(f"lost share of the LoRA's effect on held-out text: {share:.3f} after {args.distill} steps")
    losses = {"base": base, "LoRA": held_out_loss(teacher, held_out, args.batch)}
    losses["FLoRA"] = held_out_loss(student, held_out, args.batch)
    print("perplexity on held-out text: " + ", ".join(f"{name} {math.exp(v):.3f}" for name, v in losses.items()))
    return {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in factors_of(student, factors).items()}, share


def _refuse_if_lost(args: argparse.Namespace, lost: float, what: str) -> None:
    if not lost <= args.max_lost:
        raise AdapterError(
            f"rank {args.rank} loses {lost:.0%} {what}, more than --max-lost {args.max_lost:.0%} allows: nothing was "
            "written. Try a larger --rank or --distill, or train FLoRA on the LoRA's data with `flora-vllm train`"
        )


def _write(args: argparse.Namespace, factors: "Factors") -> None:
    from flora_vllm.formats import write_flora

    write_flora(args.out, factors, reduction="sum", base_model=args.base)
