"""Errors as vLLM's server answers them, where a request ends before vLLM's own handlers."""

import importlib
from http import HTTPStatus
from typing import Any


def error_answer(
    message: str, status: int = HTTPStatus.BAD_REQUEST, kind: str = "BadRequestError", param: str | None = None
) -> Any:
    """A response, itself an ASGI app. `param`: the field of the request that it is about."""
    content = {"error": {"message": message, "type": kind, "param": param, "code": int(status)}}
    return importlib.import_module("starlette.responses").JSONResponse(content, status_code=int(status))
