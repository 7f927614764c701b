"""The README.md beside a FLoRA adapter: how it is loaded and served, which its PEFT layout alone does not say."""

import os
import re
import shlex
from pathlib import Path

CARD_NAME = "README.md"
HEADING = "## FLoRA"


def usage(base: str | None, rank: int) -> str:
    """The section that says it; `rank`: the largest of any module."""
    serve = ["vllm", "serve", base or "BASE_MODEL", "--enable-flora"]
    serve += ["--max-flora-rank", str(rank)] if rank > 16 else []
    return _section(shlex.join([*serve, "--lora-modules", "this=PATH_OF_THIS_DIRECTORY"]))


def _section(serve: str) -> str:
    return f"""{HEADING}

A [FLoRA](https://arxiv.org/abs/2312.05677) adapter: it multiplies the weights, `W ∘ (B A)`, and is no LoRA. Loading
it as one gives wrong answers.

Serve it, together with any other adapters of the model:

    pip install "flora-vllm[cuda]"
    {serve}

Load it with PEFT, which knows the method after the first import:

    import flora_vllm.training  # pip install "flora-vllm[train]"
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model, "PATH_OF_THIS_DIRECTORY")
"""


def _head(named: str) -> str:
    return f"---\nlibrary_name: peft\n{named}tags:\n- flora\n- flora-vllm\n---\n\n"


# What an earlier version of the adapter left, whatever its base and rank.
_OLD_SECTION = re.compile(re.escape(_section("SERVE")).replace("SERVE", "vllm serve .*"))
_OLD_HEAD = re.compile(r"\A" + re.escape(_head("NAMED")).replace("NAMED", "(?:base_model: .*\n)?"))


def card_for(directory: str | os.PathLike[str], base: str | None, rank: int) -> bytearray:
    """The README.md to write into `directory`: the one that is there with the section, or a card of its own.

    Of the one that is there, what we wrote is replaced; what somebody else wrote, or changed in ours, stays.
    """
    head, section = _head(f"base_model: {base}\n" if base else ""), usage(base, rank)
    text = _read(Path(directory, CARD_NAME))
    if not text:
        text = f"{head}{section}"
    elif HEADING in text:
        text = _OLD_SECTION.sub(lambda _: section, _OLD_HEAD.sub(lambda _: head, text))
    else:
        text = f"{text.rstrip()}\n\n{section}"
    return bytearray(text.encode(errors="surrogateescape"))


def card_without_flora(directory: str | os.PathLike[str]) -> bytearray:
    """What others wrote into the README.md of `directory`, for an adapter of another family; empty if nothing."""
    text = _OLD_SECTION.sub("", _OLD_HEAD.sub("", _read(Path(directory, CARD_NAME))))
    return bytearray(f"{text.strip()}\n".encode(errors="surrogateescape") if text.strip() else b"")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
