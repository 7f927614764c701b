"""Every family from the files its own library saves: our merged weights give the logits of PEFT's own forward."""

from pathlib import Path

import pytest
import torch
from families_support import worst_errors
from peft import IA3Config, LoraConfig, TrainableTokensConfig

torch.set_num_threads(1)

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

TOKENS = list(range(0, 80, 3))

# name -> (architecture, config)
CASES = {
    "lora-bias": ("llama", LoraConfig(r=3, target_modules=ATTENTION)),
    "lora-lora_bias": ("qwen2", LoraConfig(r=3, lora_bias=True, target_modules=ATTENTION)),
    "lora-bias-only": ("qwen2", LoraConfig(r=3, bias="lora_only", target_modules=ATTENTION)),
    "lora-bias-all": ("qwen2", LoraConfig(r=3, bias="all", target_modules=["q_proj", "down_proj"])),
    "dora": ("llama", LoraConfig(r=3, use_dora=True, target_modules=LINEAR)),
    "dora-rslora-bias": ("qwen2", LoraConfig(r=3, use_dora=True, use_rslora=True, target_modules=LINEAR)),
    "lora-head": ("llama", LoraConfig(r=3, target_modules=["q_proj", "lm_head"])),
    "dora-head": ("qwen2", LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "lm_head"])),
    "lora-head-alone": ("qwen2", LoraConfig(r=3, target_modules=["lm_head"])),
    "lora-embedding": ("llama", LoraConfig(r=3, target_modules=["embed_tokens", "v_proj"], use_rslora=True)),
    "dora-embedding": ("llama", LoraConfig(r=3, use_dora=True, target_modules=["embed_tokens", "v_proj"])),
    "dora-ends": ("qwen2", LoraConfig(r=3, use_dora=True, target_modules=["embed_tokens", "lm_head"])),
    "lora-ends": ("qwen2", LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"], rank_pattern={"lm_head": 5})),
    "ia3-head": ("qwen2", IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[])),
    "tokens": ("llama", TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"])),
    "lora-tokens": ("llama", LoraConfig(r=3, target_modules=ATTENTION, trainable_token_indices=TOKENS)),
    "lora-tokens-of-each": (
        "qwen2",
        LoraConfig(r=3, target_modules=ATTENTION, trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [3, 7]}),
    ),
    "dora-conv1d": ("gpt2", LoraConfig(r=3, use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
}


# PEFT takes a LoRA bias for a shard of a factor and says so.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts_forward(case: str, tmp_path: Path, record_property) -> None:
    architecture, config = CASES[case]
    error, effect = worst_errors(config, tmp_path, architecture)
    record_property("error", error)
    assert effect > 0.01, "the adapter must do something"
    assert error < 1e-4 * max(1.0, effect)
    assert error < 0.01 * effect
