"""Tensors of modules that a model's class says the engine never runs (`mtp.`) are left out, as stock vLLM's LoRA does.

Nemotron-H without experts: Mamba, attention and dense layers. Where the class names none, they are refused.
"""

from pathlib import Path

import engine_support as support
import peft
import pytest
import torch
from engine_support import Ask
from safetensors.torch import load_file, save_file
from tiny_models import FEED_FORWARD, WIDTH, tiny_nemotron_h

import flora_vllm
from flora_vllm.plugin import loader

pytestmark = support.ENGINE_MARKS

PROMPT = support.prompt(9, seed=0)
# PEFT's own LoRA takes no out_proj of a Mamba layer.
TARGETS = [f"{name}_proj" for name in ("in", "q", "k", "v", "o", "up", "down")]


def _add(folder: Path, module: str) -> None:
    """To the adapter in `folder`: tensors of a dense layer `module`."""
    path = folder / "adapter_model.safetensors"
    g = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, WIDTH, generator=g), torch.randn(FEED_FORWARD, 4, generator=g)
    name = f"base_model.model.{module}"
    save_file(load_file(path) | {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)


def test_modules_that_the_engine_never_runs_are_left_out(tmp_path, monkeypatch):
    told: list[str] = []  # whatever other tests of this process have made of loggers
    monkeypatch.setattr(loader.logger, "warning", lambda text, *more: told.append(text % more))
    model = tiny_nemotron_h(tmp_path / "model")
    states: dict[str, support.State | None] = {"base": None}
    for seed, name in enumerate(("drafting", "elsewhere")):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
        states[name] = support.save_peft_adapter(model, tmp_path / name, config, seed)
    states["flora"] = support.write_flora_adapter(
        support.load(model), tmp_path / "flora", 2, "mean", seed=5, modules=["model.layers.0.mixer.out_proj"]
    )
    _add(tmp_path / "drafting", "mtp.layers.0.mixer.up_proj")
    _add(tmp_path / "elsewhere", "nomtp.layers.0.mixer.up_proj")
    asks = {name: Ask(PROMPT, None if name == "base" else tmp_path / name) for name in states if name != "elsewhere"}
    served = {}
    for flora, options in ((False, {"enable_lora": True}), (True, {})):
        with support.running(model, flora=flora, max_loras=2, block_size=128, **options) as engine:
            if flora:
                with pytest.raises(flora_vllm.AdapterError, match=r"'nomtp\.layers.*not in the base model"):
                    engine.ask([Ask(PROMPT, tmp_path / "elsewhere")])
                assert not engine.manager().list_adapters()
            served[flora] = engine.ask([ask for name, ask in asks.items() if flora or name != "flora"])
    for stock, ours in zip(served[False], served[True], strict=False):
        assert support.difference(stock, ours) < support.LOGPROB_TOLERANCE
    oracle = support.oracle_of(model)
    errors = {name: oracle.error(states[name], ask, served[True][i]) for i, (name, ask) in enumerate(asks.items())}
    assert max(errors.values()) < support.LOGPROB_TOLERANCE, errors
    assert any("2 tensors of modules that this engine never runs are left out" in text for text in told)
