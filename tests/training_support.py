"""Tiny random models for the training tests: the real classes, two layers, float32, made in milliseconds."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flora_vllm.training import loop

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "in", "mat", "hat", "big", "small", "red", "blue", "far"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


class TwoLinears(nn.Module):
    """I=10 -> 12 -> 4 with biases; `first` and `second` are the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 12)
        self.second = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def two_linears(seed: int = 0) -> TwoLinears:
    torch.manual_seed(seed)
    return TwoLinears()


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attention_bias=True,
        tie_word_embeddings=False,
        initializer_range=0.2,  # weights near zero would leave a multiplicative update nothing to work on
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # transformers starts biases at zero, where a scaled bias would go unnoticed
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Linear layers are Conv1D (weight (I, O)) and c_attn is a fused qkv projection."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<end>": 0, "<unk>": 1, **{word: i + 2 for i, word in enumerate([*WORDS, "user", "assistant"])}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", pad_token="<end>", chat_template=CHAT_TEMPLATE
    )


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences with something to learn: the cat always sat on the mat, the dog always ran in the hat."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 2, (count,), generator=generator).tolist()
    return [("the big cat sat on the red mat", "the small dog ran in the blue hat")[kind] for kind in kinds]


@contextlib.contextmanager
def interrupted_at_step(number: int) -> Iterator[None]:
    """Ctrl-C as training comes to this step."""
    step = loop._step

    def interrupted(model: Any, runs: Any, mixed: Any) -> Any:
        if runs[0].step == number:
            raise KeyboardInterrupt
        return step(model, runs, mixed)

    with mock.patch.object(loop, "_step", interrupted):
        yield
