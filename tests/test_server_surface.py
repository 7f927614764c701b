"""What vLLM's OpenAI server offers, with adapters of every family and none, through the `openai` client."""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from engine_support import LOGPROB_TOLERANCE, difference
from prometheus_client.parser import text_string_to_metric_families
from server_support import BASE, Client, World, answer_of, make_ask, make_world, regret, serving

from flora_vllm.commands.top import look
from flora_vllm.formats import content_digest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

# Fewer slots and fewer places in memory than there are adapters, and chunks smaller than a long prompt.
SMALL = ("--max-loras", "3", "--max-cpu-loras", "4", "--max-num-batched-tokens", "64", "--max-num-seqs", "16")
UPLOADS = ("--flora-max-upload-bytes", str(8 << 20))


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("resolved")
    shutil.copytree(world.adapters["flora2"], root / "found")
    (root / "outside").symlink_to(world.adapters["lora"])
    environment = {"VLLM_LORA_RESOLVER_CACHE_DIR": str(root)}
    with serving(world.model, world.adapters, *SMALL, *UPLOADS, environment=environment) as client:
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


def test_responses(client: Client) -> None:
    texts = set()
    for model in (BASE, "flora1", "lora", "hira"):
        response = client.openai.responses.create(model=model, input="hello there", temperature=0, max_output_tokens=12)
        assert response.model == model
        texts.add(response.output_text)
    assert len(texts) == 4


def test_beams_are_searched_under_the_adapter(client: Client, world: World) -> None:
    ask, oracle, new = make_ask(72), world.oracle(), 4
    for model in (BASE, "flora2", "lora"):
        response = client.openai.completions.create(
            model=model,
            prompt=list(ask.prompt),
            n=2,
            max_tokens=new,
            temperature=0,
            extra_body={"use_beam_search": True, "ignore_eos": True, "return_token_ids": True},
        )
        beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for _ in range(new):
            following = [
                (score, found, oracle.logprobs(world.states[model], ask.prompt + found)[-1]) for score, found in beams
            ]
            grown = [
                (score + float(row[t]), (*found, t))
                for score, found, row in following
                for t in row.topk(4).indices.tolist()
            ]
            beams = sorted(grown, reverse=True)[:2]
        assert [tuple(choice.model_dump()["token_ids"])[-new:] for choice in response.choices] == [t for _, t in beams]


def test_structured_output(client: Client) -> None:
    for model in (BASE, "flora1", "ia3"):
        response = client.openai.completions.create(
            model=model,
            prompt="hello",
            max_tokens=12,
            extra_body={"structured_outputs": {"regex": "(the|a)( the| a){2}"}},
        )
        assert re.fullmatch("(the|a)( the| a){2}", response.choices[0].text)


def _listed(client: Client) -> dict[str, dict]:
    return {
        entry["name"]: entry for entry in httpx.get(f"{client.url}/flora/adapters").raise_for_status().json()["data"]
    }


def _series(client: Client, **headers: str) -> dict[tuple[str, ...], float]:
    """(name, the labels' values in alphabetical order of the labels) -> value."""
    answer = httpx.get(client.url.removesuffix("/v1") + "/metrics", headers=headers).raise_for_status()
    families = text_string_to_metric_families(answer.text)
    return {(s.name, *(v for _, v in sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_operators_see_where_each_adapter_is(client: Client, world: World) -> None:
    for model in [*world.adapters, "flora5"]:
        client.ask(model, make_ask(75).prompt, new=1)
    listed = _listed(client)
    assert listed.keys() == client.names() - {BASE}
    states = [entry["state"] for entry in listed.values()]
    # Three slots, one place more in memory.
    assert (states.count("resident"), states.count("host")) == (3, 1)
    assert states.count("registered") == len(listed) - 4
    flora5 = listed["flora5"]
    assert (flora5["state"], flora5["family"], flora5["rank"], flora5["pinned"]) == ("resident", "FLORA", 5, False)
    assert content_digest(world.adapters["flora5"]).startswith(flora5["digest"])
    assert flora5["bytes"] >= 4 * 5 * 64 * 2
    before = flora5["last_used"]
    assert abs(time.time() - before) < 600
    client.ask("flora5", make_ask(76).prompt, new=1)
    assert _listed(client)["flora5"]["last_used"] > before
    assert max(listed.values(), key=lambda entry: entry["last_used"] or 0)["name"] == "flora5"
    assert look(client.url.removesuffix("/v1")).details["flora5"]["family"] == "FLORA"


def test_series_of_adapters(client: Client, world: World) -> None:
    time.sleep(1.1)  # what was said to an earlier scrape is old
    # As Prometheus asks: for what cannot be added to.
    series = _series(client, accept="application/openmetrics-text; version=1.0.0", **{"accept-encoding": "gzip"})
    assert series["vllm:lora_adapter_loaded", "flora5", "gpu", "false", "5"] == 1
    loaded = {key[1:]: value for key, value in series.items() if key[0] == "vllm:lora_adapter_loaded"}
    assert sum(value for (_, level, *_), value in loaded.items() if level == "gpu") == 3
    assert sum(loaded.values()) == 4
    assert series["vllm:num_gpu_loaded_lora_adapters",] == series["vllm:max_gpu_lora_adapters",] == 3
    assert series["vllm:num_cpu_loaded_lora_adapters",] == 4
    assert series["flora_adapter_evictions_total", "cpu"] > 0
    assert series["flora_adapter_evictions_total", "gpu"] > 0
    done = sum(series["flora_adapter_loads_total", result] for result in ("loaded", "reloaded"))
    assert series["flora_adapter_loads_total", "reloaded"] > 0
    assert series["vllm:lora_adapter_load_seconds_count",] == done
    assert 0 < series["vllm:lora_adapter_load_seconds_sum",] < 60 * done
    assert any(name == "vllm:num_requests_running" for name, *_ in series), "vLLM's own are still there"
    client.load("gone", world.adapters["lora"])
    broken = client.load("broken", "/nowhere")
    assert broken[0] != 200
    assert client.unload("gone")[0] == 200
    time.sleep(1.1)
    after = _series(client)
    assert after["flora_adapter_loads_total", "loaded"] == series["flora_adapter_loads_total", "loaded"] + 1
    assert not any(key[1] == "gone" for key in after if key[0] == "vllm:lora_adapter_loaded")


def _traffic(client: Client) -> dict[tuple[str, ...], float]:
    """(series, adapter, family) -> value."""
    names = ("flora_prompt_", "flora_generation_", "flora_requests_total", "flora_time_")
    return {key: value for key, value in _series(client).items() if key[0].startswith(names)}


def test_tokens_and_first_tokens_by_adapter(client: Client, world: World) -> None:
    before, total = _traffic(client), client.metric("vllm:generation_tokens_total")
    prompt = make_ask(77).prompt
    for model in (BASE, "flora5", "flora5", "lora"):
        client.ask(model, prompt, new=5)
    after = _traffic(client)
    assert not any(name == BASE or "@" in name for _, name, _ in after)

    def more(series: str, adapter: str, family: str) -> float:
        return after[series, adapter, family] - before.get((series, adapter, family), 0)

    for adapter, family, asks in (("flora5", "FLORA", 2), ("lora", "LORA", 1)):
        assert more("flora_prompt_tokens_total", adapter, family) == asks * len(prompt)
        assert more("flora_generation_tokens_total", adapter, family) == asks * 5
        assert more("flora_requests_total", adapter, family) == asks
        assert more("flora_time_to_first_token_seconds_count", adapter, family) == asks
        assert 0 < more("flora_time_to_first_token_seconds_sum", adapter, family) < 60
    assert client.metric("vllm:generation_tokens_total") - total == 20, "our counts are a part of vLLM's"


def test_what_loads_wait_for_and_which_way_products_go(client: Client, world: World) -> None:
    for model in [*world.adapters, *world.adapters]:
        client.ask(model, make_ask(78, length=100).prompt, new=2)
    time.sleep(1.1)
    series = _series(client)
    for level in ("gpu", "cpu"):
        assert series["flora_adapter_lookups_total", level, "miss"] > 0
        assert sum(series["flora_adapter_lookups_total", level, result] for result in ("hit", "miss")) >= 12
    phases = {key[1]: value for key, value in series.items() if key[0] == "flora_adapter_load_phase_seconds_total"}
    assert phases.keys() == {"read", "check", "cut", "keep", "write"}
    assert all(value > 0 for value in phases.values())
    loads = sum(phases[phase] for phase in ("read", "check", "cut", "keep"))
    assert 0 < loads <= series["vllm:lora_adapter_load_seconds_sum",] * 1.01
    # Two tokens a step are stacked, and in prompts of 100 the ranks 2 and 5 modulated.
    assert series["flora_segments_total", "stacked"] > 0
    assert series["flora_segments_total", "modulated"] > 0
    waiting = {key[1]: value for key, value in series.items() if key[0] == "flora_requests_waiting"}
    assert waiting == {"slot": 0, "loading": 0, "memory": 0}


def test_operators_of_other_apis_are_told_that_mixes_are_not_served_there(client: Client) -> None:
    asked = {"model": "lora", "max_tokens": 2, "messages": [{"role": "user", "content": "hello there"}]}
    assert client.post("messages", asked)[0] == 200
    refused = client.post("messages", {**asked, "model": BASE, "flora": {"mix": {"lora": 1.0}}})
    assert (refused[0], 'takes no "flora"' in refused[1]) == (400, True)


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


def _newest_adapters(client: Client) -> set[str]:
    """What llm-d's scheduler reads of a scrape: the series of vllm:lora_requests_info that was set last, of those that
    name any adapter; its adapters are the names between commas."""
    text = httpx.get(client.url.removesuffix("/v1") + "/metrics").text
    series = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:lora_requests_info"
        and (sample.labels["running_lora_adapters"] or sample.labels["waiting_lora_adapters"])
    ]
    assert len(series) <= 64
    if not series:
        return set()
    labels = max(series, key=lambda sample: sample.value).labels
    return {
        name
        for label in ("running_lora_adapters", "waiting_lora_adapters")
        for name in labels[label].split(",")
        if name
    }


def test_a_scrape_has_the_names_that_clients_use(client: Client) -> None:
    long = threading.Thread(target=client.ask, args=("hira", make_ask(80).prompt), kwargs={"new": 400})
    long.start()
    deadline = time.monotonic() + 60
    seen: set[str] = set()
    while long.is_alive() and "hira" not in seen and time.monotonic() < deadline:
        seen |= _newest_adapters(client)
    long.join()
    assert "hira" in seen
    assert all("@" not in name for name in seen)


def _upload(client: Client, fields: dict[str, str], files: dict[str, bytes]) -> httpx.Response:
    return httpx.post(f"{client.url}/load_lora_adapter", data=fields, files=files, timeout=300)


def test_an_adapters_files_can_be_sent_instead_of_a_path(client: Client, world: World) -> None:
    folder, ask = world.adapters["flora5"], make_ask(81)
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    for turn in range(2):
        response = _upload(client, {"lora_name": "sent", "load_inplace": str(bool(turn))}, files)
        assert response.status_code == 200, response.text
        assert world.oracle().error(world.states["flora5"], ask, client.ask("sent", ask.prompt)) < LOGPROB_TOLERANCE
    # Its directory is gone.
    assert client.post("load_lora_adapter", {"lora_name": "mixed", "mix": {"sent": 1.0}})[0] == 200
    assert world.oracle().error(world.states["flora5"], ask, client.ask("mixed", ask.prompt)) < LOGPROB_TOLERANCE
    for name in ("sent", "mixed"):
        assert client.unload(name)[0] == 200
    pickled = _upload(client, {"lora_name": "sent"}, files | {"weights": b"\x80\x04."})
    assert pickled.status_code == 400
    assert "cannot be served" in pickled.json()["error"]["message"]
    missing = _upload(client, {}, files)
    assert missing.status_code == 400
    assert "missing: ['lora_name']" in missing.json()["error"]["message"]
    assert "sent" not in client.names()


def test_an_upload_has_a_size_limit(client: Client) -> None:
    response = _upload(client, {"lora_name": "big"}, {"config": b"{}", "weights": bytes(9 << 20)})
    assert response.status_code == 413
    assert "--flora-max-upload-bytes" in response.json()["error"]["message"]


def test_a_hub_id_that_cannot_be_had_is_404_and_named(client: Client) -> None:
    status, message = client.load("hub", "nobody/no-such-adapter")
    assert status == 404
    assert "'nobody/no-such-adapter'" in message
