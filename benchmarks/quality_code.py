"""The code task: a language model adapted to one programming language, measured in bits per byte of held-out files."""

import math
from pathlib import Path

import torch
from quality_data import read_rows
from quality_plan import Size
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flora_vllm.training.build import load_base
from flora_vllm.training.data import Blocks, pack
from flora_vllm.training.loop import held_out_loss

TARGETS = "q_proj,k_proj"  # the paper's for code


def prepare(model: Path, data: Path, size: Size) -> tuple[PreTrainedModel, Blocks]:
    """The frozen base model, and blocks to train on and to choose a rate by."""
    base, tokenizer = load_base(str(model))
    return base, Blocks(_blocks(data, "train", tokenizer, size.length), dev_blocks(data, tokenizer, size))


def dev_blocks(data: Path, tokenizer: PreTrainedTokenizerBase, size: Size) -> torch.Tensor:
    return evenly(_blocks(data, "dev", tokenizer, size.length), size.dev)


def test_blocks(data: Path, tokenizer: PreTrainedTokenizerBase, size: Size) -> torch.Tensor:
    return evenly(_blocks(data, "test", tokenizer, size.length), size.test)


def score(base: PreTrainedModel, model: Path, data: Path, size: Size) -> dict:
    """Bits per byte of the test blocks; the first token of a block is given, not predicted."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    blocks = test_blocks(data, tokenizer, size)
    nats = held_out_loss(base, blocks, size.batch) * blocks[:, 1:].numel()
    size_bytes = count_bytes(blocks[:, 1:], tokenizer)
    return {"bpb": nats / math.log(2) / size_bytes, "test_tokens": blocks.numel(), "test_bytes": size_bytes}


def count_bytes(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of text that tokens of a byte-level tokenizer stand for, one character of its vocabulary each.

    The end-of-text token stands for none.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens([i for i in ids.flatten().tolist() if i not in special])
    return sum(map(len, tokens))


def evenly(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """`count` blocks spread over all of them: a part of every file, not one file."""
    assert len(blocks) >= count, f"{len(blocks)} blocks, {count} wanted"
    return blocks[torch.linspace(0, len(blocks) - 1, count).round().long()]


def _blocks(data: Path, split: str, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    return pack([row["text"] for row in read_rows(data / f"{split}.jsonl")], tokenizer, length)
