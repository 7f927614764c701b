"""Several raylets on one machine, and load on what they serve: shared by the cluster benchmark and the cluster tests.

Graphics cards are declared, not there. Death of a node is a killed raylet, noticed through Ray's own heartbeats.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Ray notices a dead node after period times threshold instead of half a minute.
QUICK_DEATH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "4",
    "RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S": "2",
    "RAY_USAGE_STATS_ENABLED": "0",
}


# A resource that only the head has.
HEAD = "head"


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Fleet:
    """A head without work and nodes that replicas run on."""

    cluster: Any
    shape: dict[str, float]
    nodes: list[Any] = field(default_factory=list)

    def add_node(self) -> Any:
        node = self.cluster.add_node(object_store_memory=80 * 2**20, **self.shape)
        self.nodes.append(node)
        return node

    def kill_node(self, node: Any, patience_s: float = 60.0) -> None:
        """The raylet and everything on the node, without notice; returns when Ray knows that it is dead."""
        import ray

        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        gone = wait_for(lambda: all(not n["Alive"] for n in ray.nodes() if n["NodeID"] == node.node_id), patience_s)
        assert gone, f"Ray did not notice within {patience_s} s that a node died"


@contextlib.contextmanager
def fleet(nodes: int, port: int, *, head_cpus: float = 2, cpus: float = 2, gpus: float = 0) -> Iterator[Fleet]:
    """A running Ray with Serve's proxy on the head at `port`; everything is ended on leaving."""
    os.environ.update({k: v for k, v in QUICK_DEATH.items() if k not in os.environ})
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    head = {"num_cpus": head_cpus, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    head["resources"] = {HEAD: 1}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        made = Fleet(cluster, {"num_cpus": cpus, "num_gpus": gpus})
        for _ in range(nodes):
            made.add_node()
        cluster.wait_for_nodes()
        environment = {"env_vars": {"PYTHONPATH": path}}
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40, runtime_env=environment)
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
        yield made
    finally:
        _end(cluster)


def _end(cluster: Any) -> None:
    """Ends all processes, without Serve's farewell: it waits half a minute for a replica that is just starting."""
    import psutil
    import ray

    raylets = [p.process.pid for node in cluster.list_all_nodes() for p in node.all_processes.get("raylet", [])]
    workers = [p for pid in raylets if psutil.pid_exists(pid) for p in psutil.Process(pid).children(recursive=True)]
    ray.shutdown()
    cluster.shutdown()
    for process in psutil.wait_procs(workers, timeout=3)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(workers, timeout=10)


@dataclass(frozen=True)
class Sample:
    """One request: when it began and how long it took, how it ended, and the node whose chunks came last.

    began: by time.monotonic(); at_s: the same, from the beginning of the load.
    kind: ok, error_event (a stream that ended aloud), silent (one that ended without its mark), http_NNN, or the name
    of the client's exception.
    """

    began: float
    at_s: float
    seconds: float
    kind: str
    node: str | None
    first_s: float | None


def _kind(text: str) -> str:
    return "error_event" if '"error"' in text else "ok" if text.rstrip().endswith("data: [DONE]") else "silent"


def _node(text: str) -> str | None:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return next((found["node"] for e in reversed(events) if "node" in (found := json.loads(e))), None)


async def over_http(client: Any, url: str, body: dict[str, Any], begin_s: float) -> Sample:
    """One streamed completion."""
    import httpx

    at, text, first, kind = time.monotonic(), "", None, ""
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for part in response.aiter_text():
                first = time.monotonic() - begin_s if first is None else first
                text += part
            kind = _kind(text) if response.status_code == 200 else f"http_{response.status_code}"
    except httpx.HTTPError as error:
        kind = type(error).__name__
    return Sample(at, at - begin_s, time.monotonic() - at, kind, _node(text), first)


async def drive(
    seconds: float,
    rate_per_s: float,
    send: Callable[[int, float], Any],
    events: Sequence[tuple[float, Callable[[], Any]]] = (),
    patience_s: float = 60.0,
) -> tuple[list[Sample], float]:
    """Open-loop load: `send(i, begin)` `rate_per_s` times a second; `events` are (second, what to do in a thread).

    (samples, moment the load began). Requests not done after `patience_s` are cancelled and not in the samples.
    """
    begin = time.monotonic()
    tasks, todo, acts = [], sorted(events, key=lambda e: e[0]), []
    for i in range(int(seconds * rate_per_s)):
        await asyncio.sleep(max(0.0, begin + i / rate_per_s - time.monotonic()))
        while todo and time.monotonic() - begin >= todo[0][0]:
            acts.append(asyncio.create_task(asyncio.to_thread(todo.pop(0)[1])))
        tasks.append(asyncio.create_task(send(i, begin)))
    await asyncio.gather(*acts)
    done, late = await asyncio.wait(tasks, timeout=patience_s)
    for task in late:
        task.cancel()
    return [task.result() for task in done], begin


def drive_http(
    url: str,
    seconds: float,
    rate_per_s: float,
    pick: Callable[[int], str],
    events: Sequence[tuple[float, Callable[[], Any]]] = (),
    body: dict[str, Any] | None = None,
) -> list[Sample]:
    """`drive` with streamed completions of model `pick(i)`."""
    import httpx

    async def run() -> list[Sample]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            more = body or {}
            send = lambda i, begin: over_http(client, url, {**more, "model": pick(i), "stream": True}, begin)  # noqa: E731
            return (await drive(seconds, rate_per_s, send, events))[0]

    return asyncio.run(run())


def kinds(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(Counter(s.kind for s in samples))


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    """True as soon as `what()` holds; False after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.3)
    return what()
