"""Sums, merges, arrows and choices of adapters: by request, loaded by name, named on the command line."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch
import transformers
from dlp_support import classifier_output, word_tokenizer, write_adapters, write_classifier
from engine_support import LOGPROB_TOLERANCE, Answer, Ask, Oracle, State, difference, load, save_peft_adapter
from peft.tuners.lora.arrow import create_arrow_model
from server_support import BASE, Client, World, answer_of, make_ask, make_world, serving

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

CHOSEN = ("poems", "law", "code")
STATIC = {"flora1": 0.7, "lora": 0.3}
ROUTED = ("route0", "route1", "route2")
OPTIONS = ("--max-loras", "2", "--max-cpu-loras", "3", "--max-num-batched-tokens", "64", "--max-num-seqs", "16")


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("adapters")
    world = make_world(tiny_model("llama"), folder)
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "o_proj"])
    state = save_peft_adapter(world.model, folder / "lora2", config, 9)
    adapters = {**world.adapters, "lora2": folder / "lora2"}
    for number, name in enumerate(ROUTED):
        config = peft.LoraConfig(r=4, lora_alpha=2 + number, target_modules=["q_proj", "v_proj", "down_proj"])
        save_peft_adapter(world.model, folder / name, config, 20 + number)
        adapters[name] = folder / name
    states = {**world.states, "lora2": state, **write_adapters(world.model, folder / "tasks", CHOSEN)}
    adapters["tasks"] = Path(f"dlp:{folder / 'tasks'}")
    write_classifier(folder / "tasks", CHOSEN)
    return World(world.model, adapters, states)


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Client]:
    static = {"named": Path("mix:flora1*0.7+lora*0.3"), "routed": Path(f"arrow:{'+'.join(ROUTED[:2])}")}
    with serving(world.model, {**world.adapters, **static}, *OPTIONS) as client:
        yield client


def mixed_state(world: World, weights: Mapping[str, float]) -> State:
    """`W + Σ w_i (W_i - W)` of every weight and bias."""
    base = world.states[BASE]
    return {
        name: tensor + sum(weight * (world.states[part][name] - tensor) for part, weight in weights.items())
        for name, tensor in base.items()
    }


def merged_state(world: World, weights: Mapping[str, float], method: str, **options: Any) -> State:
    """The weights with PEFT's own merge of the named LoRAs in them."""
    names = list(weights)
    model = peft.PeftModel.from_pretrained(load(world.model), str(world.adapters[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(world.adapters[name]), adapter_name=name)
    tuner: Any = model.base_model
    tuner.add_weighted_adapter(names, list(weights.values()), "merged", combination_type=method, **options)
    model.set_adapter("merged")
    return tuner.merge_and_unload().state_dict()


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


def test_merges_by_pefts_methods_are_pefts(client: Client, world: World) -> None:
    weights = {"lora": 0.8, "lora2": -1.5}
    options: dict[str, dict[str, Any]] = {
        "ties": {"method": "ties", "density": 0.5},
        "thinner": {"method": "ties", "density": 0.2, "majority_sign_method": "frequency"},
        "cat": {"method": "cat"},
    }
    dare = {"method": "dare_linear", "density": 0.5}
    loads = {**options, "dare": {**dare, "seed": 1}, "same": {**dare, "seed": 1}, "other": {**dare, "seed": 2}}
    for name, chosen in loads.items():
        status, message = client.post("load_lora_adapter", {"lora_name": name, "mix": weights, **chosen})
        assert status == 200, message
    states = {**world.states, **{name: merged_state(world, weights, **chosen) for name, chosen in options.items()}}
    # `cat` is the exact sum as well.
    oracle, asked = world.oracle(), make_ask(40)
    models = [*loads, "lora", BASE, *options]
    answers = client.ask_all([(model, asked.prompt) for model in models])
    for model, answer in zip(models, answers, strict=True):
        if model in states:
            assert oracle.error(states[model], asked, answer) < LOGPROB_TOLERANCE, model
    assert oracle.error(mixed_state(world, weights), asked, answers[models.index("cat")]) < LOGPROB_TOLERANCE
    one, same, other = (answers[models.index(name)] for name in ("dare", "same", "other"))
    assert difference(one, same) < LOGPROB_TOLERANCE
    assert one.tokens != other.tokens or difference(one, other) > 10 * LOGPROB_TOLERANCE
    for body, words in (
        ({"mix": weights, "method": "svd"}, "flora-vllm merge --method"),
        ({"mix": weights, "method": "ties"}, "needs density"),
        ({"mix": {"lora": 1.0, "hira": 1.0}, "method": "cat"}, "'hira' is HIRA; these methods are for plain LoRA"),
        ({"mix": {"lora": 1.0, "ties": 1.0}}, "'ties' is a mix itself"),
        ({"mix": weights, "density": 0.5}, "go with a mix and its method"),
    ):
        status, message = client.post("load_lora_adapter", {"lora_name": "x", **body})
        assert (status in (400, 422), words in message) == (True, True), message
    for name in loads:
        assert client.unload(name)[0] == 200


def test_tokens_choose_among_loaded_adapters_as_in_pefts_arrow(client: Client, world: World) -> None:
    """By name and from the command line, alone and beside the adapters chosen among, which may then be unloaded."""
    chosen = {"top_k": 2, "temperature": 0.7, "seed": 3}
    assert client.post("load_lora_adapter", {"lora_name": "r", "arrow": {"adapters": [*ROUTED], **chosen}})[0] == 200
    configs = {
        "r": (ROUTED, peft.ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=3)),
        "routed": (ROUTED[:2], peft.ArrowConfig(top_k=2, rng_seed=0)),
    }
    oracles = {
        name: Oracle(
            create_arrow_model(load(world.model), [str(world.adapters[part]) for part in parts], config).eval()
        )
        for name, (parts, config) in configs.items()
    }
    models = ["r", "routed", "route0", BASE, "lora", "r"]
    asks = [(model, make_ask(60 + seed)) for seed, model in enumerate(models)]
    for one in (lambda: client.unload("route2"), lambda: (200, "")):
        together = client.ask_all([(model, asked.prompt) for model, asked in asks])
        for (model, asked), answer in zip(asks, together, strict=True):
            if model in oracles:
                assert oracles[model].error(None, asked, answer) < LOGPROB_TOLERANCE, model
                assert difference(client.ask(model, asked.prompt), answer) < LOGPROB_TOLERANCE, model
        assert one()[0] == 200
    assert client.load("route2", world.adapters["route2"])[0] == 200
    for body, words in (
        ({"arrow": {"adapters": ["lora", "route0"]}}, "has other modules"),
        ({"arrow": {"adapters": ["hira", "flora1"]}}, "'hira' is HIRA; these methods are for plain LoRA"),
        ({"arrow": {"adapters": ["route0", "r"]}}, "'r' is a mix itself"),
        ({"arrow": {"adapters": ["route0", "nobody"]}}, "['nobody'] are not loaded"),
        ({"arrow": {"adapters": ["route0", "route1"], "top_k": 3}}, "top_k is 3, and there are 2 adapters"),
        ({"arrow": {"adapters": ["route0", "route1"], "top": 1}}, "['top'] are no options of an arrow"),
        ({"arrow": {"adapters": ["route0", "route1"]}, "mix": {"lora": 1.0}}, "give mix or arrow, not both"),
    ):
        status, message = client.post("load_lora_adapter", {"lora_name": "x", **body})
        assert (status in (400, 422), words in message) == (True, True), message
    assert client.unload("r")[0] == 200


def choose(world: World, prompt: str) -> dict[str, float]:
    """The authors' code's adapters and weights, these over each adapter's own scale."""
    network = write_classifier(Path(str(world.adapters["tasks"]).removeprefix("dlp:")), CHOSEN)
    with torch.no_grad():
        out = network(torch.tensor([word_tokenizer().encode(prompt).ids[-20:]])).squeeze(0)
    scales = {name: (4 + number) / (2 + 2 * (number % 2)) for number, name in enumerate(CHOSEN)}
    indices, weights = classifier_output(out, 0.6)
    names = [CHOSEN[i] for i in indices.tolist()]
    return {name: w * scales[CHOSEN[0]] / scales[name] for name, w in zip(names, weights.tolist(), strict=True)}


def ask_text(client: Client, model: str, text: str, **extra: Any) -> tuple[str, dict[str, float], Answer]:
    """(model of the answer, the mix its header tells, answer)."""
    body = {"return_tokens_as_token_ids": True, "ignore_eos": True, **extra}
    raw = client.openai.completions.with_raw_response.create(
        model=model, prompt=text, max_tokens=8, temperature=0, logprobs=5, extra_body=body
    )
    completion = raw.parse()
    return completion.model, json.loads(raw.headers.get("x-flora-mix", "{}")), answer_of(completion.choices[0])


def test_a_classifier_chooses_each_prompts_adapters(client: Client, world: World) -> None:
    """As the authors' code does; alone, and all prompts at once beside other adapters."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.model)
    prompts = ["w1 w2 w3", "w9", "w4 w4 w20 w7 w0", " ".join(f"w{i}" for i in range(29)), "w5 w28", "w13 w2"]
    wanted = {prompt: choose(world, prompt) for prompt in prompts}
    assert len({tuple(mix) for mix in wanted.values()}) > 2, "prompts must differ in what is chosen"
    asks = [(model, prompt) for prompt in prompts for model in ("tasks", "dlp:tasks", "lora", BASE)]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda one: ask_text(client, *one), asks))
    oracle = world.oracle()
    for (model, prompt), (named, told, answer) in zip(asks, together, strict=True):
        asked = Ask(tuple(tokenizer(prompt)["input_ids"]))
        if model in ("lora", BASE):
            assert (named, told) == (model, {})
            assert oracle.error(world.states[model], asked, answer) < LOGPROB_TOLERANCE
            continue
        assert named == "tasks"
        assert list(told) == list(wanted[prompt])
        assert [*told.values()] == pytest.approx([*wanted[prompt].values()], abs=1e-6)
        assert oracle.error(mixed_state(world, wanted[prompt]), asked, answer) < LOGPROB_TOLERANCE, prompt
        if model == "tasks":
            alone = ask_text(client, model, prompt)
            assert alone[:2] == (named, told)
            assert difference(alone[2], answer) < LOGPROB_TOLERANCE


def test_choosers_come_and_go_and_say_what_they_cannot(client: Client, world: World, tmp_path: Path) -> None:
    path = str(world.adapters["tasks"])
    assert client.load("more", path)[0] == 200
    assert ask_text(client, "more", "w9")[1] == ask_text(client, "tasks", "w9")[1]
    for extra, prompt, words in (
        ({}, [5, 6], "give one prompt as text"),
        ({}, ["w1", "w2"], "give one prompt as text"),
        ({"flora": {"mix": {"lora": 1.0}}}, "w9", "names the base model"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.openai.completions.create(model="more", prompt=prompt, max_tokens=1, extra_body=extra)
    with pytest.raises(openai.BadRequestError, match="'more' chooses by the prompt"):
        ask(client, {"more": 1.0}, (5, 6))
    assert any(name.startswith("more?") for name in client.names())
    assert client.unload("more")[0] == 200
    assert not any(name.startswith("more") for name in client.names())
    with pytest.raises(openai.NotFoundError):
        ask_text(client, "dlp:more", "w9")
    write_classifier(tmp_path, CHOSEN)
    write_adapters(world.model, tmp_path, CHOSEN, r=12)
    for folder, words in (
        (tmp_path, "rank 24 in layer"),  # two at once, and the limit is 16
        (tmp_path / "nothing", "the folder cannot be opened"),
        (world.adapters["lora"], "dlp_config.json: cannot be read"),
    ):
        status, message = client.load("more", f"dlp:{folder}")
        assert (status in (400, 404), words in message) == (True, True), message
        assert "more" not in client.names()


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
    # As the engine is told of one: the command line may say so, no client.
    assert client.load("x", f'mix:[[1.0,"lora","{world.adapters["lora"]}"]]')[0] == 400
