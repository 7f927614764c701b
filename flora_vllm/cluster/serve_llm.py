"""Server and ingress for ray.serve.llm: its engine and endpoints, our adapters. Importing it imports vLLM."""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError
from starlette.responses import JSONResponse, Response

from flora_vllm.cluster.ingress import Directory, Target, UnknownModelError, answer
from flora_vllm.cluster.memory import RETRY_S
from flora_vllm.cluster.merged import MergedMetrics, merged_adapters
from flora_vllm.cluster.ray_hooks import (
    CallbackBase,
    ErrorInfo,
    ErrorResponse,
    LLMServer,
    ModelCard,
    ModelList,
    OpenAIHTTPException,
    OpenAiIngress,
    RawRequestInfo,
    _sanitize_chat_completion_request,
    ask_replicas,
    get_response_for_error,
)
from flora_vllm.cluster.refusals import FAILED, REFUSALS, UNREACHED, refusal_of
from flora_vllm.cluster.replica import ReplicaRuntime
from flora_vllm.cluster.store import Entry
from flora_vllm.cluster.streams import LostError
from flora_vllm.cluster.vllm_engine import VllmEngineAdapters
from flora_vllm.errors import ConfigError, bounded

log = logging.getLogger("ray.serve")

# Key of our settings among LLMConfig.experimental_configs.
SETTINGS = "flora_cluster"
# Of the ingress, beside those of ray.serve.llm: method -> route.
ROUTES = {"metrics": "/metrics", "adapters": "/v1/flora/adapters"}
# A replica that takes longer is not waited for: it waits for its engine for 5 s, and Prometheus for a scrape for 10.
WAIT_S = 8.0
# What may be answered otherwise once adapters have come and gone, and not before a replica tries again.
_LATER = (429, 503)


class LocalModel(CallbackBase):
    """Skips Ray's download task where the base model is a directory: it would load vLLM once more for nothing."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


def _refusal(error: Exception, adapter: Entry) -> Any:
    status, message = refusal_of(error, adapter)
    return ErrorResponse(error=ErrorInfo(message=message, type=type(error).__name__, code=status))


async def _answer_refused(_request: Any, error: Any) -> Response:
    """As vLLM's server answers; Ray's own handler adds the exception's text and class, twice."""
    code = int(error.status_code)
    content = {"message": bounded(error.message), "type": error.type, "param": None, "code": code}
    headers = {"Retry-After": str(math.ceil(RETRY_S))} if code in _LATER else None
    return JSONResponse({"error": content}, code, headers)


async def _answer_failed(request: Any, error: Any) -> Response:
    """What a replica raised, which Ray's own function logs and gives a status."""
    code = get_response_for_error(error, "").error.code
    if code < 500:
        return await _answer_refused(request, OpenAIHTTPException(code, str(error.cause), "BadRequestError"))
    return await _answer_refused(request, OpenAIHTTPException(code, FAILED, "InternalServerError"))


ANSWERS = {OpenAIHTTPException: _answer_refused, RayTaskError: _answer_failed}


class FloraLLMServer(LLMServer):
    """A replica: ray.serve.llm's engine, with adapters held by AdapterMemory and placed by the controller."""

    async def __init__(self, llm_config: Any, **options: Any) -> None:
        settings = llm_config.experimental_configs[SETTINGS]
        source = settings["model"]["source"]
        if Path(source).is_absolute() and not Path(source).is_dir():
            raise ConfigError(f"model {settings['model']['name']}: {source} is not a directory on this node")
        await super().__init__(llm_config, **options)
        self._adapters = VllmEngineAdapters(self.engine)
        self._runtime = ReplicaRuntime(settings, self._adapters, self._adapters.is_dead)
        await self._runtime.start()

    def _init_multiplex_loader(self, model_downloader_cls: Any = None) -> None:
        """Ray's loader never unloads and keeps its own eviction order; ours is AdapterMemory."""

    async def _maybe_resolve_lora_from_multiplex(self) -> None:
        """Done by `_with_adapter`, which also holds the adapter while the request runs."""

    async def _with_adapter(self, method: Any, request: Any, raw: Any, adapter: Entry | None) -> AsyncIterator[Any]:
        """The method's chunks while the adapter is held; one ErrorResponse if it cannot be had."""
        async with contextlib.AsyncExitStack() as held:
            is_first = True
            try:
                if adapter is not None:
                    try:
                        await held.enter_async_context(self._runtime.memory.using(adapter))
                    except REFUSALS as error:
                        yield _refusal(error, adapter)
                        return
                async for chunk in await method(request, raw):
                    if is_first:
                        self._runtime.agent.exit_if_dead()
                        is_first = False
                    yield chunk
            except Exception:
                # A dead engine fails every request at once: without its replica the ingress tries another one.
                self._runtime.agent.exit_if_dead()
                raise

    async def chat(self, request: Any, raw_request_info: Any = None, adapter: Entry | None = None) -> Any:
        return self._with_adapter(super().chat, request, raw_request_info, adapter)

    async def completions(self, request: Any, raw_request_info: Any = None, adapter: Entry | None = None) -> Any:
        return self._with_adapter(super().completions, request, raw_request_info, adapter)

    async def embeddings(self, request: Any, raw_request_info: Any = None, adapter: Entry | None = None) -> Any:
        return self._with_adapter(super().embeddings, request, raw_request_info, adapter)

    async def transcriptions(self, request: Any, raw_request_info: Any = None, adapter: Entry | None = None) -> Any:
        return self._with_adapter(super().transcriptions, request, raw_request_info, adapter)

    async def score(self, request: Any, raw_request_info: Any = None, adapter: Entry | None = None) -> Any:
        return self._with_adapter(super().score, request, raw_request_info, adapter)

    async def tokenize(self, request: Any, raw_request_info: Any = None, adapter: Entry | None = None) -> Any:
        return self._with_adapter(super().tokenize, request, raw_request_info, adapter)

    async def detokenize(self, request: Any, raw_request_info: Any = None, adapter: Entry | None = None) -> Any:
        return self._with_adapter(super().detokenize, request, raw_request_info, adapter)

    async def flora_metrics(self) -> tuple[str, str]:
        """(this replica, its series)."""
        return self._runtime.replica, await self._adapters.metrics()

    async def flora_adapters(self) -> tuple[str, list[dict[str, Any]]]:
        """(this replica, its adapters)."""
        return self._runtime.replica, await self._adapters.adapters()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook for custom scaling signals."""
        return self._runtime.signals()

    async def __del__(self) -> None:
        """Serve calls and awaits it when the replica stops on purpose."""
        if hasattr(self, "_runtime"):
            await self._runtime.stop()
        await super().__del__()


def _unreached(error: LostError) -> Exception:
    log.warning("no replica could serve a request: %s", error)
    return OpenAIHTTPException(503, UNREACHED, "Unavailable")


class FloraIngress(OpenAiIngress):
    """ray.serve.llm's endpoints; adapters by plain name, retry before the first byte, no silent end after it."""

    def __init__(
        self,
        llm_deployments: Mapping[str, Any],
        model_cards: Mapping[str, Any],
        *,
        lora_paths: Mapping[str, str] | None = None,
        retry_s: float = 60.0,
        refresh_s: float = 2.0,
    ) -> None:
        super().__init__(dict(llm_deployments), dict(model_cards), lora_paths=dict(lora_paths or {}))
        self._cards = dict(model_cards)
        self._handles, self._refresh_s, self._retry_s = dict(llm_deployments), refresh_s, retry_s
        self._directory: Directory | None = None
        self._merged = MergedMetrics()
        self._scrape: asyncio.Task[bytes] | None = None

    def _names(self) -> Directory:
        # Not in the constructor: it needs the event loop that serves requests.
        if self._directory is None:
            self._directory = Directory(self._handles, self._refresh_s)
        return self._directory

    async def _get_response(self, *, body: Any, call_method: str, raw_request: Any = None) -> AsyncIterator[Any]:
        """The one way of every endpoint to a replica."""
        if hasattr(body, "messages"):
            body = _sanitize_chat_completion_request(body)
        raw = None if raw_request is None else RawRequestInfo.from_starlette_request(raw_request)

        def call(handle: Any, target: Target) -> AsyncIterator[Any]:
            model = target.base if target.adapter is None else target.adapter.id
            request = body.model_copy(update={"model": model})
            return getattr(handle, call_method).remote(request, raw, target.adapter)

        def refusal(chunk: Any) -> int | None:
            # Streams come in lists of what was ready together.
            first: Any = chunk[0] if isinstance(chunk, list) and chunk else chunk
            return first.error.code if isinstance(first, ErrorResponse) else None

        try:
            async for chunk in answer(self._names(), body.model, call, refusal, self._retry_s):
                yield chunk
        except UnknownModelError as error:
            raise OpenAIHTTPException(404, str(error.args[0]), "NotFoundError") from error
        except LostError as error:
            raise _unreached(error) from error

    async def model(self, model_id: str) -> Any:
        if model_id in self._cards:
            return self._cards[model_id]
        try:
            target = await self._names().find(model_id)
        except UnknownModelError as error:
            raise OpenAIHTTPException(404, str(error.args[0]), "NotFoundError") from error
        except LostError as error:
            raise _unreached(error) from error
        assert target.adapter is not None, "base models are answered above"
        return self._card(model_id, target.base, target.adapter)

    def _card(self, name: str, base: str, adapter: Entry) -> Any:
        metadata = {"parent": base, "version": adapter.version, "bytes": adapter.nbytes}
        return ModelCard(id=name, object="model", owned_by="flora-vllm", permission=[], metadata=metadata)

    async def models(self) -> Any:
        listing = await self._names().listing()
        return ModelList(data=[*self._cards.values(), *(self._card(*row) for row in listing)])

    async def _ask_replicas(self, method: str) -> list[tuple[str, str, Any]]:
        """(base model, replica, what its method answers) of every replica that answers."""
        answers = await asyncio.gather(*(ask_replicas(handle, method, WAIT_S) for handle in self._handles.values()))
        return [(base, *answer) for base, found in zip(self._handles, answers, strict=True) for answer in found]

    async def metrics(self) -> Response:
        """All replicas' series as one."""
        # One question at a time: an older answer that came after a newer one would look like a replica's new begin.
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.ensure_future(self._merge())
        return Response(await asyncio.shield(self._scrape), media_type="text/plain; version=0.0.4")

    async def _merge(self) -> bytes:
        # Not in the loop that relays streams: many replicas' texts take long to parse.
        return await asyncio.to_thread(self._merged.merge, await self._ask_replicas("flora_metrics"))

    async def adapters(self) -> dict[str, Any]:
        """All replicas' adapters as one list."""
        listing, answers = await asyncio.gather(self._names().listing(), self._ask_replicas("flora_adapters"))
        return {"object": "list", "data": merged_adapters(listing, answers)}
