"""The real model in bfloat16 through the server: the demo's trained adapters in one batch, against their merge."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_support import Ask, Oracle
from server_support import BASE, Client, regret
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora_vllm.commands.server_process import ServerProcess
from flora_vllm.demo.run import ADAPTERS
from flora_vllm.formats import read_adapter
from flora_vllm.terms import merged

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

# Of a chosen token: bfloat16 keeps 8 bits; activations of order 10 carry errors of hundredths through 30 layers.
TOLERANCE = 0.15
# Of a runner-up as well: vLLM rounds the logits themselves to bfloat16, in steps of 0.125 between 16 and 32.
RUNNER_UP_TOLERANCE = TOLERANCE + 0.125
NAMES = sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))


@pytest.fixture(scope="module")
def client(smollm2_dir: Path) -> Iterator[Client]:
    adapters = {name: ADAPTERS / name for name in NAMES}
    with ServerProcess(smollm2_dir, adapters, served_name=BASE, quiet=True) as server:
        yield Client(server.url)
    assert not server.log.exists(), "nothing went wrong that it could tell of"


def merged_state(original: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    state = dict(original)
    if name != BASE:
        for module, terms in read_adapter(ADAPTERS / name).modules.items():
            state[f"{module}.weight"], _ = merged(original[f"{module}.weight"], None, terms.terms)
    return state


def test_each_request_gets_its_merged_model(client: Client, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokens = tuple(tokenizer("The old man went down to the river, and")["input_ids"])
    models = [BASE, *NAMES] * 2
    answers = client.ask_all([(model, tokens) for model in models], new=24)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    original = {key: value.clone() for key, value in model.state_dict().items()}
    oracle = Oracle(model)
    for name, answer in zip(models, answers, strict=True):
        state = merged_state(original, name)
        whole = oracle.logprobs(state, tokens + answer.tokens)[len(tokens) - 1 : -1]
        for chosen, place, served in zip(answer.tokens, whole, answer.logprobs, strict=True):
            errors = {token: abs(value - float(place[token])) for token, value in served.items()}
            assert errors[chosen] < TOLERANCE, name
            assert max(errors.values()) < RUNNER_UP_TOLERANCE, name
        assert regret(oracle, state, Ask(tokens), answer) < TOLERANCE
    texts = {tokenizer.decode(answer.tokens) for answer in answers}
    assert len(texts) >= len(NAMES) + 1, "every model must go on in its own way"


def test_the_base_model_makes_sense(client: Client) -> None:
    response = client.openai.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        temperature=0,
        max_tokens=24,
    )
    assert "Paris" in (response.choices[0].message.content or "")
