"""Two tensor-parallel workers serve what one does, and what transformers computes on the merged weights.

Key and value heads are split (2 heads) or replicated (1 head); row-parallel layers have biases, which only one rank may
add; an IA3 gain on such a layer scales that bias too. Each has its part of the vocabulary, the second's padded, for
embeddings and output layers.
"""

from dataclasses import dataclass
from pathlib import Path

import engine_support as support
import peft
import pytest
import transformers
from engine_support import Answer, Ask, Oracle, State
from tiny_models import FEED_FORWARD, HEADS, LAYERS, POSITIONS, VOCABULARY, WIDTH, randomise

pytestmark = support.ENGINE_MARKS

TOKENS = VOCABULARY + 88  # 320 and 280 of them; prompts have those of both
UNKNOWN = 999
PEFT_CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "lora-some": peft.LoraConfig(r=8, lora_alpha=8, target_modules=["k_proj", "o_proj", "gate_proj"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "ia3-rows": peft.IA3Config(target_modules=["o_proj", "down_proj"], feedforward_modules=[]),
    "ends": peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"]),
    "ends saved": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[*range(1, TOKENS, 3)]),
    "tokens of one rank": peft.TrainableTokensConfig(token_indices=[*range(9, 200)], target_modules=["embed_tokens"]),
    "hira": peft.HiraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
}
SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}


def _make(kind: str, path: Path) -> Path:
    if kind == "llama, 2 key-value heads, biases everywhere":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=1))
    randomise(model, seed=0)
    model.save_pretrained(path)
    return path


@dataclass
class Served:
    oracle: Oracle
    states: dict[str, State]
    asks: dict[str, Ask]
    one: dict[str, Answer]
    two: dict[str, Answer]
    pins_refused: list[str]  # of the adapter UNKNOWN, by one worker and by two


@pytest.fixture(
    scope="module",
    params=["llama, 2 key-value heads, biases everywhere", "qwen2, 1 key-value head for both workers"],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("tp")
    model = _make(request.param, folder / "model")
    base = support.load(model)
    states: dict[str, State] = {"base": base.state_dict()}
    some = [name for name in support.linear_modules(base) if not name.endswith(("o_proj", "k_proj", "up_proj"))]
    for seed, (rank, reduction, modules) in enumerate([(1, "mean", None), (5, "sum", None), (8, "mean", some)]):
        name = f"flora-{rank}"
        states[name] = support.write_flora_adapter(base, folder / name, rank, reduction, seed, modules)
    for seed, (name, config) in enumerate(PEFT_CONFIGS.items()):
        states[name] = support.save_peft_adapter(model, folder / name, config, seed + 10)
    asks = {
        name: Ask(support.prompt(7 + i, seed=i), None if name == "base" else folder / name)
        for i, name in enumerate(states)
    }
    answers, refused = [], []
    for workers in (1, 2):
        options = {"tensor_parallel_size": workers, "distributed_executor_backend": "mp" if workers > 1 else "uni"}
        with support.running(model, max_loras=len(asks) - 1, **options) as engine:
            # Before all else: an answer that a worker still had to give would be that to the loads which follow.
            with pytest.raises(Exception, match="is not registered") as caught:
                engine.llm.llm_engine.pin_lora(UNKNOWN)
            refused.append(str(caught.value))
            answers.append(dict(zip(asks, engine.ask(list(asks.values())), strict=True)))
            assert engine.llm.llm_engine.pin_lora(1)
    return Served(support.oracle_of(model), states, asks, *answers, refused)


def test_two_workers_serve_the_merged_weights(served, record_property):
    errors = {
        name: served.oracle.error(served.states[name], ask, served.two[name]) for name, ask in served.asks.items()
    }
    record_property("worst", max(errors.values()))
    assert not {name: error for name, error in errors.items() if error >= support.LOGPROB_TOLERANCE}


def test_two_workers_serve_what_one_serves(served, record_property):
    differences = {name: support.difference(served.one[name], served.two[name]) for name in served.asks}
    record_property("worst", max(differences.values()))
    assert max(differences.values()) < support.LOGPROB_TOLERANCE
    assert len({answer.tokens for answer in served.one.values()}) == len(served.asks)


def test_a_pin_of_no_adapter_is_refused_and_the_calls_after_it_have_their_own_answers(served):
    assert all("LoRA 999 is not registered" in message for message in served.pins_refused)
    assert len(served.two) == len(served.asks)
