"""Mixture-of-experts and MLA's kv_b_proj cannot be adapted yet: refused by name, and their neighbours are served."""

from pathlib import Path

import engine_support as support
import pytest
import torch
import transformers
from engine_support import Ask
from tiny_models import FEED_FORWARD, HEADS, KV_HEADS, LAYERS, POSITIONS, VOCABULARY, WIDTH, randomise

import flora_vllm

pytestmark = support.ENGINE_MARKS

PROMPT = support.prompt(9, seed=0)


def _mixtral(path: Path) -> Path:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        num_local_experts=4,
        tie_word_embeddings=False,
    )
    model = transformers.MixtralForCausalLM(config)
    randomise(model, seed=0)
    model.save_pretrained(path)
    return path


def _refuse(engine: support.Engine, folder: Path, module: str, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    support.write_unchecked(folder / "refused", {module: factors})
    with pytest.raises(flora_vllm.AdapterError, match=f"'{module}' cannot be adapted: .*(experts|absorbed)"):
        engine.ask([Ask(PROMPT, folder / "refused")])


def test_experts_are_refused(tmp_path):
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    with support.running(_mixtral(tmp_path / "model"), max_loras=2) as engine:
        _refuse(engine, tmp_path, expert, (torch.ones(2, WIDTH), torch.ones(FEED_FORWARD, 2)))


def test_attention_beside_experts_is_served(tmp_path):
    model = _mixtral(tmp_path / "model")
    base = support.load(model)
    attention = [name for name in support.linear_modules(base) if "self_attn" in name]
    merged = support.write_flora_adapter(base, tmp_path / "attention", 3, "mean", seed=1, modules=attention)
    asks = [Ask(PROMPT, path) for path in (tmp_path / "attention", None)]
    with support.running(model, max_loras=2) as engine:
        adapted, plain = engine.ask(asks)
    oracle = support.Oracle(support.load(model))  # transformers' experts take no float64
    assert oracle.error(merged, asks[0], adapted) < support.LOGPROB_TOLERANCE
    assert oracle.error(base.state_dict(), asks[1], plain) < support.LOGPROB_TOLERANCE


def _deepseek(path: Path) -> Path:
    """Dense layers with MLA in the one size of vLLM's CPU kernel: 512 latent and 64 rotary dimensions."""
    config = transformers.DeepseekV2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    model = transformers.DeepseekV2ForCausalLM(config)
    randomise(model, seed=0)
    model.save_pretrained(path)
    return path


def test_mla_serves_all_but_the_absorbed_projection(tmp_path):
    model = _deepseek(tmp_path / "model")
    base = support.load(model)
    others = [name for name in support.linear_modules(base) if not name.endswith("kv_b_proj")]
    merged = support.write_flora_adapter(base, tmp_path / "others", 3, "mean", seed=1, modules=others)
    absorbed = "model.layers.1.self_attn.kv_b_proj"
    factors = (torch.ones(2, 512), torch.ones(support.linear_modules(base)[absorbed].out_features, 2))
    # Plain vLLM is the oracle, one request at a time: its MLA on CPU differs from transformers, and from itself in a
    # batch of two, also without adapters.
    expected = []
    base.save_pretrained(tmp_path / "base")
    base.load_state_dict(dict(merged))
    base.save_pretrained(tmp_path / "merged")
    for checkpoint in ("base", "merged"):
        with support.running(tmp_path / checkpoint, flora=False) as engine:
            expected += engine.ask([Ask(PROMPT)])
    with support.running(model, max_loras=2) as engine:
        _refuse(engine, tmp_path, absorbed, factors)
        assert absorbed in engine.manager().attached.refused
        served = [engine.ask([Ask(PROMPT, path)])[0] for path in (None, tmp_path / "others")]
    assert served[0].tokens != served[1].tokens
    for answer, wanted in zip(served, expected, strict=True):
        assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE
