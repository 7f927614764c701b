"""Real vLLM replicas on two raylets behind one OpenAI endpoint: every family right, a node killed under streams."""

import shutil
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from engine_support import LOGPROB_TOLERANCE, load, write_flora_adapter
from server_support import BASE, Client, make_ask, make_world

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cluster_fleet as fleets

from flora_vllm.cluster.config import ClusterConfig, parse
from flora_vllm.commands.top import look, parse_metrics, table

with warnings.catch_warnings():
    # Ray uses what pydantic deprecated.
    warnings.simplefilter("ignore")
    import ray
    from ray.exceptions import RayError

    from flora_vllm.cluster.ray_hooks import controller_names, find_controller

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

PORT = fleets.free_port()
URL = f"http://127.0.0.1:{PORT}/v1"
APP = "flora"
# Ample for a loaded machine; a wait ends as soon as what it waits for is there.
PATIENCE_S = 180.0


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    return parse(
        ClusterConfig,
        {
            "name": APP,
            "models": [
                {
                    "name": BASE,
                    "source": str(world.model),
                    "adapters": [str(world.adapters["lora"].parent)],
                    "slots": 4,
                    "replicas": 2,
                    "device": "cpu",
                    "cpus": 1,
                    "adapter_options": {"flora1": {"min_copies": 2}, "lora": {"min_copies": 2}},
                    "engine": {
                        "dtype": "float32",
                        "enforce_eager": True,
                        "max_model_len": 512,
                        "max_num_seqs": 16,
                        "kv_cache_memory_bytes": 64 << 20,
                    },
                    "environment": {"OMP_NUM_THREADS": "1"},
                }
            ],
            "store": {"cache_dir": str(tmp_path_factory.mktemp("cache")), "scan_s": 1},
            # With two engines it takes all three CPUs of the fleet, one each: it is never where an engine is.
            # A replica that comes up anew may take longer than usual here.
            "ingress": {"port": PORT, "cpus": 1, "retry_s": PATIENCE_S},
            # A busy machine may keep an engine's process from reporting for seconds.
            "timing": {"lost_s": 15},
        },
    )


@pytest.fixture(scope="module")
def fleet(config):
    from flora_vllm.cluster import operate

    with fleets.fleet(2, PORT, head_cpus=1, cpus=1) as made:
        operate.up(config)
        yield made


@pytest.fixture(scope="module")
def client(fleet):
    return Client(URL)


def status() -> dict[str, Any]:
    (deployment,) = controller_names(APP)
    state: Any = ray.get(find_controller(APP, deployment).status.remote(), timeout=20)
    return state


def reports():
    """What replicas report, by replica; nothing while there is no controller."""
    try:
        return status()["replicas"]
    except (ValueError, RayError):
        return {}


def engines():
    """The engines' processes on nodes that live; those of a dead node are nobody's children."""
    return [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]


def apart(name):
    """Nodes whose replicas have the adapter in memory."""
    return {x["node"] for x in reports().values() if any(i.startswith(f"{name}@") for i in x["resident"])}


def check_all(client, world, names, seed=0):
    oracle = world.oracle()
    for i, name in enumerate(names):
        ask = make_ask(seed + i)
        answer = client.ask(name, ask.prompt)
        assert oracle.error(world.states[name], ask, answer) < LOGPROB_TOLERANCE, name


def test_every_family_and_the_base_through_one_endpoint(client, world):
    assert fleets.wait_for(lambda: len(apart("flora1")) == len(apart("lora")) == 2, PATIENCE_S), status()
    assert client.names() == {BASE, *world.adapters}
    check_all(client, world, [BASE, *world.adapters])
    asks = [(name, make_ask(i).prompt) for i, name in enumerate([BASE, *world.adapters] * 3)]
    oracle = world.oracle()
    for (name, prompt), answer in zip(asks, client.ask_all(asks), strict=True):
        tokens = oracle.greedy(world.states[name], prompt, len(answer.tokens))
        assert answer.tokens == tokens, f"{name} in a mixed batch"


def _series(client):
    text = httpx.get(client.url.removesuffix("/v1") + "/metrics", timeout=60).raise_for_status().text
    return parse_metrics(text)


def test_the_ingress_tells_all_replicas_series_and_adapters(client, world):
    before = _series(client)
    asks = [(name, make_ask(i).prompt) for i, name in enumerate(["lora"] * 8 + ["flora1"] * 8)]
    client.ask_all(asks, new=4)

    def more(metric, **labels):
        """How much the sum of a metric has grown."""
        then, now = (
            sum(v for name, found, v in series if name == metric and labels.items() <= found.items())
            for series in (before, _series(client))
        )
        return now - then

    for name, family in (("lora", "LORA"), ("flora1", "FLORA")):
        assert more("flora_requests_total", adapter_name=name, family=family, model_name=BASE) == 8
        assert more("flora_generation_tokens_total", adapter_name=name) == 32
        assert more("flora_time_to_first_token_seconds_count", adapter_name=name) == 8
    assert more("vllm:generation_tokens_total", model_name=BASE) == 64
    samples = _series(client)
    loaded = {labels["adapter_name"]: 0.0 for name, labels, _ in samples if name == "vllm:lora_adapter_loaded"}
    for name, labels, value in samples:
        if name == "vllm:lora_adapter_loaded":
            loaded[labels["adapter_name"]] += value
    assert (loaded["lora"], loaded["flora1"]) == (2, 2), "one in each replica"
    usage = [labels["replica"] for name, labels, _ in samples if name == "vllm:kv_cache_usage_perc"]
    assert len({*usage}) == len(usage) == 2, "a ratio has no sum"
    seen = look(client.url.removesuffix("/v1"))
    assert {*seen.adapters} == {*world.adapters}
    assert [*seen.details["lora"]["replicas"].values()] == ["resident"] * 2
    assert (seen.details["lora"]["family"], seen.details["lora"]["rank"], seen.details["lora"]["parent"]) == (
        "LORA",
        8,
        BASE,
    )
    assert table(client.url, None, seen)


def test_names_long_short_and_unknown(client):
    long = client.openai.completions.create(model=f"{BASE}:flora1", prompt="a b", max_tokens=4, temperature=0)
    short = client.openai.completions.create(model="flora1", prompt="a b", max_tokens=4, temperature=0)
    assert long.choices[0].text == short.choices[0].text
    for unknown in ("nobody", f"{BASE}:nobody", "nowhere:flora1"):
        with pytest.raises(openai.NotFoundError, match=r"nobody|nowhere"):
            client.openai.completions.create(model=unknown, prompt="a", max_tokens=1)


def test_faulty_adapter_is_refused_with_its_faults_and_the_rest_serves(client, world):
    folder = world.adapters["lora"].parent / "faulty"
    shutil.copytree(world.adapters["flora1"], folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(openai.BadRequestError, match="cannot be served"):
        client.openai.completions.create(model="faulty", prompt="a", max_tokens=1)
    assert fleets.wait_for(lambda: any(n.startswith("faulty") for n in status()["faults"]), PATIENCE_S)
    shutil.rmtree(folder)
    check_all(client, world, ["flora1", "lora"])


def test_changed_weights_are_served_without_restart(client, world):
    base = load(world.model)
    state = write_flora_adapter(base, world.adapters["flora2"], 3, "mean", seed=77)
    ask, oracle = make_ask(5), world.oracle()

    def is_new():
        return oracle.error(state, ask, client.ask("flora2", ask.prompt)) < LOGPROB_TOLERANCE

    assert fleets.wait_for(is_new, PATIENCE_S)
    # Never the old one again, from either replica.
    assert all(is_new() for _ in range(6))


class Streams:
    """Clients that stream all the time; of each stream: when it began, "ok", "loud" or "silent", and the error."""

    def __init__(self, models):
        self.outcomes, self._stop = [], threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(m,), daemon=True) for m in models]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _work(self, model):
        client = openai.OpenAI(base_url=URL, api_key="none", timeout=PATIENCE_S, max_retries=0)
        while not self._stop.is_set():
            began, finished, loud = time.monotonic(), False, None
            try:
                stream = client.completions.create(
                    model=model, prompt="a b c", max_tokens=48, stream=True, extra_body={"ignore_eos": True}
                )
                for chunk in stream:
                    finished = finished or bool(chunk.choices and chunk.choices[0].finish_reason)
            except (openai.APIError, OSError) as error:
                loud = error
            kind = "loud" if loud is not None else "ok" if finished else "silent"
            self.outcomes.append((began, kind, repr(loud)))

    def check(self, dead):
        """Nothing ended silently; what failed had begun before `dead`, at most one per client."""
        assert not [o for o in self.outcomes if o[1] == "silent"]
        loud = [o for o in self.outcomes if o[1] == "loud"]
        assert len(loud) <= len(self._threads), loud
        assert all(began < dead for began, _, _ in loud), (dead, loud)


STREAMING = [BASE, "flora1", "lora", "flora5", "flora1", "lora"]


def test_node_killed_under_streams(fleet, client, world):
    check_all(client, world, ["flora1", "lora", "flora5"])
    with Streams(STREAMING) as streams:
        assert fleets.wait_for(lambda: len(streams.outcomes) >= len(STREAMING), PATIENCE_S)
        homes = {x["node"] for x in reports().values()}
        fleet.kill_node(next(n for n in fleet.nodes if n.node_id in homes))
        dead, before = time.monotonic(), len(streams.outcomes)
        assert fleets.wait_for(lambda: len(streams.outcomes) >= before + 3 * len(STREAMING), PATIENCE_S)
    streams.check(dead)
    assert fleets.wait_for(lambda: len(reports()) == 1, PATIENCE_S)
    check_all(client, world, [BASE, "flora1", "lora", "flora5", "hira"], seed=40)


def test_engine_killed_under_streams(client, world):
    """The only replica left loses its engine: streams in flight fail aloud, the others wait for the next replica."""
    (engine,) = engines()
    replica = engine.parent()
    assert replica is not None
    with Streams(STREAMING) as streams:
        assert fleets.wait_for(lambda: len(streams.outcomes) >= len(STREAMING), PATIENCE_S)
        engine.kill()
        # The replica ends with its engine; what reaches it in between is tried again.
        replica.wait(PATIENCE_S)
        dead, before = time.monotonic(), len(streams.outcomes)
        assert fleets.wait_for(lambda: len(streams.outcomes) >= before + 2 * len(STREAMING), PATIENCE_S)
    streams.check(dead)
    check_all(client, world, [BASE, "flora1", "lora"], seed=50)
