"""The bodies of requests, looked at before vLLM reads them."""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Receive = Callable[[], Awaitable[Any]]


async def read(receive: Receive) -> tuple[bytes, Receive]:
    """The body of an HTTP request, and what gives the app behind the same messages again."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)

    async def again() -> Any:
        return messages.pop(0) if messages else await receive()

    return body, again


def parsed(body: bytes, keys: Sequence[str]) -> Any:
    """The JSON of a body that may have one of `keys`; None if it cannot, or is no JSON, which is vLLM's to refuse.

    Raises RecursionError for what is nested too deeply to be looked at.
    """
    # Letters can be escaped, and JSON may be UTF-16 or UTF-32, as json.loads sees by the zeros.
    if not any(key.encode() in body for key in keys) and b"\\u" not in body and b"\0" not in body:
        return None
    try:
        return json.loads(body)
    except ValueError:
        return None
