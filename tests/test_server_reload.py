"""Adapters that come, change and go while requests run: a request keeps the weights it started with."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from engine_support import LOGPROB_TOLERANCE, Answer, Ask
from server_support import BASE, Client, World, make_ask, make_world, regret, serving, under_load

from flora_vllm.formats import content_digest
from flora_vllm.plugin.identity import identity

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

LONG = 1500  # tokens: some seconds, so that it still runs when a busy machine comes back to the test
BEAM_TOKENS = 600


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Client]:
    options = ("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-model-len", "2048")
    with serving(world.model, {}, *options) as client:
        yield client


def publish(world: World, name: str, folder: Path) -> None:
    """Make `folder` hold the adapter `name`, by replacing the directory."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world.adapters[name], folder)


class Running:
    """A long request in the background."""

    def __init__(self, client: Client, model: str, ask: Ask) -> None:
        self._ask, self._answer = ask, None
        self._thread = threading.Thread(target=self._run, args=(client, model))
        self._thread.start()
        while self._thread.is_alive() and not client.metric("vllm:num_requests_running"):
            time.sleep(0.002)  # until it has reached the engine
        assert self._thread.is_alive(), "the request must still run when the adapter changes"

    def _run(self, client: Client, model: str) -> None:
        self._answer = client.ask(model, self._ask.prompt, new=LONG)

    def answer(self) -> Answer:
        self._thread.join(120)
        assert self._answer is not None, "the running request failed"
        return self._answer


def test_reload_leaves_running_requests_on_the_old_weights(client: Client, world: World, tmp_path: Path) -> None:
    folder, ask, oracle = tmp_path / "a", make_ask(1, length=100), world.oracle()
    publish(world, "flora1", folder)
    assert client.load("a", folder)[0] == 200
    running = Running(client, "a", ask)
    publish(world, "flora2", folder)
    assert client.load("a", folder, load_inplace=True)[0] == 200
    # The same prompt: a shared prefix cache would show here.
    fresh = client.ask("a", ask.prompt)
    assert oracle.error(world.states["flora2"], ask, fresh) < LOGPROB_TOLERANCE
    assert regret(oracle, world.states["flora1"], ask, running.answer()) < 1e-3
    assert client.unload("a")[0] == 200


def test_unload_lets_a_running_request_finish(client: Client, world: World, tmp_path: Path) -> None:
    folder, ask = tmp_path / "b", make_ask(2)
    publish(world, "hira", folder)
    assert client.load("b", folder)[0] == 200
    running = Running(client, "b", ask)
    assert client.unload("b")[0] == 200
    shutil.rmtree(folder)
    assert "b" not in client.names()
    assert regret(world.oracle(), world.states["hira"], ask, running.answer()) < 1e-3


def beams(client: Client, ask: Ask) -> list[str]:
    completion = client.openai.completions.create(
        model="e",
        prompt=list(ask.prompt),
        max_tokens=BEAM_TOKENS,
        n=2,
        temperature=0,
        extra_body={"use_beam_search": True, "ignore_eos": True},
    )
    return [choice.text for choice in completion.choices]


def test_beams_are_of_the_content_that_they_began_with(client: Client, world: World, tmp_path: Path) -> None:
    """Between two tokens of theirs no request of the adapter runs."""
    folder, ask = tmp_path / "e", make_ask(9)

    def load(name: str) -> None:
        publish(world, name, folder)
        assert client.load("e", folder, load_inplace=True)[0] == 200

    wanted = {}
    for name in ("flora1", "ia3"):
        load(name)
        wanted[name] = beams(client, ask)
    assert wanted["flora1"] != wanted["ia3"]
    with ThreadPoolExecutor(1) as pool:
        for before, after, is_unloaded in (("ia3", "flora1", False), ("flora1", "ia3", True)):
            ended = client.metric("vllm:request_success_total")
            running = pool.submit(beams, client, ask)
            while not running.done() and client.metric("vllm:request_success_total") < ended + 20:
                time.sleep(0.002)  # until some of its tokens have come
            if is_unloaded:
                assert client.unload("e")[0] == 200
            load(after)
            time.sleep(0.3)  # some looks for whether it is in use
            assert not running.done(), "it must still run"
            assert running.result(120) == wanted[before]
            assert beams(client, ask) == wanted[after]
    assert client.unload("e")[0] == 200
    deadline = time.monotonic() + 30
    while client.metric("vllm:num_cpu_loaded_lora_adapters"):
        assert time.monotonic() < deadline, "nobody can ask with them any more"
        time.sleep(0.1)


def test_an_evicted_adapter_outlives_its_directory(client: Client, world: World, tmp_path: Path) -> None:
    folder, ask, oracle = tmp_path / "c", make_ask(3), world.oracle()
    publish(world, "flora5", folder)
    client.load("c", folder)
    shutil.rmtree(folder)
    for name in ("flora1", "flora2", "lora"):  # two places in memory: this evicts c
        client.load(f"other-{name}", world.adapters[name])
    assert oracle.error(world.states["flora5"], ask, client.ask("c", ask.prompt)) < LOGPROB_TOLERANCE
    for name in ("c", "other-flora1", "other-flora2", "other-lora"):
        assert client.unload(name)[0] == 200


def test_the_same_name_changing_all_the_time_under_load(client: Client, world: World, tmp_path: Path) -> None:
    """One name with two live ids would end vLLM's engine; requests of a name never see a third version."""
    folder, ask, oracle = tmp_path / "d", make_ask(4), world.oracle()
    client.load("steady", world.adapters["lora"])
    steady = World(world.model, world.adapters, {**world.states, "steady": world.states["lora"]})
    with under_load(client, steady, [BASE, "steady"]):
        for turn in range(8):
            name = ("flora1", "ia3")[turn % 2]
            publish(world, name, folder)
            assert client.load("d", folder)[0] == 200
            assert oracle.error(world.states[name], ask, client.ask("d", ask.prompt)) < LOGPROB_TOLERANCE
            assert client.unload("d")[0] == 200
    client.unload("steady")


def test_one_content_under_two_names(client: Client, world: World) -> None:
    ask, oracle = make_ask(5), world.oracle()
    for name in ("x", "y"):
        assert client.load(name, world.adapters["flora2"])[0] == 200
    assert client.unload("x")[0] == 200
    assert oracle.error(world.states["flora2"], ask, client.ask("y", ask.prompt)) < LOGPROB_TOLERANCE
    client.unload("y")


def test_nobody_passes_for_another_by_an_identity(client: Client, world: World) -> None:
    """What the engine calls `own` is nobody's name; and as a name it is another adapter's, which changes nothing."""
    ask, oracle = make_ask(6), world.oracle()
    assert client.load("own", world.adapters["flora1"])[0] == 200
    inner = identity("own", content_digest(world.adapters["flora1"]))
    with pytest.raises(openai.NotFoundError):
        client.ask(inner, ask.prompt)
    assert client.unload(inner)[0] == 404
    assert client.load(inner, world.adapters["hira"])[0] == 200
    for name, wanted in (("own", "flora1"), (inner, "hira")):
        assert oracle.error(world.states[wanted], ask, client.ask(name, ask.prompt)) < LOGPROB_TOLERANCE
        assert name in client.names()
    assert client.unload(inner)[0] == 200
    assert oracle.error(world.states["flora1"], ask, client.ask("own", ask.prompt)) < LOGPROB_TOLERANCE
    assert client.unload("own")[0] == 200


def test_fifty_loads_at_once(client: Client, world: World) -> None:
    """Into two places in memory, beside traffic; then all of them go at once, one while it answers."""
    ask, oracle = make_ask(7), world.oracle()
    contents = {f"many{i}": ("flora1", "flora2", "lora", "ia3", "hira")[i % 5] for i in range(50)}
    with under_load(client, world, [BASE]), ThreadPoolExecutor(50) as pool:
        loads = pool.map(lambda one: client.load(one[0], world.adapters[one[1]])[0], contents.items())
        assert [*loads] == [200] * 50
        assert client.names() >= {*contents}
        for name in list(contents)[:6]:
            answer = client.ask(name, ask.prompt)
            assert oracle.error(world.states[contents[name]], ask, answer) < LOGPROB_TOLERANCE
        running = Running(client, "many3", ask)
        assert [*pool.map(lambda name: client.unload(name)[0], contents)] == [200] * 50
        assert regret(oracle, world.states["ia3"], ask, running.answer()) < 1e-3
    assert client.names() == {BASE}
