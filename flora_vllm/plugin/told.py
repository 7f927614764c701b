"""Headers that a request's answer gets from whatever serves it, wherever that is: `tell(name, value)`."""

from contextvars import ContextVar
from typing import Any

_TOLD: ContextVar[dict[str, str] | None] = ContextVar("flora_told", default=None)


def tell(name: str, value: str) -> None:
    """The answer to the present request, if there is one, has this header; both in ASCII."""
    told = _TOLD.get()
    if told is not None:
        told[name] = value


class ToldHeaders:
    """ASGI middleware: one table for each request, shared by the tasks that serve it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told: dict[str, str] = {}

        async def send_told(message: Any) -> None:
            if told and message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in told.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        token = _TOLD.set(told)
        try:
            await self._app(scope, receive, send_told)
        finally:
            _TOLD.reset(token)
