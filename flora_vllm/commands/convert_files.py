"""`flora-vllm convert --repair`, `--pickle`, `--dlp`: an adapter's files rewritten so that a server reads them."""

import argparse
from pathlib import Path

EXAMPLES = """\
--repair rewrites names that a trainer left as they were (an adapter's name, module., _orig_mod., no base_model.model.,
Tinker's unembed_tokens) and, if BASE is given, drops saved weights that equal it. --pickle does the same to .bin, .pt
and .pth, of which only tensors are read; MTL-LoRA's final_checkpoint.pt, LoRA Recycle's w_a_000 and MixLoRA's folder
are known, and of MeteoRA's model its shards' gates and factors are taken. Both say what they did, and write nothing
that would not be served.

--dlp makes a DLP-LoRA folder (serve it as dlp:OUT) of its authors' files: LIST.txt names a LoRA folder a line, BASE is
the classifier's encoder (ALBERT or RoBERTa, with its tokenizer), ADAPTER the classifier's .pth."""


def add_arguments(parser: argparse.ArgumentParser, modes: argparse._MutuallyExclusiveGroup) -> None:
    modes.add_argument("--repair", action="store_true", help="ADAPTER is a folder or file with names left by a trainer")
    modes.add_argument("--pickle", action="store_true", help="as --repair; ADAPTER may be a .bin, .pt or .pth")
    modes.add_argument("--dlp", type=Path, metavar="LIST.txt", help="BASE and ADAPTER are DLP-LoRA's encoder and .pth")
    parser.add_argument("--top-p", type=float, help="of --dlp: how much probability is kept (default: 0.6)")
    parser.add_argument("--max-tokens", type=int, help="of --dlp: last tokens of a prompt (default: 510)")
    parser.add_argument("--alpha", type=float, help="lora_alpha of MTL-LoRA or MeteoRA, which their files leave out")
    parser.add_argument("--temperature", type=float, help="MTL-LoRA's B_scale, MeteoRA's of its gate")
    parser.add_argument("--top-k", type=int, help="MeteoRA's adapters a token")


def run(args: argparse.Namespace) -> None:
    """Writes args.out. Raises AdapterError with nothing written."""
    if args.dlp is not None:
        _dlp(args)
        return
    from flora_vllm.formats.base_model import open_base
    from flora_vllm.formats.files import FILE_NAMES
    from flora_vllm.formats.foreign import Told, find
    from flora_vllm.formats.out import replaceable
    from flora_vllm.formats.repair import repaired, write

    replaceable(args.out, FILE_NAMES)
    base = None if args.base is None else open_base(args.base)
    found = repaired(
        find(Path(args.adapter), args.pickle, Told(args.alpha, args.temperature, args.base, args.top_k)), base
    )
    write(found, args.out, base)
    for note in found.notes or ("nothing had to be changed",):
        print(note)
    print(f"wrote {args.out}: {found.config['peft_type']}, {len(found.tensors)} tensors")


def _dlp(args: argparse.Namespace) -> None:
    from flora_vllm.formats.dlp_files import write_dlp

    top_p = 0.6 if args.top_p is None else args.top_p
    max_tokens = 510 if args.max_tokens is None else args.max_tokens
    chooser = write_dlp(args.out, args.dlp, Path(args.base), Path(args.adapter), top_p, max_tokens)
    names = ", ".join(choice.name for choice in chooser.choices)
    print(f"wrote {args.out}: prompts choose among {names}, at most {chooser.most} at once; serve it as dlp:{args.out}")
