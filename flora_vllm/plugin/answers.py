"""Errors as vLLM's server answers them, where a request ends before vLLM's own handlers."""

import importlib
import math
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


def error_answer(
    message: str,
    status: HTTPStatus = HTTPStatus.BAD_REQUEST,
    param: str | None = None,
    retry_after_s: float | None = None,
) -> Any:
    """A response, itself an ASGI app. `param`: the field of the request that it is about. `retry_after_s`: when the
    same request may be answered otherwise, for clients that ask again by themselves."""
    content = {"error": {"message": message, "type": error_kind(status), "param": param, "code": int(status)}}
    headers = None if retry_after_s is None else {"Retry-After": str(math.ceil(retry_after_s))}
    return importlib.import_module("starlette.responses").JSONResponse(content, int(status), headers)
