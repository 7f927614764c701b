"""Bringing a cluster up, looking at it, taking it down: the work behind `flora-vllm cluster`, usable from Python."""

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flora_vllm.cluster.app import build_app
from flora_vllm.cluster.config import ClusterConfig
from flora_vllm.errors import ClusterError, ConfigError

log = logging.getLogger(__name__)

# A local Ray holds requests and answers only; its default would reserve a third of the memory.
OBJECT_STORE_BYTES = 256 * 2**20
REACH_S = 10.0
# How long an `up` keeps its Ray after its application: `down` watches the end through it, and hangs for a minute if the
# answer never comes.
FAREWELL_S = 5.0


def cpus_needed(config: ClusterConfig) -> int:
    """Logical CPUs for all replicas and ingresses at their largest number."""
    engines = sum((m.autoscale.max_replicas if m.autoscale else m.replicas) * m.cpus for m in config.models)
    return math.ceil(engines + config.ingress.replicas * config.ingress.cpus)


def lacks(config: ClusterConfig) -> str | None:
    """Why the replicas asked for at the start cannot all run on the connected Ray now; None if they can."""
    import ray

    replicas = {m.name: m.autoscale.min_replicas if m.autoscale else m.replicas for m in config.models}
    gpus = sum(replicas[m.name] * m.tensor_parallel * m.pipeline_parallel for m in config.models if m.device == "gpu")
    cpus = sum(replicas[m.name] * m.cpus for m in config.models) + config.ingress.replicas * config.ingress.cpus
    there = ray.cluster_resources()
    short = [
        f"{needed:g} {what}s are needed and {there.get(what, 0):g} are there"
        for what, needed in (("GPU", gpus), ("CPU", cpus))
        if there.get(what, 0) < needed
    ]
    return "; ".join(short) or None


def connect(address: str | None, config: ClusterConfig | None = None) -> bool:
    """Connects to a running Ray, or starts one here if `address` is None; True if it was started.

    Raises ClusterError if there is no Ray at `address`.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return False
    if address is not None:
        try:
            _check_reachable(_find(address))
            # Not what was found: only a cluster that Ray itself finds gets this user's token shown.
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(f"no Ray cluster at {address}: {error}") from error
        return False
    needed = cpus_needed(config) if config is not None else 1
    # Without an address Ray would look for one in RAY_ADDRESS and in what the last cluster here left behind.
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, needed),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    short = None if config is None else lacks(config)
    if short is not None:
        ray.shutdown()
        raise ClusterError(f"this machine cannot run the configuration: {short}; device: cpu needs no GPU")
    return True


def _find(address: str) -> str:
    """What "auto" stands for: RAY_ADDRESS, or the cluster of this machine. Raises ConnectionError if there is none."""
    from flora_vllm.cluster.ray_hooks import find_local_ray

    return (os.environ.get("RAY_ADDRESS") or find_local_ray()) if address == "auto" else address


def _check_reachable(address: str) -> None:
    """Raises ConnectionError if nobody listens: Ray itself tries for minutes and then ends the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ConnectionError(f"nobody listens at {address} ({error})") from error


def _has_directory(path: str) -> bool:
    return Path(path).is_dir()


def check_sources(config: ClusterConfig) -> list[str]:
    """Warnings for nodes that lack a base model given as a directory. Raises ConfigError if no node has it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [n for n in ray.nodes() if n["Alive"]]
    warnings, probe = [], ray.remote(num_cpus=0)(_has_directory)
    for model in (m for m in config.models if Path(m.source).is_absolute()):
        asked = [
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote(
                model.source
            )
            for n in nodes
        ]
        missing = [n["NodeManagerAddress"] for n, has in zip(nodes, ray.get(asked), strict=True) if not has]
        if len(missing) == len(nodes):
            raise ConfigError(f"model {model.name}: {model.source} is a directory on none of {len(nodes)} nodes")
        if missing:
            warnings.append(f"model {model.name}: {model.source} is missing on {', '.join(missing)}")
    return warnings


def log_to_file() -> Path | None:
    """Sends this process's log messages to a file beside Ray's own logs; their directory, None if it is elsewhere."""
    from flora_vllm.cluster.ray_hooks import logs_directory, redirect_llm_logs

    directory = logs_directory()
    file = os.devnull if directory is None else directory / f"flora-up-{os.getpid()}.log"
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    redirect_llm_logs(handler)
    return directory


def up(config: ClusterConfig, warn: Callable[[str], None] = log.warning) -> None:
    """Deploys on the connected Ray and waits until it serves; `warn` hears at once of what is not as asked.

    Raises ConfigError, or ClusterError with Serve's reason.
    """
    from ray import serve

    from flora_vllm.cluster.ray_hooks import serve_address

    # Serve prints every option of every deployment otherwise.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for warning in check_sources(config):
        warn(warning)
    short = lacks(config)
    if short is not None:
        warn(f"{short}: replicas wait for nodes to join")
    app = build_app(config)
    asked = (config.ingress.host, config.ingress.port)
    serve.start(http_options={"host": asked[0], "port": asked[1]})
    there = serve_address()
    if there != asked:
        raise ClusterError(
            f"Serve runs on this Ray already and listens at {there[0]}:{there[1]}, not at {asked[0]}:{asked[1]}: "
            "write its host and port under `ingress` in the configuration, or end it with `serve shutdown`"
        )
    try:
        serve.run(app, name=config.name, route_prefix="/")
    except RuntimeError as error:
        reasons = _reasons(config.name)
        raise ClusterError(f"the application {config.name} did not come up: {error}\n{reasons}") from error
    for fault in first_faults(config):
        warn(fault)


def _reasons(name: str) -> str:
    """What Serve says of the deployments that are not healthy."""
    from ray import serve

    app = serve.status().applications.get(name)
    if app is None:
        return ""
    lines = [f"{d}: {x.message}" for d, x in app.deployments.items() if x.status != "HEALTHY"]
    return "\n".join(line.strip() for line in [app.message, *lines] if line)


def first_faults(config: ClusterConfig, patience_s: float = 60.0) -> list[str]:
    """What cannot be served as asked, as soon as nothing is under way any more, or after `patience_s`."""
    deadline, faults = time.monotonic() + patience_s, []
    while True:
        try:
            reports = list(status(config.name)["models"].values())
            pending = [f"{r['model']}: {what}" for r in reports for what in r["pending"]]
            missing = {m.name for m in config.models} - {r["model"] for r in reports}
            pending += [f"{name}: no placement controller" for name in sorted(missing)]
            faults = [f"{r['model']}: {what}: {why}" for r in reports for what, why in _all_faults(r)]
        except ClusterError as error:
            pending = [str(error)]
        if not pending or time.monotonic() > deadline:
            return [*faults, *pending]
        time.sleep(0.5)


def _all_faults(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from sorted(report["store_faults"].items())
    yield from sorted(report["faults"].items())


def _controllers(name: str) -> dict[str, Any]:
    from flora_vllm.cluster.ray_hooks import controller_names, find_controller

    return {deployment: find_controller(name, deployment) for deployment in controller_names(name)}


def _ask(actor: Any, method: str, *args: Any) -> Any:
    from flora_vllm.cluster.ray_hooks import call_controller

    try:
        return asyncio.run(call_controller(actor, method, *args))
    except (ConnectionError, TimeoutError) as error:
        raise ClusterError(f"the placement controller does not answer: {error}") from error


def status(name: str) -> dict[str, Any]:
    """Serve's view of the application and each controller's: plain data. Raises ClusterError if there is none."""
    from ray import serve

    app = serve.status().applications.get(name)
    if app is None:
        raise ClusterError(f"no application {name!r} runs on this Ray")
    return {
        "application": name,
        "status": str(app.status.value),
        "message": app.message,
        "deployments": {d: f"{x.status.value} {x.message}".strip() for d, x in app.deployments.items()},
        "models": {d: _ask(actor, "status") for d, actor in _controllers(name).items()},
    }


def explain(name: str, adapter: str) -> list[dict[str, Any]]:
    """Why the adapter is where it is, for each base model that has it; `base:adapter` asks one. Raises ConfigError."""
    found, errors = [], []
    for deployment, actor in _controllers(name).items():
        try:
            found.append({"deployment": deployment, **_ask(actor, "explain", adapter)})
        except ConfigError as error:
            # Ray wraps what the controller raised.
            errors.append(str(getattr(error, "cause", error)))
    if not found:
        raise ConfigError("; ".join(errors) or f"no application {name!r} runs on this Ray")
    return found


def down(name: str) -> None:
    """Stops the application; the Ray cluster stays. Raises ClusterError if it does not run."""
    from ray import serve
    from ray.exceptions import RayActorError

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if name not in serve.status().applications:
        raise ClusterError(f"no application {name!r} runs on this Ray")
    # An `up` that started this Ray ends it FAREWELL_S after the application; on a slow machine Serve may say so later.
    with contextlib.suppress(RayActorError):
        serve.delete(name)


def wait_until_gone(name: str) -> None:
    """Returns when the application was deleted. Raises ClusterError if Ray itself went away."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        while name in serve.status().applications:
            time.sleep(1.0)
        time.sleep(FAREWELL_S)
    except (RayError, RayServeException) as error:
        raise ClusterError(f"Ray or its Serve ended while {name} was served: {error}") from error


def tell_model(report: dict[str, Any]) -> Iterator[str]:
    """One model's status as lines of text."""
    yield (
        f"{report['model']}: {len(report['replicas'])} replicas, {report['adapters']} adapters, "
        f"{report['plans']} plans in {report['uptime_s']:.0f} s (last {report['plan_ms']} ms), {report['moves']} moves"
    )
    for replica, state in report["replicas"].items():
        planned, extra = set(state["wanted"]), sorted(set(state["resident"]) - set(state["wanted"]))
        missing = planned - set(state["resident"])
        names = [f"{i}{' (loading)' if i in missing else ''}" for i in state["wanted"]]
        yield (
            f"  {replica} on {state['node'][:12]}: {len(state['resident'])} of {state['slots']} slots, "
            f"{state['in_use']} requests, {state['loads']} loads{', warming' if state['is_warming'] else ''}"
        )
        yield f"    planned: {', '.join(names) or '-'}"
        yield f"    on demand: {', '.join(extra) or '-'}"
    for what, why in _all_faults(report):
        yield f"  not as asked: {what}: {why}"


def stop_all(name: str) -> None:
    """Ends the application, its engines first, and the Ray that `connect` started."""
    import ray
    from ray.exceptions import RayError

    # A Ray that is already ending has nothing left to stop.
    with contextlib.suppress(ClusterError, RayError):
        down(name)
    ray.shutdown()
