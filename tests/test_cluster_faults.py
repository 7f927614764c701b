"""A Serve cluster of four raylets with stand-in engines: copies follow load, and whatever dies, nothing ends silently.

The engines only wait; placement, routing, retry and repair are the product's own. test_cluster_end_to_end.py has real
engines. One fleet for all tests, in this order: the last ones kill parts of it. Nothing depends on how fast the machine
is: a death is a moment that was observed, and what follows is waited for.
"""

import json
import os
import signal
import sys
import time
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cluster_fleet as fleets

from flora_vllm.cluster.config import ClusterConfig, parse

with warnings.catch_warnings():
    # Ray uses what pydantic deprecated.
    warnings.simplefilter("ignore")
    import ray
    from cluster_standin import STAND_IN, EngineSize, make_adapters, stand_in_app
    from ray.exceptions import RayError

    from flora_vllm.cluster.ray_hooks import find_controller

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

NODES, PORT = 4, fleets.free_port()
URL = f"http://127.0.0.1:{PORT}"
NAMES = [f"a{i}" for i in range(8)]
# Ample for a loaded machine; a wait ends as soon as what it waits for is there.
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cluster")
    make_adapters(root / "adapters", NAMES)
    return root


def make_config(folder, **model):
    model = {"name": "base", "source": "none", "adapters": [str(folder / "adapters")], **model}
    store = {"cache_dir": str(folder / "cache"), "scan_s": 1.0}
    return parse(ClusterConfig, {"models": [model], "store": store, "ingress": {"replicas": 2}})


@pytest.fixture(scope="module")
def fleet(folder):
    config = make_config(
        folder,
        slots=6,
        replicas=NODES,
        cpus=0.5,
        adapter_options={"a1": {"min_copies": 2}},
        routing={"spill_queue": 4},
    )
    with fleets.fleet(NODES, PORT, gpus=1) as made:
        from ray import serve

        app = stand_in_app(config, EngineSize(service_s=0.3, load_s=0.2), {"CPU": 0.5, "GPU": 1})
        serve.run(app, name="flora", route_prefix="/")
        yield made


def status(app="flora") -> dict[str, Any]:
    state: Any = ray.get(find_controller(app, STAND_IN).status.remote(), timeout=20)
    return state


def eventually(what):
    """`what()` holds within PATIENCE_S; meanwhile there may be no controller to ask."""

    def holds():
        try:
            return what()
        except (ValueError, RayError):
            return False

    return fleets.wait_for(holds, PATIENCE_S)


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


def is_whole(replicas=NODES):
    """Every replica reports, the plan is made, and the guaranteed copies are there."""
    state = status()
    return state["plans"] > 0 and len(state["replicas"]) == replicas and len(holders("a1")) >= 2


def test_minimum_copies_are_there_before_traffic_and_apart(fleet):
    state = status()
    nodes = {x["node"] for x in state["replicas"].values() if any(i.startswith("a1@") for i in x["resident"])}
    assert len(nodes) >= 2
    assert all(not x["is_warming"] for x in state["replicas"].values())


def test_hot_adapter_gets_copies(fleet):
    # 14 of 20 requests a second for a0 exceed the 13.3 that one replica can serve: alone it would queue without end.
    samples = fleets.drive_http(URL, 15, 20, hot)
    assert fleets.kinds(samples) == {"ok": len(samples)}
    assert len(holders("a0")) >= 3


def test_changed_and_new_adapters_without_restart(fleet, folder):
    make_adapters(folder / "adapters", ["fresh"])
    samples = fleets.drive_http(URL, 1, 4, lambda _: "fresh")
    assert fleets.kinds(samples) == {"ok": 4}
    old = next(i for x in status()["replicas"].values() for i in x["resident"] if i.startswith("a1@"))
    (folder / "adapters" / "a1" / "adapter_model.safetensors").write_bytes(b"new weights")
    assert eventually(
        lambda: len(holders("a1")) >= 2 and not any(old in x["resident"] for x in status()["replicas"].values())
    )
    assert fleets.kinds(fleets.drive_http(URL, 1, 4, lambda _: "a1")) == {"ok": 4}


def test_unknown_adapter_is_a_404(fleet):
    samples = fleets.drive_http(URL, 0.5, 4, lambda _: "nobody")
    assert fleets.kinds(samples) == {"http_404": 2}


def test_replicas_follow_the_adapters_that_want_room(fleet, folder):
    """Serve's autoscaling with our signal: one planned slot each and three guaranteed adapters need three replicas."""
    from ray import serve

    guaranteed = {name: {"min_copies": 1} for name in NAMES[:3]}
    scale = {"min_replicas": 1, "max_replicas": 4, "upscale_delay_s": 0.5, "downscale_delay_s": 600.0}
    config = make_config(folder, slots=2, cpus=0.1, adapter_options=guaranteed, autoscale=scale)
    serve.run(stand_in_app(config, EngineSize(), {"CPU": 0.1}), name="scaled", route_prefix="/scaled")
    assert eventually(lambda: len(status("scaled")["replicas"]) == 3), status("scaled")
    assert eventually(lambda: not status("scaled")["faults"])
    assert fleets.kinds(fleets.drive_http(f"{URL}/scaled", 1, 6, even)) == {"ok": 6}
    assert len(status("scaled")["replicas"]) == 3
    serve.delete("scaled")


def test_controller_killed(fleet):
    samples = fleets.drive_http(URL, 8, 15, even, [(1, lambda: ray.kill(find_controller("flora", STAND_IN)))])
    assert lost(samples) == []
    assert eventually(is_whole)


def test_engine_dies_in_a_live_replica(fleet):
    from ray import serve

    handle, gone = serve.get_deployment_handle(STAND_IN, "flora"), []

    def kill():
        pid = handle.die.remote().result(timeout_s=60)
        assert fleets.wait_for(lambda: not Path(f"/proc/{pid}").exists(), PATIENCE_S), "the replica lives on"
        gone.append(time.monotonic())

    samples = fleets.drive_http(URL, 6, 15, even, [(1, kill)])
    assert "silent" not in fleets.kinds(samples)
    assert len({s.node for s in lost(samples)}) <= 1, "only requests on the dead one may fail"
    assert all(s.kind == "error_event" and s.began < gone[0] for s in lost(samples)), lost(samples)
    assert eventually(is_whole)


def test_ingress_killed(fleet):
    gone = []

    def kill():
        with urllib.request.urlopen(f"{URL}/pid", timeout=20) as response:
            pid = json.loads(response.read())
        os.kill(pid, signal.SIGKILL)
        assert fleets.wait_for(lambda: not Path(f"/proc/{pid}").exists(), PATIENCE_S), "the ingress lives on"
        gone.append(time.monotonic())

    samples = fleets.drive_http(URL, 6, 15, even, [(1, kill)])
    assert "silent" not in fleets.kinds(samples)
    assert all(s.began < gone[0] < s.began + s.seconds + 1 for s in lost(samples)), (gone, lost(samples))
    assert len(lost(samples)) < len(samples) / 4


def test_node_killed(fleet):
    """Only requests in flight there fail, aloud; minimum copies stay served; the plan repairs itself."""
    victim, dead = fleet.nodes[0], []

    def kill():
        fleet.kill_node(victim)
        dead.append(time.monotonic())

    samples = fleets.drive_http(URL, 10, 15, even, [(2, kill)])
    assert "silent" not in fleets.kinds(samples)
    gone = lost(samples)
    assert {s.node for s in gone} <= {victim.node_id}, f"a request elsewhere failed: {gone}"
    # What had sent nothing yet was tried elsewhere; what was lost had begun before Ray knew of the death.
    assert all(s.kind == "error_event" and s.began < dead[0] for s in gone), gone
    assert eventually(lambda: is_whole(NODES - 1))
    fleet.add_node()
    assert eventually(is_whole)
