"""`POST /v1/load_lora_adapter` with the adapter itself in place of a path: multipart/form-data.

Parts: `lora_name`, `config` (adapter_config.json), `weights` (adapter_model.safetensors), optionally `load_inplace`.
The files become a directory that only this process made; then vLLM's own route answers, as for any path. Only
safetensors is read. It works where loading by request is on (VLLM_ALLOW_RUNTIME_LORA_UPDATING), behind the same key.

A body is large: who may not load is told so before it is read, and few are read at a time.
"""

import asyncio
import contextlib
import importlib
import json
from http import HTTPStatus
from typing import Any

from flora_vllm.errors import AdapterError, bounded
from flora_vllm.plugin.access import CURRENT
from flora_vllm.plugin.answers import error_answer
from flora_vllm.plugin.guard import MAY_NOT_LOAD, name_refusal
from flora_vllm.plugin.handed import directory_of, no_room
from flora_vllm.plugin.options import options_of_engine

ROUTE = "/v1/load_lora_adapter"
_FORM = b"multipart/form-data"
_PARTS = ("lora_name", "config", "weights")
# How many uploads there are at a time, how long others wait, and how long one may take to arrive.
MOST_AT_A_TIME = 4
WAIT_S = 60.0
ARRIVAL_S = 600.0


class TooLargeError(AdapterError):
    """More bytes than an upload may have."""


class NotAllowedError(AdapterError):
    """Another's name, or no key to load with."""


class BusyError(AdapterError):
    """Other uploads took too long."""


class TooSlowError(AdapterError):
    """The upload itself took too long."""


_STATUS: dict[type[AdapterError], HTTPStatus] = {
    TooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    NotAllowedError: HTTPStatus.FORBIDDEN,
    BusyError: HTTPStatus.TOO_MANY_REQUESTS,
    TooSlowError: HTTPStatus.REQUEST_TIMEOUT,
}


def install() -> None:
    """Every server app that gets vLLM's load route also gets ours in front of it."""
    router: Any = importlib.import_module("vllm.entrypoints.serve.lora.api_router")
    attach = router.attach_router

    def attach_router(app: Any) -> None:
        attach(app)
        if importlib.import_module("vllm.envs").VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            app.add_middleware(AdapterUploads)

    attach_router.__wrapped__ = attach
    router.attach_router = attach_router


class AdapterUploads:
    """ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._places = asyncio.Semaphore(MOST_AT_A_TIME)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        options = self._options(scope)
        if options is None:
            await self._app(scope, receive, send)
            return
        with contextlib.ExitStack() as kept:
            try:
                await self._enter(kept)
                body = await _written(scope, receive, options, kept)
            except AdapterError as error:
                await _refuse(error)(scope, receive, send)
                return
            headers = [(k, v) for k, v in scope["headers"] if k not in (b"content-type", b"content-length")]
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

            async def once() -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            await self._app({**scope, "headers": headers}, once, send)

    async def _enter(self, kept: contextlib.ExitStack) -> None:
        """Take one of the places, if this request may load at all. Raises AdapterError."""
        if not CURRENT.get().may_load:
            raise NotAllowedError(MAY_NOT_LOAD)
        try:
            await asyncio.wait_for(self._places.acquire(), WAIT_S)
        except TimeoutError:
            raise BusyError(f"{MOST_AT_A_TIME} other uploads took longer than {WAIT_S:.0f} s; send it again") from None
        kept.callback(self._places.release)

    @staticmethod
    def _options(scope: Any) -> Any:
        """The engine's options if this is an upload to an engine with FLoRA."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(ROUTE):
            return None
        if not dict(scope["headers"]).get(b"content-type", b"").lower().startswith(_FORM):
            return None
        return options_of_engine(getattr(scope["app"].state, "engine_client", None))


async def _written(scope: Any, receive: Any, options: Any, kept: contextlib.ExitStack) -> bytes:
    """The body of vLLM's own request for the upload, whose files are there while `kept` is. Raises AdapterError."""
    try:
        async with asyncio.timeout(ARRIVAL_S):
            fields, config, weights = await _read(scope, receive, options)
    except TimeoutError:
        raise TooSlowError(f"the upload did not arrive within {ARRIVAL_S:.0f} s") from None
    path = await asyncio.to_thread(kept.enter_context, directory_of(config, weights))
    return json.dumps({**fields, "lora_path": path}).encode()


async def _read(scope: Any, receive: Any, options: Any) -> tuple[dict[str, Any], bytes, bytes]:
    """(fields of vLLM's own request, config, weights). Raises AdapterError."""
    requests = importlib.import_module("starlette.requests")
    exceptions = importlib.import_module("starlette.exceptions")
    taken, most = 0, options.max_upload_bytes

    async def counted() -> Any:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise TooLargeError(
                f"the upload has more than {most} bytes; give the server a path, or start it with a larger "
                "--flora-max-upload-bytes"
            )
        return message

    try:
        async with requests.Request(scope, counted).form(max_files=2, max_fields=4) as form:
            missing = [part for part in _PARTS if part not in form]
            unknown = sorted(set(form) - {*_PARTS, "load_inplace"})
            if missing or unknown:
                raise AdapterError(
                    f"an upload has the parts {', '.join(_PARTS)} and may have load_inplace; missing: {missing}, "
                    f"unknown: {unknown}"
                )
            name = str(form["lora_name"])
            if (refused := name_refusal(name, options)) is not None:
                message, status = refused
                raise (NotAllowedError if status == HTTPStatus.FORBIDDEN else AdapterError)(message)
            fields = {
                "lora_name": name,
                "load_inplace": str(form.get("load_inplace", "false")).lower() in ("1", "true"),
            }
            return fields, await _content(form["config"]), await _content(form["weights"])
    except exceptions.HTTPException as error:
        raise AdapterError(f"the upload is no multipart/form-data: {error.detail}") from error
    except requests.ClientDisconnect as error:  # answered all the same: the operator's middleware may wait for that
        raise AdapterError("the client left before all of the upload had arrived") from error
    except OSError as error:  # large parts are put in files while they arrive
        raise no_room(taken, error) from error


async def _content(part: Any) -> bytes:
    return part.encode() if isinstance(part, str) else await part.read()


def _refuse(error: AdapterError) -> Any:
    status = _STATUS.get(type(error), HTTPStatus.BAD_REQUEST)
    # As long as no place has become free just now.
    return error_answer(bounded(str(error)), status, retry_after_s=WAIT_S if isinstance(error, BusyError) else None)
