"""Invocation sequences: what a config may say, for every family, and where one is found; PEFT 0.21 decides the same."""

import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from formats_support import edit_config, faults_of, linear_layout, save_peft_adapter, tiny_model
from peft import HiraConfig, IA3Config, LoraConfig, PeftConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from flora_vllm.errors import AdapterError
from flora_vllm.formats import read_adapter
from flora_vllm.formats.activation import MOST_TOKENS, first_adapted_token
from flora_vllm.formats.base_model import open_base
from flora_vllm.formats.merge import merge_model
from flora_vllm.training import FloraConfig

torch.set_num_threads(1)

CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, target_modules=["q_proj"]),
    "flora": FloraConfig(r=2, target_modules=["q_proj"]),
    "hira": HiraConfig(r=2, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_may_name_a_sequence(family: str, tmp_path: Path) -> None:
    save_peft_adapter(tiny_model("llama"), CONFIGS[family], tmp_path)
    assert read_adapter(tmp_path).invocation_tokens is None
    for none in (None, []):
        edit_config(tmp_path, alora_invocation_tokens=none)
        assert read_adapter(tmp_path).invocation_tokens is None
    edit_config(tmp_path, alora_invocation_tokens=[5, 0, 7])
    assert read_adapter(tmp_path).invocation_tokens == (5, 0, 7)
    for bad in ([1.0], [True], [-1], ["5"], 5, "5", [2**31], [1] * (MOST_TOKENS + 1)):
        edit_config(tmp_path, alora_invocation_tokens=bad)
        assert any("'alora_invocation_tokens' is" in fault for fault in faults_of(tmp_path)), bad


def test_it_is_found_where_peft_finds_it() -> None:
    chance = random.Random(0)
    for _ in range(500):
        invocation = [chance.choice([0, 1, 256]) for _ in range(chance.randint(1, 3))]
        prompt = [chance.choice([0, 1, 256]) for _ in range(chance.randint(1, 9))]
        config = {"default": SimpleNamespace(alora_invocation_tokens=invocation)}
        (offset,) = calculate_alora_offsets(config, "default", torch.tensor([prompt]))
        wanted = None if offset is None else len(prompt) - offset
        assert first_adapted_token(prompt, invocation) == wanted, (prompt, invocation)


def test_neither_a_prompt_nor_a_sequence_can_make_the_search_slow() -> None:
    prompt = [5] * 100_000
    invocation = [5] * (MOST_TOKENS // 2) + [6] + [5] * (MOST_TOKENS // 2 - 1)
    start = time.thread_time()
    assert first_adapted_token(prompt, invocation) is None
    assert first_adapted_token(prompt, [0] * MOST_TOKENS) is None
    assert time.thread_time() - start < 2  # the naive search takes minutes


def test_no_merge_can_say_it(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    layout = linear_layout(model)
    save_peft_adapter(model, CONFIGS["lora"], tmp_path / "a")
    edit_config(tmp_path / "a", alora_invocation_tokens=[5])
    adapter = read_adapter(tmp_path / "a", layout=layout)
    with pytest.raises(AdapterError, match="leaves a prompt's first tokens to the base model"):
        merge_model(open_base(tmp_path / "base"), adapter, tmp_path / "out", SimpleNamespace(update=lambda _n=1: None))
    assert not (tmp_path / "out").exists()
