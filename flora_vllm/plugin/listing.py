"""What operators see of a server's adapters: `GET /v1/flora/adapters`, and series at /metrics.

The engine is asked on demand (loads.py), one question at a time and for scrapes at most one a second; it answers
between steps, and nobody waits for it longer than WAIT_S. The series (series.py) are added to what vLLM answers at
/metrics, so they are the same whichever of several server processes does, and none is left over from an adapter that is
gone.
"""

import asyncio
import functools
import importlib
import logging
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from flora_vllm.plugin.access import CURRENT, NOBODY, OPERATOR
from flora_vllm.plugin.answers import error_answer
from flora_vllm.plugin.identity import split_identity
from flora_vllm.plugin.loads import REPORT
from flora_vllm.plugin.options import options_of_engine
from flora_vllm.plugin.routes import path_of
from flora_vllm.plugin.series import exposition, traffic_exposition
from flora_vllm.plugin.traffic import MOST_NAMED, PUBLISHED, TRAFFIC

logger = logging.getLogger(__name__)

ROUTE = "/v1/flora/adapters"
METRICS = "/metrics"
WAIT_S = 5.0
_FRESH_S = 1.0
# The series of vLLM's that names the adapters of all.
_NAMING = b"vllm:lora_requests_info"
# Place in the engine -> what the route calls it: in a slot, or in host memory only.
_STATES = {"gpu": "resident", "cpu": "host"}


class Reports:
    """What the engine said last. `most`: how many adapters it names; None: all."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._asking: asyncio.Future[Any] | None = None
        self._said: Mapping[str, Any] | None = None
        self._said_at = 0.0

    async def ask(self, engine: Any, fresh_s: float = 0.0) -> Mapping[str, Any] | None:
        """An answer, of up to `fresh_s` ago if there is one; the last one if the engine takes too long; None: none yet.

        Raises what the engine raises.
        """
        if self._said is not None and time.monotonic() - self._said_at < fresh_s:
            return self._said
        asking = self._asking
        if asking is None or asking.done():
            asking = self._asking = asyncio.ensure_future(engine.engine_core.call_utility_async(REPORT, self._most))
            asking.add_done_callback(self._hear)
        await asyncio.wait({asking}, timeout=WAIT_S)
        return asking.result() if asking.done() else self._said

    def _hear(self, asking: Any) -> None:
        """Also of an answer that nobody waits for any more."""
        if not asking.cancelled() and asking.exception() is None:
            self._said, self._said_at = asking.result(), time.monotonic()


def attach(app: Any) -> None:
    """Give a server's app the route and the series."""
    PUBLISHED.begin()
    reports = Reports(None)

    async def adapters(request: Any) -> Any:
        responses = importlib.import_module("starlette.responses")
        state = request.app.state
        engine = getattr(state, "engine_client", None)
        report = None if engine is None else await reports.ask(engine)
        if report is None:
            late = f"the engine did not answer within {WAIT_S:.0f} s; ask again"
            message = "this server has no engine" if engine is None else late
            again_s = None if engine is None else WAIT_S
            return error_answer(message, HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=again_s)
        return responses.JSONResponse({"object": "list", "data": entries(state, report)})

    app.router.add_route(ROUTE, adapters, methods=["GET"])
    app.add_middleware(AddedMetrics)


def entries(state: Any, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each adapter that the present request's tenant may use, by name."""
    there = {adapter["id"]: adapter for adapter in report["adapters"]}
    found = []
    for name, request in sorted(_table(state).items()):
        adapter = there.get(request.lora_int_id, {})
        found.append(
            {
                "name": name,
                "state": _STATES[adapter["level"]] if adapter else "registered",
                "digest": split_identity(request.lora_name)[1],
                **{key: adapter.get(key) for key in ("family", "rank", "bytes", "pinned", "last_used")},
            }
        )
    return found


def _table(state: Any) -> Mapping[str, Any]:
    """Adapter name -> the server's LoRARequest, of what the present request may see."""
    serving = getattr(state, "openai_serving_models", None)
    return {} if serving is None else serving.lora_requests


class AddedMetrics:
    """ASGI middleware: appends our series to a text answer at /metrics."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._reports = Reports(MOST_NAMED)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        engine = getattr(scope["app"].state, "engine_client", None) if scope["type"] == "http" else None
        # What is there answers every method, and every path that begins so.
        if engine is None or not path_of(scope).startswith(METRICS):
            await self._app(scope, receive, send)
            return
        text = await self._text(scope["app"].state, engine)
        # Plain text can be added to; what Prometheus would rather have (OpenMetrics, gzip) has an end of its own.
        headers = [(k, v) for k, v in scope["headers"] if k not in (b"accept", b"accept-encoding")]
        messages: list[dict[str, Any]] = []

        async def keep(message: dict[str, Any]) -> None:
            messages.append(message)

        await self._app({**scope, "headers": headers}, receive, keep)
        start, *parts = messages
        body = b"".join(part.get("body", b"") for part in parts)
        if start["status"] == 200:
            if not _sees_all(engine):
                body = b"".join(line for line in body.splitlines(keepends=True) if not line.startswith(_NAMING))
            body += text
        kept = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
        await send({**start, "headers": [*kept, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})

    async def _text(self, state: Any, engine: Any) -> bytes:
        table: Any = _table(state)
        may_see = None if _sees_all(engine) else table.__contains__
        return await added(self._reports, engine, _names(state), functools.partial(dict.__contains__, table), may_see)


async def added(
    reports: Reports,
    engine: Any,
    names: Mapping[int, str],
    is_there: Callable[[str], bool],
    may_see: Callable[[str], bool] | None = None,
) -> bytes:
    """Our series of an engine. `names`: the engine's id -> name; `is_there`: of names; `may_see`: see series.py."""
    TRAFFIC.forget_all_but(is_there)
    text = traffic_exposition(PUBLISHED.values(), may_see)
    try:
        report = await reports.ask(engine, _FRESH_S)
    except Exception as error:  # noqa: BLE001 - a dead engine's metrics are still worth a scrape
        logger.warning("the engine does not tell its adapters: %s", error)
        return text
    return text if report is None else text + exposition(report, names)


def _sees_all(engine: Any) -> bool:
    """Who needs no key to scrape sees what vLLM's own series tell everybody; with an ACL everybody needs one."""
    options = options_of_engine(engine)
    has_tenants = options is not None and options.adapter_acl is not None
    return CURRENT.get() is OPERATOR or (CURRENT.get() is NOBODY and not has_tenants)


def _names(state: Any) -> dict[int, str]:
    """Engine's id -> name, of what the present request may see."""
    token = CURRENT.set(OPERATOR if _sees_all(getattr(state, "engine_client", None)) else CURRENT.get())
    try:
        return {request.lora_int_id: name for name, request in _table(state).items()}
    finally:
        CURRENT.reset(token)
