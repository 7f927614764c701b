"""Two pipeline stages serve what transformers computes on the merged weights; each knows the whole model's layers."""

import shutil
from typing import Any

import engine_support as support
import peft
import pytest
import torch
from engine_support import Ask
from tiny_models import WIDTH

import flora_vllm

pytestmark = support.ENGINE_MARKS

ONE_STAGE = "model.layers.1.self_attn.q_proj"  # the other stage has nothing of such an adapter


def test_two_stages_serve_the_merged_weights_refuse_by_name_and_fail_what_one_cannot_serve(tiny_model, tmp_path):
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
        gone = tmp_path / "flora"

        def lose(worker: Any) -> None:
            """The first stage has evicted the adapter, and finds its copy no more."""
            from vllm.distributed.parallel_state import get_pp_group

            if get_pp_group().is_first_rank:
                loaded = worker.model_runner.lora_manager
                for number in [*loaded._adapter_manager.list_adapters()]:
                    if loaded._loader._names[number].startswith("flora"):
                        loaded._adapter_manager.remove_adapter(number)
                        shutil.rmtree(loaded._loader._root / str(number))

        engine.llm.collective_rpc(lose)
        shutil.rmtree(gone)
        for _ in range(2):
            with pytest.raises(flora_vllm.StepError, match="the path does not exist"):
                engine.ask([asks["lora"], Ask(support.prompt(40, seed=9), gone), asks["base"]])
        assert not engine.llm.llm_engine.has_unfinished_requests()
        others = [asks["base"], asks["lora"]]
        last = dict(zip(("base", "lora"), engine.ask(others), strict=True))
    oracle = support.oracle_of(model)
    errors = {
        (name, turn): oracle.error(states[name], asks[name], served[name])
        for turn, served in enumerate((answers, again, last))
        for name in served
    }
    assert max(errors.values()) < support.LOGPROB_TOLERANCE, errors
