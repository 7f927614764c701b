"""`flora-vllm convert --repair` and `--pickle`: an adapter's files rewritten so that a server reads them."""

import argparse
from pathlib import Path

EXAMPLES = """\
--repair rewrites names that a trainer left as they were (an adapter's name, module., _orig_mod., no base_model.model.,
Tinker's unembed_tokens) and, if BASE is given, drops saved weights that equal it. --pickle does the same to .bin, .pt
and .pth, of which only tensors are read; MTL-LoRA's final_checkpoint.pt, LoRA Recycle's w_a_000 and MixLoRA's folder
are known, and of MeteoRA's model its shards' gates and factors are taken. Both say what they did, and write nothing
that would not be served."""


def add_arguments(parser: argparse.ArgumentParser, modes: argparse._MutuallyExclusiveGroup) -> None:
    modes.add_argument("--repair", action="store_true", help="ADAPTER is a folder or file with names left by a trainer")
    modes.add_argument("--pickle", action="store_true", help="as --repair; ADAPTER may be a .bin, .pt or .pth")
    parser.add_argument("--alpha", type=float, help="lora_alpha of MTL-LoRA or MeteoRA, which their files leave out")
    parser.add_argument("--temperature", type=float, help="MTL-LoRA's B_scale, MeteoRA's of its gate")
    parser.add_argument("--top-k", type=int, help="MeteoRA's adapters a token")


def run(args: argparse.Namespace) -> None:
    """Writes args.out. Raises AdapterError with nothing written."""
    from flora_vllm.formats.base_model import open_base
    from flora_vllm.formats.foreign import Told, find
    from flora_vllm.formats.repair import repaired, write

    base = None if args.base is None else open_base(args.base)
    found = repaired(
        find(Path(args.adapter), args.pickle, Told(args.alpha, args.temperature, args.base, args.top_k)), base
    )
    write(found, args.out, base)
    for note in found.notes or ("nothing had to be changed",):
        print(note)
    print(f"wrote {args.out}: {found.config['peft_type']}, {len(found.tensors)} tensors")
