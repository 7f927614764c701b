"""The README.md beside a FLoRA adapter: how it is loaded and served, which its PEFT layout alone does not say."""

import os
import shlex
from pathlib import Path

CARD_NAME = "README.md"
HEADING = "## FLoRA"


def usage(base: str | None, rank: int) -> str:
    """The section that says it; `rank`: the largest of any module."""
    serve = ["vllm", "serve", base or "BASE_MODEL", "--enable-flora"]
    serve += ["--max-flora-rank", str(rank)] if rank > 16 else []
    return f"""{HEADING}

A [FLoRA](https://arxiv.org/abs/2312.05677) adapter: it multiplies the weights, `W ∘ (B A)`, and is no LoRA. Loading
it as one gives wrong answers.

Serve it, together with any other adapters of the model:

    pip install "flora-vllm[cuda]"
    {shlex.join([*serve, "--lora-modules", "this=PATH_OF_THIS_DIRECTORY"])}

Load it with PEFT, which knows the method after the first import:

    import flora_vllm.training  # pip install "flora-vllm[train]"
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model, "PATH_OF_THIS_DIRECTORY")
"""


def card_for(directory: str | os.PathLike[str], base: str | None, rank: int) -> bytearray:
    """The README.md to write into `directory`: the one that is there with the section, or a card of its own."""
    path = Path(directory, CARD_NAME)
    existing = path.read_text(encoding="utf-8") if path.is_file() else ""
    if HEADING in existing:
        return bytearray(existing.encode())
    if existing:
        return bytearray(f"{existing.rstrip()}\n\n{usage(base, rank)}".encode())
    named = f"base_model: {base}\n" if base else ""
    head = f"---\nlibrary_name: peft\n{named}tags:\n- flora\n- flora-vllm\n---\n\n"
    return bytearray(f"{head}{usage(base, rank)}".encode())
