"""Weighted sums of loaded adapters: asked for by a request, loaded by name, named on the command line."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_support import LOGPROB_TOLERANCE, Answer, State
from server_support import BASE, Client, World, answer_of, make_ask, make_world, serving

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

STATIC = {"flora1": 0.7, "lora": 0.3}
OPTIONS = ("--max-loras", "2", "--max-cpu-loras", "3", "--max-num-batched-tokens", "64", "--max-num-seqs", "16")


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Client]:
    static = {"named": Path("mix:flora1*0.7+lora*0.3")}
    with serving(world.model, {**world.adapters, **static}, *OPTIONS) as client:
        yield client


def mixed_state(world: World, weights: Mapping[str, float]) -> State:
    """`W + Σ w_i (W_i - W)` of every weight and bias."""
    base = world.states[BASE]
    return {
        name: tensor + sum(weight * (world.states[part][name] - tensor) for part, weight in weights.items())
        for name, tensor in base.items()
    }


def ask(client: Client, weights: Any, prompt: tuple[int, ...], model: str = BASE) -> tuple[str, Answer]:
    """(model of the answer, answer) of a request with a mix."""
    completion = client.openai.completions.create(
        model=model,
        prompt=list(prompt),
        max_tokens=8,
        temperature=0,
        logprobs=5,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True, "flora": {"mix": weights}},
    )
    return completion.model, answer_of(completion.choices[0])


def test_a_request_gets_the_mix_it_asks_for(client: Client, world: World) -> None:
    oracle = world.oracle()
    for seed, weights in enumerate(
        ({"flora1": 0.7, "flora2": 0.3}, {"lora": 0.5, "ia3": -0.25, "hira": 1.0}, {"flora5": 2.0}, {"lora": 1.0})
    ):
        asked = make_ask(seed)
        model, answer = ask(client, weights, asked.prompt)
        assert oracle.error(mixed_state(world, weights), asked, answer) < LOGPROB_TOLERANCE
        assert model == "mix:" + "+".join(f"{name}*{weight}" for name, weight in weights.items())


def test_named_mixes_are_served_beside_their_parts_and_survive_them(client: Client, world: World) -> None:
    loaded = {"hira": 0.5, "named": 0.5}
    assert client.post("load_lora_adapter", {"lora_name": "both", "mix": loaded})[0] == 200
    assert client.names() >= {"named", "both"}
    weights = {"named": STATIC, "both": {"hira": 0.5, "flora1": 0.35, "lora": 0.15}}
    states = {**world.states, **{name: mixed_state(world, parts) for name, parts in weights.items()}}
    models = ["named", "both", BASE, "flora1", "lora", "named"]
    asks = [(model, make_ask(20 + seed)) for seed, model in enumerate(models)]
    for one in (lambda: client.unload("hira"), lambda: (200, "")):
        answers = client.ask_all([(model, asked.prompt) for model, asked in asks])
        for (model, asked), answer in zip(asks, answers, strict=True):
            assert world.oracle().error(states[model], asked, answer) < LOGPROB_TOLERANCE, model
        assert one()[0] == 200
    assert client.unload("both")[0] == 200
    assert client.load("hira", world.adapters["hira"])[0] == 200


@pytest.mark.parametrize(
    ("extra", "model", "words"),
    [
        ({"mix": {"nobody": 1.0}}, BASE, "['nobody'] are not loaded"),
        ({"mix": {}}, BASE, "1 to 8 names"),
        ({"mix": {"lora": "1"}}, BASE, "finite weight"),
        ({"mix": {"lora": 1.0}}, "lora", "names the base model"),
        ({"weights": {"lora": 1.0}}, BASE, 'the one key "mix"'),
        ({"mix": {"flora5": 1.0, "flora1": 1.0, "flora2": 1.0, "hira": 9, "lora": 1, "named": 1e300}}, BASE, "range"),
    ],
)
def test_what_cannot_be_mixed_is_a_client_error(client: Client, extra: Any, model: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r".*") as raised:
        client.openai.completions.create(model=model, prompt=[5], extra_body={"flora": extra})
    assert words in str(raised.value)
    assert client.openai.completions.create(model=BASE, prompt=[5, 6], max_tokens=1).choices


def test_a_mix_needs_no_path_and_takes_none_beside(client: Client, world: World) -> None:
    body = {"lora_name": "x", "mix": {"lora": 1.0}, "lora_path": str(world.adapters["lora"])}
    status, message = client.post("load_lora_adapter", body)
    assert status in (400, 422)
    assert "not both" in message
    assert client.post("load_lora_adapter", {"lora_name": "x", "lora_path": "mix:lora"})[0] == 400
