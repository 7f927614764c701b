"""A Serve cluster of four raylets with stand-in engines: copies follow load, and whatever dies, nothing ends silently.

The engines only wait; placement, routing, retry and repair are the product's own. test_cluster_end_to_end.py has real
engines.
"""

import json
import os
import signal
import sys
import urllib.request
import warnings
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cluster_fleet as fleets

from flora_vllm.cluster.config import ClusterConfig, parse

with warnings.catch_warnings():
    # Ray uses what pydantic deprecated.
    warnings.simplefilter("ignore")
    import ray
    from cluster_standin import STAND_IN, EngineSize, make_adapters, stand_in_app

    from flora_vllm.cluster.ray_hooks import find_controller

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

NODES, PORT = 4, fleets.free_port()
URL = f"http://127.0.0.1:{PORT}"
NAMES = [f"a{i}" for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cluster")
    make_adapters(root / "adapters", NAMES)
    return root


@pytest.fixture(scope="module")
def fleet(folder):
    config = parse(
        ClusterConfig,
        {
            "models": [
                {
                    "name": "base",
                    "source": "none",
                    "adapters": [str(folder / "adapters")],
                    "slots": 6,
                    "replicas": NODES,
                    "cpus": 0.5,
                    "adapter_options": {"a1": {"min_copies": 2}},
                    "routing": {"spill_queue": 4},
                }
            ],
            "store": {"cache_dir": str(folder / "cache"), "scan_s": 1.0},
            "ingress": {"replicas": 2},
        },
    )
    with fleets.fleet(NODES, PORT, gpus=1) as made:
        from ray import serve

        app = stand_in_app(config, EngineSize(service_s=0.3, load_s=0.2), {"CPU": 0.5, "GPU": 1})
        serve.run(app, name="flora", route_prefix="/")
        yield made


def status():
    return ray.get(find_controller("flora", STAND_IN).status.remote(), timeout=20)


def holders(name):
    """Replicas that have the adapter planned and in memory."""
    rows = status()["replicas"].items()
    return {r for r, x in rows if any(i.startswith(f"{name}@") for i in set(x["wanted"]) & set(x["resident"]))}


def hot(i):
    """Seven of ten requests are for a0."""
    return "a0" if i % 10 < 7 else NAMES[1 + i % 7]


def even(i):
    return NAMES[i % len(NAMES)]


def lost(samples):
    return [s for s in samples if s.kind != "ok"]


def test_minimum_copies_are_there_before_traffic_and_apart(fleet):
    state = status()
    nodes = {x["node"] for x in state["replicas"].values() if any(i.startswith("a1@") for i in x["resident"])}
    assert len(nodes) >= 2
    assert all(not x["is_warming"] for x in state["replicas"].values())


def test_hot_adapter_gets_copies(fleet):
    samples = fleets.drive_http(URL, 20, 20, hot)
    assert fleets.kinds(samples) == {"ok": len(samples)}
    assert len(holders("a0")) >= 3
    # 14 of 20 requests a second for a0 exceed the 13.3 that one replica can serve: alone it would queue without end.
    late = [s.seconds for s in samples if s.at_s > 10]
    assert fleets.percentile(late, 0.5) < 2.0


def test_changed_and_new_adapters_without_restart(fleet, folder):
    make_adapters(folder / "adapters", ["fresh"])
    samples = fleets.drive_http(URL, 1, 4, lambda _: "fresh")
    assert fleets.kinds(samples) == {"ok": 4}
    before = holders("a1")
    old = next(i for x in status()["replicas"].values() for i in x["resident"] if i.startswith("a1@"))
    (folder / "adapters" / "a1" / "adapter_model.safetensors").write_bytes(b"new weights")
    assert fleets.wait_for(
        lambda: len(holders("a1")) >= 2 and not any(old in x["resident"] for x in status()["replicas"].values()), 30
    ), f"{before} held {old}"
    assert fleets.kinds(fleets.drive_http(URL, 1, 4, lambda _: "a1")) == {"ok": 4}


def test_unknown_adapter_is_a_404(fleet):
    samples = fleets.drive_http(URL, 0.5, 4, lambda _: "nobody")
    assert fleets.kinds(samples) == {"http_404": 2}


def test_controller_killed(fleet):
    def kill():
        ray.kill(find_controller("flora", STAND_IN))

    samples = fleets.drive_http(URL, 12, 15, even, [(2, kill)])
    assert lost(samples) == []
    assert fleets.wait_for(lambda: _recovered(), 40)


def _recovered():
    try:
        state = status()
    except (ValueError, ray.exceptions.RayError):
        return False
    return state["plans"] > 0 and len(state["replicas"]) == NODES and len(holders("a1")) >= 2


def test_engine_dies_in_a_live_replica(fleet):
    from ray import serve

    handle = serve.get_deployment_handle(STAND_IN, "flora")
    samples = fleets.drive_http(URL, 8, 15, even, [(2, lambda: handle.die.remote().result(timeout_s=20))])
    assert "silent" not in fleets.kinds(samples)
    nodes = {s.node for s in lost(samples)}
    assert len(nodes) <= 1, "only requests on the dead one may fail"
    # Whatever was running there was sent within one service time of its death; later ones never saw it.
    assert all(s.at_s < 4 for s in lost(samples))
    assert fleets.wait_for(lambda: len(status()["replicas"]) >= NODES, 60)


def test_ingress_killed(fleet):
    def kill():
        with urllib.request.urlopen(f"{URL}/pid", timeout=20) as response:
            os.kill(json.loads(response.read()), signal.SIGKILL)

    samples = fleets.drive_http(URL, 8, 15, even, [(2, kill)])
    assert "silent" not in fleets.kinds(samples)
    assert all(1 < s.at_s < 4 for s in lost(samples)), fleets.kinds(samples)
    assert len(lost(samples)) < len(samples) / 4


def test_node_killed(fleet):
    """Only requests in flight there fail, aloud; minimum copies stay served; the plan repairs itself."""
    victim = fleet.nodes[0]
    samples = fleets.drive_http(URL, 12, 15, even, [(3, lambda: fleet.kill_node(victim))])
    assert "silent" not in fleets.kinds(samples)
    gone = lost(samples)
    assert {s.node for s in gone} <= {victim.node_id}, "a request elsewhere failed"
    # A request takes 0.3 s and waits little: what was lost had begun before the node died, or just when it did.
    assert all(s.kind == "error_event" and s.at_s < 5 for s in gone), gone
    assert fleets.wait_for(lambda: len(status()["replicas"]) == NODES - 1 and len(holders("a1")) >= 2, 40)
    fleet.add_node()
    assert fleets.wait_for(lambda: len(status()["replicas"]) == NODES, 60)
