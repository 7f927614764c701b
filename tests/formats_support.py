"""Tiny random models and adapters that PEFT itself saved, for the tests of formats, merge and inspect."""

import json
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from flora_vllm.adapter import ModelLayout
from flora_vllm.errors import MAX_MESSAGE_BYTES, AdapterError, in_kinds
from flora_vllm.formats import examine, read_adapter
from flora_vllm.formats.ranks import Limits

# Hidden 64, keys and values 32, feed-forward 96: no two sides of a layer can be mixed up unnoticed.
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
}
_GPT2_SIZES = {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "vocab_size": 80, "n_positions": 32}


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A 2-layer float32 model with random weights and biases."""
    torch.manual_seed(seed)
    match architecture:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**{**_SIZES, **changes}))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, **changes))
        case "phi3":
            model = Phi3ForCausalLM(Phi3Config(**_SIZES, pad_token_id=0, **changes))
        case "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**_GPT2_SIZES, **changes))
        case "gpt_bigcode":
            model = _gpt_bigcode(**changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def _gpt_bigcode(**changes: Any) -> PreTrainedModel:
    with warnings.catch_warnings():
        # transformers uses torch.jit.script, which torch 2.13 deprecates, while this module is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from transformers.models.gpt_bigcode import GPTBigCodeConfig, GPTBigCodeForCausalLM

        return GPTBigCodeForCausalLM(GPTBigCodeConfig(**_GPT2_SIZES, **changes))


def save_peft_adapter(model: PreTrainedModel, config: PeftConfig, path: Path, seed: int = 1) -> dict[str, torch.Tensor]:
    """Wrap `model` in PEFT, make its factors random, save it at `path`; the state of PEFT's own merge.

    `model` itself is changed by the merge.
    """
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(str(path))
    return wrapped.merge_and_unload().state_dict()


def linear_layout(model: PreTrainedModel) -> ModelLayout:
    """The (O, I) shape of each linear layer, Conv1D included."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            rows, columns = cast(torch.Tensor, module.weight).shape
            shapes[name] = (columns, rows)
    return ModelLayout(shapes)


def edit_config(path: Path, **changes: Any) -> None:
    """Change keys of an adapter's config; the value `...` removes the key."""
    file = path / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of an adapter by full name (pass a dict with `**`); None removes one."""
    file = path / "adapter_model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, file)


def faults_of(path: Path, **options: Any) -> tuple[str, ...]:
    """The faults, after checking that the raised error lists them, or says how many not, and nothing was returned."""
    limits = Limits(options.get("max_flora_rank"), options.get("max_lora_rank"), options.get("max_dense_bytes"))
    found = examine(path, layout=options.get("layout"), limits=limits)
    assert found.adapter is None
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, **options)
    assert f"({len(found.faults)} fault" in str(caught.value)
    assert str(path) in str(caught.value)
    message = str(caught.value)
    assert len(message.encode()) <= MAX_MESSAGE_BYTES
    missing = [line for line in in_kinds(found.faults) if line not in message]
    assert not missing or f"and {len(missing)} more, left out of this message" in message
    return found.faults


def the_fault(path: Path, **options: Any) -> str:
    faults = faults_of(path, **options)
    assert len(faults) == 1, faults
    return faults[0]
