"""Errors as vLLM's server answers them, where a request ends before vLLM's own handlers."""

import importlib
from http import HTTPStatus
from typing import Any

_KINDS = {
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.FORBIDDEN: "PermissionDeniedError",
    HTTPStatus.TOO_MANY_REQUESTS: "RateLimitError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailableError",
}


def error_kind(status: HTTPStatus) -> str:
    """What OpenAI calls an error of this status."""
    return _KINDS.get(status, "BadRequestError")


def error_answer(message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, param: str | None = None) -> Any:
    """A response, itself an ASGI app. `param`: the field of the request that it is about."""
    content = {"error": {"message": message, "type": error_kind(status), "param": param, "code": int(status)}}
    return importlib.import_module("starlette.responses").JSONResponse(content, status_code=int(status))
