"""What vLLM's OpenAI server offers, with adapters of every family and none, through the `openai` client."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from engine_support import LOGPROB_TOLERANCE, difference
from server_support import BASE, Client, World, answer_of, make_ask, make_world, regret, serving

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

# Fewer slots and fewer places in memory than there are adapters, and chunks smaller than a long prompt.
SMALL = ("--max-loras", "3", "--max-cpu-loras", "4", "--max-num-batched-tokens", "64", "--max-num-seqs", "16")


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("resolved")
    shutil.copytree(world.adapters["flora2"], root / "found")
    (root / "outside").symlink_to(world.adapters["lora"])
    environment = {"VLLM_LORA_RESOLVER_CACHE_DIR": str(root)}
    with serving(world.model, world.adapters, *SMALL, environment=environment) as client:
        yield client


def test_models_are_listed_by_plain_name(client: Client, world: World) -> None:
    cards = {card.id: card for card in client.openai.models.list()}
    assert cards.keys() >= {BASE, *world.adapters}
    assert all("@" not in name for name in cards)
    assert cards["lora"].model_dump()["root"] == str(world.adapters["lora"])
    assert cards["lora"].model_dump()["parent"] == BASE


def test_one_mixed_batch_is_each_ones_merged_model(client: Client, world: World) -> None:
    # More adapters than slots: the scheduler and both caches have to work for it.
    asks = [(model, make_ask(seed)) for seed, model in enumerate([BASE, *world.adapters] * 3)]
    answers = client.ask_all([(model, ask.prompt) for model, ask in asks])
    oracle = world.oracle()
    for (model, ask), answer in zip(asks, answers, strict=True):
        assert oracle.error(world.states[model], ask, answer) < LOGPROB_TOLERANCE


def test_a_long_prompt_is_prefilled_in_chunks(client: Client, world: World) -> None:
    models = [BASE, "flora5", "ia3"]
    asks = [(model, make_ask(50 + seed, length=300)) for seed, model in enumerate(models)]
    answers = client.ask_all([(model, ask.prompt) for model, ask in asks])
    oracle = world.oracle()
    for (model, ask), answer in zip(asks, answers, strict=True):
        assert oracle.error(world.states[model], ask, answer) < LOGPROB_TOLERANCE


def test_prefix_cache_is_used_and_never_shared(client: Client, world: World) -> None:
    ask = make_ask(60, length=200)
    oracle = world.oracle()
    for model in (BASE, "flora1", "lora"):
        cold, cached = client.ask(model, ask.prompt), client.ask(model, ask.prompt)
        assert difference(cold, cached) < LOGPROB_TOLERANCE
        assert regret(oracle, world.states[model], ask, cached) < 1e-3
    # One block of 128 tokens of each of the three repeated prompts.
    assert client.metric("vllm:prefix_cache_hits_total") >= 3 * 128


def test_stream_equals_whole(client: Client) -> None:
    ask = make_ask(70)
    more = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    for model in (BASE, "hira"):
        whole = client.openai.completions.create(model=model, prompt=list(ask.prompt), **more)
        chunks = list(client.openai.completions.create(model=model, prompt=list(ask.prompt), stream=True, **more))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert {chunk.model for chunk in chunks} == {model}
        assert chunks[-1].choices[0].finish_reason == "length"


def test_several_choices_of_one_request(client: Client, world: World) -> None:
    ask, oracle = make_ask(71), world.oracle()
    for model in (BASE, "flora2"):
        response = client.openai.completions.create(
            model=model,
            prompt=list(ask.prompt),
            n=3,
            max_tokens=8,
            logprobs=1,
            extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True, "top_k": 1},
        )
        answers = [answer_of(choice) for choice in response.choices]
        assert len(answers) == 3
        for answer in answers:
            assert oracle.error(world.states[model], ask, answer) < LOGPROB_TOLERANCE, answer


def test_chat(client: Client) -> None:
    texts = set()
    for model in (BASE, "flora1", "lora", "hira"):
        response = client.openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "hello there"}],
            temperature=0,
            max_tokens=12,
            logprobs=True,
            extra_body={"ignore_eos": True},
        )
        assert response.model == model
        assert response.choices[0].logprobs is not None
        texts.add(response.choices[0].message.content)
    assert len(texts) == 4


def test_load_use_unload(client: Client, world: World) -> None:
    ask = make_ask(72)
    assert client.load("again", world.adapters["flora5"])[0] == 200
    assert "again" in client.names()
    assert client.load("again", world.adapters["flora5"])[0] == 400, "a second load needs load_inplace"
    assert client.load("again", world.adapters["flora5"], load_inplace=True)[0] == 200
    assert world.oracle().error(world.states["flora5"], ask, client.ask("again", ask.prompt)) < LOGPROB_TOLERANCE
    assert client.unload("again")[0] == 200
    assert "again" not in client.names()
    with pytest.raises(openai.NotFoundError):
        client.ask("again", ask.prompt)
    assert client.unload("again")[0] == 404


def test_unknown_name_is_404(client: Client) -> None:
    with pytest.raises(openai.NotFoundError):
        client.ask("nobody", make_ask(73).prompt)


def test_resolver_finds_below_its_root_only(client: Client, world: World) -> None:
    ask = make_ask(74)
    assert world.oracle().error(world.states["flora2"], ask, client.ask("found", ask.prompt)) < LOGPROB_TOLERANCE
    for name in ("outside", "../" + world.adapters["lora"].name, str(world.adapters["lora"])):
        with pytest.raises(openai.NotFoundError):
            client.ask(name, ask.prompt)
