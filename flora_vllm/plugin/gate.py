"""The server's door: which requests need a key, and whose they are.

vLLM's own middleware guards the routes below /v1, /v2, … only. Others load adapters and use them too: `/adapters`,
`/invocations` (SageMaker's), `/tokenize`, `/pooling`, …. Where there are keys, everything that does something needs one
here: every method but GET, HEAD and OPTIONS. Only probes stay open.
"""

import functools
import importlib
import os
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from flora_vllm.errors import ConfigError
from flora_vllm.plugin import listing
from flora_vllm.plugin.access import CURRENT, NOBODY, OPERATOR, SHARE, AccessRules
from flora_vllm.plugin.answers import error_answer
from flora_vllm.plugin.dropped import DroppedField
from flora_vllm.plugin.flags import options_from
from flora_vllm.plugin.media_ids import TenantsMedia
from flora_vllm.plugin.routes import path_of
from flora_vllm.plugin.told import ToldHeaders

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

_READING = ("GET", "HEAD", "OPTIONS")
_GUARDED_READING = ("/v1", "/v2", "/inference", "/cohere", "/adapters", "/invocations")
_PROBES = ("/ping", "/health")
# What keeps out those without the operator's key, in vLLM.
_STOCK = "AuthenticationMiddleware"
_WRAPPED = "_flora_wrapped"
# Names every adapter of every tenant.
_GUARDED_FROM_TENANTS = ("/metrics", "/docs", "/openapi.json", "/server_info", "/kv_event_sources")
# What tenants may do: ask for answers, and load what is theirs. What else there is acts on the engine of all.
_OF_TENANTS = (
    "/v1/", "/v2/", "/cohere/", "/inference/v1/generate", "/tokenize", "/detokenize", "/pooling", "/classify", "/score",
    "/rerank", "/generative_scoring", "/invocations", "/adapters", "/ping",
)  # fmt: skip
_OF_OPERATORS = ("/server_info", "/kv_event_sources")


def install() -> None:
    """Wraps the function that gives the server's app its middleware."""
    launcher: Any = importlib.import_module("vllm.entrypoints.launchers.app")
    original = launcher.init_entrypoints_middleware
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def init_entrypoints_middleware(args: Any, app: Any, supported_tasks: Any) -> None:
        original(args, app, supported_tasks)
        options = options_from(args)
        if options is None:
            return
        keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        rules = AccessRules(keys, options.adapter_acl, has_root=options.adapter_root is not None)
        if options.adapter_shares == "key" and not rules.keys().tenants:
            raise ConfigError(
                "adapter_shares (--adapter-shares) key: there are no keys; give --api-key or --adapter-acl"
            )
        if rules.has_tenants:
            # It knows the operator's keys only and would turn tenants away; the gate asks for a key wherever it does.
            app.user_middleware = [layer for layer in app.user_middleware if layer.cls.__name__ != _STOCK]
            app.add_middleware(TenantsMedia)
        listing.attach(app)
        app.add_middleware(ToldHeaders)
        app.add_middleware(DroppedField)
        app.add_middleware(Gate, rules=rules)
        app.add_exception_handler(RecursionError, _refuse_nested)

    setattr(init_entrypoints_middleware, _WRAPPED, original)
    launcher.init_entrypoints_middleware = init_entrypoints_middleware


class Gate:
    """ASGI middleware, the outermost: sets CURRENT for the request, or answers 401."""

    def __init__(self, app: App, rules: AccessRules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        keys, given = self._rules.keys(), _authorization(scope)
        holder = keys.holder(given)
        if holder is None and self._needs_key(scope):
            return await _refuse(scope, receive, send)
        if holder not in (None, OPERATOR) and _is_of_operators(scope):
            return await _forbid(scope, receive, send)
        tokens = CURRENT.set(holder or NOBODY), SHARE.set(keys.share(holder, given))
        try:
            return await self._app(scope, receive, send)
        finally:
            CURRENT.reset(tokens[0])
            SHARE.reset(tokens[1])

    def _needs_key(self, scope: Scope) -> bool:
        path, method = _asked(scope)
        if self._rules.has_tenants and path.startswith(_GUARDED_FROM_TENANTS):
            return True  # by any method: /metrics answers all alike
        if method == "OPTIONS" or path in _PROBES:
            return False
        return method not in _READING or path.startswith(_GUARDED_READING)


def _asked(scope: Scope) -> tuple[str, str]:
    """(path, method)."""
    return path_of(scope), scope.get("method", "WEBSOCKET")


def _is_of_operators(scope: Scope) -> bool:
    path, method = _asked(scope)
    return path.startswith(_OF_OPERATORS) or (method not in _READING and not path.startswith(_OF_TENANTS))


def _authorization(scope: Scope) -> str | None:
    values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    return values[0].decode("latin-1") if len(values) == 1 else None


async def _refuse_nested(_request: Any, _error: RecursionError) -> Any:
    """SageMaker's routes decode a body themselves, without a bound on its depth: a client's fault, not a 500."""
    return error_answer("the request's JSON is nested too deeply")


async def _forbid(scope: Scope, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        return await _refuse(scope, receive, send)
    answer = error_answer("only the operator's key may use this route", HTTPStatus.FORBIDDEN)
    return await answer(scope, receive, send)


async def _refuse(scope: Scope, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    body = b'{"error": "Unauthorized"}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
