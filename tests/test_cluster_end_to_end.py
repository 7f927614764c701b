"""Real vLLM replicas on two raylets behind one OpenAI endpoint: every family right, a node killed under streams."""

import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import openai
import pytest
from engine_support import LOGPROB_TOLERANCE, load, write_flora_adapter
from server_support import BASE, Client, make_ask, make_world

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cluster_fleet as fleets

from flora_vllm.cluster.config import ClusterConfig, parse

with warnings.catch_warnings():
    # Ray uses what pydantic deprecated.
    warnings.simplefilter("ignore")
    import ray

    from flora_vllm.cluster.ray_hooks import controller_names, find_controller

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

PORT = fleets.free_port()
URL = f"http://127.0.0.1:{PORT}/v1"
APP = "flora"


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
            # The engines take the nodes' only CPU, so the ingress is on the head and outlives them.
            "ingress": {"port": PORT, "cpus": 1},
            # A busy machine may keep an engine's process from reporting for seconds.
            "timing": {"lost_s": 15},
        },
    )


@pytest.fixture(scope="module")
def fleet(config):
    from flora_vllm.cluster import operate

    with fleets.fleet(2, PORT, cpus=1) as made:
        operate.up(config)
        yield made


@pytest.fixture(scope="module")
def client(fleet):
    return Client(URL)


def status():
    (deployment,) = controller_names(APP)
    return ray.get(find_controller(APP, deployment).status.remote(), timeout=20)


def apart(name):
    """Nodes whose replicas have the adapter in memory."""
    return {x["node"] for x in status()["replicas"].values() if any(i.startswith(f"{name}@") for i in x["resident"])}


def check_all(client, world, names, seed=0):
    oracle = world.oracle()
    for i, name in enumerate(names):
        ask = make_ask(seed + i)
        answer = client.ask(name, ask.prompt)
        assert oracle.error(world.states[name], ask, answer) < LOGPROB_TOLERANCE, name


def test_every_family_and_the_base_through_one_endpoint(client, world):
    assert fleets.wait_for(lambda: len(apart("flora1")) == len(apart("lora")) == 2, 60), status()
    assert client.names() == {BASE, *world.adapters}
    check_all(client, world, [BASE, *world.adapters])
    asks = [(name, make_ask(i).prompt) for i, name in enumerate([BASE, *world.adapters] * 3)]
    oracle = world.oracle()
    for (name, prompt), answer in zip(asks, client.ask_all(asks), strict=True):
        tokens = oracle.greedy(world.states[name], prompt, len(answer.tokens))
        assert answer.tokens == tokens, f"{name} in a mixed batch"


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
    assert fleets.wait_for(lambda: any(n.startswith("faulty") for n in status()["faults"]), 20)
    shutil.rmtree(folder)
    check_all(client, world, ["flora1", "lora"])


def test_changed_weights_are_served_without_restart(client, world):
    base = load(world.model)
    state = write_flora_adapter(base, world.adapters["flora2"], 3, "mean", seed=77)
    ask, oracle = make_ask(5), world.oracle()

    def is_new():
        return oracle.error(state, ask, client.ask("flora2", ask.prompt)) < LOGPROB_TOLERANCE

    assert fleets.wait_for(is_new, 20)
    # Never the old one again, from either replica.
    assert all(is_new() for _ in range(6))


class Streams:
    """Clients that stream all the time; what each stream came to: "ok", "loud" or "silent", and when it began."""

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
            thread.join(120)

    def _work(self, model):
        client = openai.OpenAI(base_url=URL, api_key="none", timeout=120, max_retries=0)
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


def test_node_killed_under_streams(fleet, client, world):
    names = [BASE, "flora1", "lora", "flora5", "flora1", "lora"]
    check_all(client, world, ["flora1", "lora", "flora5"])
    with Streams(names) as streams:
        assert fleets.wait_for(lambda: len(streams.outcomes) >= len(names), 60)
        fleet.kill_node(fleet.nodes[0])
        killed = time.monotonic()
        before = len(streams.outcomes)
        assert fleets.wait_for(lambda: len(streams.outcomes) >= before + 3 * len(names), 120), streams.outcomes
    kinds = [kind for _, kind, _ in streams.outcomes]
    assert "silent" not in kinds
    loud = [o for o in streams.outcomes if o[1] == "loud"]
    # One stream per client can have been in flight on the dead node; every later one must succeed.
    assert len(loud) <= len(names), loud
    assert all(began < killed + 3 for began, _, _ in loud), loud
    assert fleets.wait_for(lambda: len(status()["replicas"]) == 1, 30)
    check_all(client, world, [BASE, "flora1", "lora", "flora5", "hira"], seed=40)
