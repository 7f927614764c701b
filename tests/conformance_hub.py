"""A hub cache for vLLM's own tests: tiny models and adapters under the names those ask the hub for.

What vLLM's tests say in words of the real models (a model that meows) cannot hold for stand-ins; such tests fail on
stock vLLM too, and only what passes there is asked of us.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import transformers
from engine_support import save_peft_adapter
from tiny_models import FEED_FORWARD, HEADS, KV_HEADS, LAYERS, WIDTH, randomise, tiny_tokenizer

_COMMIT = "0" * 40
# As many as the longest context that the tests' servers ask for.
_POSITIONS = 8192
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_hub(cache: Path) -> None:
    """Fill `cache` (HF_HUB_CACHE): repository -> its one snapshot."""
    for repository, make in _MODELS.items():
        _model(make(), _snapshot(cache, repository))
    for repository, (model, seed) in _ADAPTERS.items():
        config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=_ALL)
        path = _snapshot(cache, repository)
        save_peft_adapter(_snapshot(cache, model), path, config, seed)
        _edit_config(path, base_model_name_or_path=model)
    _with_embeddings(cache, "charent/self_cognition_Alice", "jeeejeee/llama32-3b-text2sql-spider")
    prompts = _snapshot(cache, "swapnilbp/llama_tweet_ptune")
    prompts.mkdir(parents=True)
    (prompts / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}))


def _snapshot(cache: Path, repository: str) -> Path:
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(_COMMIT)
    return folder / "snapshots" / _COMMIT


def _model(model: transformers.PreTrainedModel, path: Path) -> None:
    randomise(model, seed=0)
    model.save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = _POSITIONS
    tokenizer.save_pretrained(path)


def _with_embeddings(cache: Path, source: str, target: str) -> None:
    """An adapter whose configuration also names the token embedding and the output layer, for tests that read it."""
    shutil.copytree(_snapshot(cache, source), _snapshot(cache, target))
    _edit_config(_snapshot(cache, target), target_modules=[*_ALL, "embed_tokens", "lm_head"])


def _edit_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _decoder() -> Mapping[str, int | bool]:
    return {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": _POSITIONS,
    }


_MODELS: Mapping[str, Callable[[], transformers.PreTrainedModel]] = {
    "Qwen/Qwen3-0.6B": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_decoder())),
    "HuggingFaceTB/SmolLM2-135M-Instruct": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_decoder())
    ),
    "openai-community/gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=len(tiny_tokenizer()))
    ),
}
# Repository -> its base, and a seed.
_ADAPTERS: Mapping[str, tuple[str, int]] = {
    "charent/self_cognition_Alice": ("Qwen/Qwen3-0.6B", 0),
    "Jackmin108/Qwen3-0.6B-Meow-LoRA": ("Qwen/Qwen3-0.6B", 1),
    "Jackmin108/Qwen3-0.6B-Woof-LoRA": ("Qwen/Qwen3-0.6B", 2),
    "jekunz/smollm-135m-lora-fineweb-faroese": ("HuggingFaceTB/SmolLM2-135M-Instruct", 3),
}
