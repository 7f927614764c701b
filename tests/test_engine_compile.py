"""With FLoRA on, the engine compiles as plain vLLM does, and compiled code serves what eager code serves."""

from pathlib import Path
from typing import Any

import engine_support as support
import peft
import pytest
from engine_support import Ask

pytestmark = [*support.ENGINE_MARKS, pytest.mark.slow]


def _compilation(model, *, flora: bool):
    from vllm.engine.arg_utils import EngineArgs

    more: dict[str, Any] = {"additional_config": {"flora": {}}} if flora else {}
    config = EngineArgs(model=str(model), dtype="float32", skip_tokenizer_init=True, **more).create_engine_config()
    return config.compilation_config


def test_the_compilation_mode_is_plain_vllms(tiny_model):
    plain, flora = (_compilation(tiny_model("llama"), flora=flora) for flora in (False, True))
    assert flora.mode == plain.mode
    assert flora.backend == plain.backend
    assert flora.cudagraph_mode == plain.cudagraph_mode


def test_compiled_code_serves_what_eager_code_serves(tiny_model, tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = tiny_model("llama")
    base = support.load(model)
    states: dict[Path | None, support.State] = {None: base.state_dict()}
    for rank in (1, 8):
        path = tmp_path / f"flora-{rank}"
        states[path] = support.write_flora_adapter(base, path, rank, "mean", seed=rank)
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    states[tmp_path / "lora"] = support.save_peft_adapter(model, tmp_path / "lora", config, seed=3)
    norms = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm", "post_attention_layernorm"])
    states[tmp_path / "norms"] = support.save_peft_adapter(model, tmp_path / "norms", norms, seed=4)
    asks = [Ask(support.prompt(5 + 3 * i, seed=i), path) for i, path in enumerate(states)]
    # Twice in other company and another order: what the first step left in the graph must not decide the second.
    with support.running(model, max_loras=4, max_num_seqs=8, enforce_eager=False, flora_norms=True) as engine:
        mode = engine.llm.llm_engine.vllm_config.compilation_config.mode
        alone = [engine.ask([ask])[0] for ask in asks]
        mixed = engine.ask(asks[::-1])[::-1]
    assert mode == _compilation(model, flora=False).mode
    assert mode.name != "NONE", "nothing was compiled, so nothing was compared"
    oracle = support.oracle_of(model)
    errors = [
        oracle.error(states[ask.adapter], ask, answer)
        for answers in (alone, mixed)
        for ask, answer in zip(asks, answers, strict=True)
    ]
    record_property("worst", max(errors))
    assert max(errors) < support.LOGPROB_TOLERANCE
