"""Speculative decoding: drafted tokens are checked under the request's own adapter, the output layer's among them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import engine_support as support
import peft
import pytest
from engine_support import Ask, Engine, State

pytestmark = support.ENGINE_MARKS

# Drafts of n-grams need repeats; the base of a draft model is tried with itself, so that some drafts are accepted.
METHODS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "draft model": {"method": "draft_model", "num_speculative_tokens": 2},
}


@pytest.fixture(scope="module")
def states(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Mapping[Path | None, State]:
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("adapters")
    configs = {
        "lora": peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"]),
        "head": peft.LoraConfig(r=4, target_modules=["v_proj", "lm_head"]),
        "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    found: dict[Path | None, State] = {None: dict(support.load(model).state_dict())}
    found |= {folder / name: support.save_peft_adapter(model, folder / name, c, 7) for name, c in configs.items()}
    found[folder / "flora"] = support.write_flora_adapter(support.load(model), folder / "flora", 3, "sum", 5)
    return found


@pytest.fixture(scope="module", params=METHODS)
def engine(request: pytest.FixtureRequest, tiny_model) -> Iterator[Engine]:
    model = tiny_model("llama")
    settings = METHODS[request.param] | ({"model": str(model)} if request.param == "draft model" else {})
    # Its own process: n-grams import numba, after which vLLM's search for kernels fails in every later engine here.
    own = {"own_process": True, "disable_log_stats": False}
    with support.running(model, max_loras=5, speculative_config=settings, **own) as engine:
        yield engine


def test_every_request_gets_its_own_adapters_tokens(
    engine: Engine, states: Mapping[Path | None, State], tiny_model
) -> None:
    oracle = support.oracle_of(tiny_model("llama"))
    adapters = [*states, *states]
    asks = [Ask(support.prompt(6, seed=seed) * 4, adapter) for seed, adapter in enumerate(adapters)]
    for ask, answer in zip(asks, engine.ask(asks, tokens=24), strict=True):
        assert oracle.error(states[ask.adapter], ask, answer) < support.LOGPROB_TOLERANCE, ask.adapter
    counts = {metric.name: metric.value for metric in engine.llm.get_metrics() if hasattr(metric, "value")}
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0
    assert counts["vllm:spec_decode_num_draft_tokens"] > counts["vllm:spec_decode_num_accepted_tokens"]
