"""The only module that uses alpha or internal names of Ray. Checked against ray 2.60.0.

`check_hooks` imports every name listed in HOOKS and tells all that are missing at once; `up` and a test call it.
Names of ray.serve.llm import vLLM, so this module imports them when somebody asks for them.
"""

import asyncio
import contextlib
import functools
import importlib
import inspect
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions, serve
from ray._private import worker as _worker
from ray._private.services import canonicalize_bootstrap_address
from ray.serve._private.common import RequestRoutingInfo
from ray.serve._private.constants import SERVE_DEPLOYMENT_ACTOR_PREFIX, SERVE_NAMESPACE
from ray.serve.config import AutoscalingContext, DeploymentActorConfig, RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.util import metrics

from flora_vllm.cluster.streams import LostError
from flora_vllm.errors import HookError

if TYPE_CHECKING:
    from flora_vllm.cluster.messages import CatalogueNews, Orders, Report

__all__ = [
    "AutoscalingContext",
    "ControllerMetrics",
    "DeploymentActorConfig",
    "PendingRequest",
    "RequestRouter",
    "RequestRouterConfig",
    "RunningReplica",
    "ask_replicas",
    "call_controller",
    "check_hooks",
    "controller_link",
    "controller_names",
    "find_controller",
    "find_local_ray",
    "logs_directory",
    "more_endpoints",
    "own_controller",
    "redirect_llm_logs",
    "replica_identity",
    "serve_address",
    "tell_routers",
    "until_lost",
]

_logger = logging.getLogger("ray.serve")
CONTROLLER = "flora_placement"

# (module, attribute path, parameters that must be there, what for)
HOOKS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("ray._private.services", "canonicalize_bootstrap_address", ("addr",), "a cluster of this machine"),
    ("ray._private.worker", "_global_node", (), "where logs are"),
    ("ray.serve", "get_deployment_actor", ("actor_name",), "a replica finds the controller"),
    ("ray.serve.request_router", "RequestRouter.choose_replicas", ("candidate_replicas", "pending_request"), "routing"),
    ("ray.serve.request_router", "RequestRouter.update_replicas", ("replicas",), "routing"),
    ("ray.serve.request_router", "RequestRouter.replica_queue_len_cache", (), "queues as the router knows them"),
    ("ray.serve.request_router", "RunningReplica.multiplexed_model_ids", (), "what is in memory where"),
    ("ray.serve._private.common", "RequestRoutingInfo", ("replica_id", "multiplexed_model_ids"), "tell the routers"),
    ("ray.serve._private.client", "ServeControllerClient.record_request_routing_info", ("info",), "tell the routers"),
    ("ray.serve._private.client", "ServeControllerClient.http_config", (), "where Serve listens"),
    ("ray.serve.exceptions", "DeploymentUnavailableError", (), "retry"),
    ("ray.serve.handle", "DeploymentHandle.broadcast", ("method_name",), "all replicas' metrics"),
    ("ray.serve.handle", "DeploymentBroadcastResponse.results_async", ("timeout_s", "return_exceptions"), "the same"),
    ("ray.serve.config", "DeploymentActorConfig", ("name", "actor_class", "init_kwargs"), "the controller"),
    ("ray.serve.config", "AutoscalingContext.total_num_requests", (), "scaling by requests"),
    ("ray.serve.config", "AutoscalingContext.aggregated_metrics", (), "scaling by adapters"),
)
LLM_HOOKS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("ray.serve.llm", "build_openai_app", ("llm_serving_args",), "the application"),
    ("ray.serve.llm.deployment", "LLMServer.__init__", ("llm_config",), "our server"),
    ("ray.serve.llm.deployment", "LLMServer._maybe_resolve_lora_from_multiplex", (), "we resolve adapters"),
    ("ray.serve.llm.deployment", "LLMServer._init_multiplex_loader", (), "we load adapters"),
    ("ray.serve.llm.ingress", "OpenAiIngress._get_response", ("body", "call_method", "raw_request"), "retry, errors"),
    ("ray.llm._internal.serve.core.ingress.ingress", "DEFAULT_ENDPOINTS", (), "routes of our own"),
    ("ray.serve.llm.ingress", "OpenAiIngress.models", (), "the catalogue in /v1/models"),
    ("ray.llm._internal.serve.observability", "setup_observability", (), "it takes the root logger when imported"),
    ("ray.llm._internal.serve.core.protocol", "RawRequestInfo.from_starlette_request", ("request",), "headers"),
    ("ray.llm._internal.serve.core.ingress.utils", "_sanitize_chat_completion_request", ("request",), "pickling"),
    ("ray.llm._internal.serve.core.configs.openai_api_models", "ErrorResponse", ("error",), "errors as answers"),
    ("ray.llm._internal.serve.core.configs.openai_api_models", "OpenAIHTTPException", ("status_code",), "HTTP errors"),
    ("ray.llm._internal.serve.utils.server_utils", "get_response_for_error", ("e", "request_id"), "what failed"),
    ("ray.llm._internal.common.callbacks.base", "CallbackBase.on_before_node_init", (), "no download task"),
)


# Names of ray.serve.llm that other modules import from here.
_LLM_NAMES = {
    "CallbackBase": "ray.llm._internal.common.callbacks.base",
    "ErrorInfo": "ray.llm._internal.serve.core.configs.openai_api_models",
    "ErrorResponse": "ray.llm._internal.serve.core.configs.openai_api_models",
    "LLMConfig": "ray.serve.llm",
    "LLMServer": "ray.serve.llm.deployment",
    "ModelCard": "ray.llm._internal.serve.core.configs.openai_api_models",
    "ModelList": "ray.llm._internal.serve.core.configs.openai_api_models",
    "OpenAIHTTPException": "ray.llm._internal.serve.core.configs.openai_api_models",
    "OpenAiIngress": "ray.serve.llm.ingress",
    "RawRequestInfo": "ray.llm._internal.serve.core.protocol",
    "build_openai_app": "ray.serve.llm",
    "get_response_for_error": "ray.llm._internal.serve.utils.server_utils",
    "_sanitize_chat_completion_request": "ray.llm._internal.serve.core.ingress.utils",
}


def __getattr__(name: str) -> Any:
    if name not in _LLM_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LLM_NAMES[name]), name)


def check_hooks(with_llm: bool = True) -> None:
    """Raises HookError naming every name of Ray that is missing or takes other arguments."""
    faults = []
    for module, path, parameters, purpose in (*HOOKS, *(LLM_HOOKS if with_llm else ())):
        try:
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
            known = set(inspect.signature(found).parameters) if parameters else set()
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            faults.append(f"{module}.{path} (for {purpose}): {error}")
            continue
        faults += [f"{module}.{path} (for {purpose}) has no {p!r}" for p in parameters if p not in known]
    if faults:
        raise HookError(f"ray {ray.__version__} is not the Ray we checked:\n" + "\n".join(f"  - {f}" for f in faults))


def find_local_ray() -> str:
    """host:port of the Ray that runs on this machine, or ran here last. Raises ConnectionError if there was none."""
    found = canonicalize_bootstrap_address("auto")
    assert found is not None, 'Ray answers "auto" with an address or an error'
    return found


def replica_identity() -> tuple[str, str]:
    """(replica id, node id) of the Serve replica this runs in."""
    return serve.get_replica_context().replica_id.unique_id, ray.get_runtime_context().get_node_id()


def serve_address() -> tuple[str | None, int]:
    """Host and port of the Serve that runs on the connected Ray; no host if it takes no HTTP."""
    client = _get_global_client()
    assert client is not None, "Serve was started"
    return client.http_config.host, client.http_config.port


def logs_directory() -> Path | None:
    """Where the Ray of this machine writes its logs; None if the connected Ray has no node here."""
    node = _worker._global_node
    return None if node is None else Path(node.get_logs_dir_path())


def redirect_llm_logs(handler: logging.Handler) -> None:
    """Gives this process's log messages to `handler`, also those of ray.serve.llm and of vLLM inside it.

    Ray's LLM stack, when it is first imported, makes the root logger write JSON to stderr.
    """
    importlib.import_module("ray.llm._internal.serve.observability")
    logging.getLogger().handlers = [handler]


def tell_routers(adapter_ids: list[str]) -> None:
    """Announces what this replica has in memory to every router, the way serve.multiplexed does."""
    info = RequestRoutingInfo(
        replica_id=serve.get_replica_context().replica_id, multiplexed_model_ids=list(adapter_ids)
    )
    client = _get_global_client()
    if client is not None:
        client.record_request_routing_info(info)


async def call_controller(actor: Any, method: str, *args: Any, timeout_s: float = 10.0) -> Any:
    """Awaits a method of the controller. Raises ConnectionError if the actor is gone."""
    try:
        return await asyncio.wait_for(getattr(actor, method).remote(*args), timeout_s)
    except exceptions.RayTaskError:
        raise
    except exceptions.RayError as error:
        raise ConnectionError(f"the placement controller is gone: {error}") from error


class _ControllerLink:
    """Keeps a handle and looks for the actor again after it went away. `find` raises ValueError while there is none."""

    def __init__(self, find: Any) -> None:
        self._find, self._actor = find, None

    async def _call(self, method: str, *args: Any) -> Any:
        if self._actor is None:
            try:
                self._actor = self._find()
            except ValueError as error:
                raise ConnectionError(f"there is no placement controller now: {error}") from error
        try:
            return await call_controller(self._actor, method, *args)
        except exceptions.RayTaskError as error:
            # It may be replaced soon; who asks has to go on until then.
            raise ConnectionError(f"the placement controller failed: {error}") from error
        except (ConnectionError, TimeoutError):
            self._actor = None
            raise

    async def sync(self, report: "Report") -> "Orders":
        return await self._call("sync", report)

    async def news(self, born: str, number: int) -> "CatalogueNews":
        return await self._call("news", born, number)

    async def rescan(self, born: str, number: int) -> "CatalogueNews":
        return await self._call("rescan", born, number)

    async def leave(self, replica: str) -> None:
        await self._call("leave", replica)


def own_controller() -> _ControllerLink:
    """The controller of the deployment whose replica asks."""
    return _ControllerLink(lambda: serve.get_deployment_actor(CONTROLLER))


def controller_names(app: str) -> dict[str, str]:
    """Deployment name -> actor name of its controller, for one application."""
    prefix, suffix = f"{SERVE_DEPLOYMENT_ACTOR_PREFIX}{app}::", f"::{CONTROLLER}"
    found = {}
    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    for actor in actors:
        name = actor["name"]
        if actor["namespace"] == SERVE_NAMESPACE and name.startswith(prefix) and name.endswith(suffix):
            found[name[len(prefix) : -len(suffix)].rsplit("::", 1)[0]] = name
    return found


def find_controller(app: str, deployment: str) -> Any:
    """The controller of any deployment. Raises ValueError while there is none."""
    names = controller_names(app)
    if deployment not in names:
        raise ValueError(f"no {CONTROLLER} for deployment {deployment} of application {app}")
    return ray.get_actor(names[deployment], namespace=SERVE_NAMESPACE)


def controller_link(app: str, deployment: str) -> _ControllerLink:
    return _ControllerLink(lambda: find_controller(app, deployment))


async def ask_replicas(handle: Any, method: str, timeout_s: float) -> list[Any]:
    """What a method of every replica behind a handle answers, of those that do in time."""
    try:
        found = await handle.broadcast(method).results_async(timeout_s=timeout_s, return_exceptions=True)
    except (exceptions.RayError, DeploymentUnavailableError, TimeoutError) as error:
        _logger.info("replicas do not answer: %s", error)
        return []
    for error in (one for one in found if isinstance(one, BaseException)):
        _logger.info("a replica does not answer: %s", error)
    return [one for one in found if not isinstance(one, BaseException)]


@contextlib.contextmanager
def more_endpoints(routes: Mapping[str, str], answers: Mapping[Any, Any]) -> Iterator[None]:
    """Ingresses built within answer GET at these routes, too. `routes`: method of the ingress class -> path.

    `answers`: class of exceptions -> what answers them in place of Ray.
    """
    there = importlib.import_module("ray.llm._internal.serve.core.ingress.ingress").DEFAULT_ENDPOINTS
    before = dict(there)
    there.update({method: functools.partial(_get, path, answers) for method, path in routes.items()})
    try:
        yield
    finally:
        there.clear()
        there.update(before)


def _get(path: str, answers: Mapping[Any, Any], app: Any) -> Any:
    for kind, answer in answers.items():
        app.add_exception_handler(kind, answer)
    return app.get(path)


async def until_lost(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The chunks of a handle's response; a replica that went away, or broke the answer off, shows as LostError."""
    has_begun = False
    try:
        async for chunk in chunks:
            has_begun = True
            yield chunk
    except exceptions.RayTaskError as error:
        # Code in the replica raised. Before the first chunk another replica would only raise it again.
        if not has_begun:
            raise
        raise LostError(_first_line(error)) from error
    except (exceptions.RayError, DeploymentUnavailableError) as error:
        raise LostError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'replica gone'}"


class ControllerMetrics:
    """What the controller shows on Ray's metrics endpoint."""

    def __init__(self, model: str) -> None:
        tags = {"model": model}
        self._gauges = {
            name: metrics.Gauge(f"flora_cluster_{name}", description=text, tag_keys=("model",))
            for name, text in (
                ("copies", "planned adapter copies"),
                ("adapters", "adapters in the catalogue"),
                ("replicas", "replicas that report"),
                ("plan_ms", "time of the last plan in milliseconds"),
                ("short", "adapters without their minimum copies or without a place"),
            )
        }
        self._moves = metrics.Counter(
            "flora_cluster_moves", description="adapter loads asked for by plans", tag_keys=("model",)
        )
        for metric in (*self._gauges.values(), self._moves):
            metric.set_default_tags(tags)

    def record(self, *, moves: int, **gauges: float) -> None:
        for name, value in gauges.items():
            self._gauges[name].set(value)
        if moves:
            self._moves.inc(moves)
