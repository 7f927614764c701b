"""Two pipeline stages serve what transformers computes on the merged weights; each knows the whole model's layers."""

import engine_support as support
import peft
import pytest
import torch
from engine_support import Ask
from tiny_models import WIDTH

import flora_vllm

pytestmark = support.ENGINE_MARKS

ONE_STAGE = "model.layers.1.self_attn.q_proj"  # the other stage has nothing of such an adapter


def test_two_stages_serve_the_merged_weights_and_refuse_by_name(tiny_model, tmp_path):
    model = tiny_model("llama")
    base = support.load(model)
    states = {
        "base": base.state_dict(),
        "flora": support.write_flora_adapter(base, tmp_path / "flora", 3, "mean", 1),
        "half": support.write_flora_adapter(base, tmp_path / "half", 2, "sum", 2, [ONE_STAGE]),
        "lora": support.save_peft_adapter(
            model, tmp_path / "lora", peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), 3
        ),
    }
    asks = {
        name: Ask(support.prompt(9 + i, seed=i), None if name == "base" else tmp_path / name)
        for i, name in enumerate(states)
    }
    absent = "model.layers.7.self_attn.q_proj"
    flora_vllm.write_flora(tmp_path / "absent", {absent: (torch.ones(2, WIDTH), torch.ones(WIDTH, 2))})
    options = {
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "enforce_eager": False,
        "compilation_config": {"mode": 1, "backend": "eager"},
    }
    with support.running(model, max_loras=3, **options) as engine:
        answers = dict(zip(asks, engine.ask(list(asks.values())), strict=True))
        with pytest.raises(flora_vllm.AdapterError, match=absent):
            engine.ask([Ask(asks["base"].prompt, tmp_path / "absent")])
        again = dict(zip(asks, engine.ask(list(asks.values())), strict=True))
    oracle = support.oracle_of(model)
    errors = {
        name: oracle.error(states[name], ask, served[name]) for name, ask in asks.items() for served in (answers, again)
    }
    assert max(errors.values()) < support.LOGPROB_TOLERANCE, errors
