"""A stream never ends silently: retry while nothing was sent, and after that end with an error event.

Works on any async iterator of server-sent chunks; knows neither Ray nor HTTP frameworks.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from flora_vllm.errors import FloraError

log = logging.getLogger("ray.serve")

DONE = "data: [DONE]"
ENDED = "the stream ended early: the replica that served it failed or went away"


class LostError(FloraError, ConnectionError):
    """The replica that served the request went away, or cannot take it now; another one may."""


def error_event(message: str, code: int = 502) -> str:
    """An OpenAI error as a server-sent event; clients raise on it. The stream's own end mark follows."""
    body = {"error": {"message": message, "type": "upstream_error", "code": code}}
    return f"data: {json.dumps(body)}\n\n{DONE}\n\n"


def _ends(chunk: Any) -> bool:
    text = chunk[-1] if isinstance(chunk, list) and chunk else chunk
    return isinstance(text, str) and text.rstrip().endswith(DONE)


def _is_stream(chunk: Any) -> bool:
    text = chunk[0] if isinstance(chunk, list) and chunk else chunk
    return isinstance(text, str)


async def guarded(
    attempt: Callable[[], Awaitable[AsyncIterator[Any]]],
    retry_s: float,
    first_pause_s: float = 0.1,
) -> AsyncIterator[Any]:
    """Chunks of `attempt()`; raises LostError only if nothing was sent and every attempt in `retry_s` was lost.

    `attempt` may raise LostError, and so may its iterator. Text chunks are a stream, which must end with the DONE mark;
    anything else is a whole answer.
    """
    deadline, pause_s = time.monotonic() + retry_s, first_pause_s
    while True:
        sent, is_whole = False, True
        try:
            async for chunk in await attempt():
                sent, is_whole = True, _ends(chunk) or not _is_stream(chunk)
                yield chunk
            if not sent:
                raise LostError("the replica ended the answer before its first byte")
            if not is_whole:
                yield error_event(ENDED)
            return
        except LostError as error:
            if sent:
                log.warning("a stream ended early: %s", error)
                yield error_event(ENDED)
                return
            if time.monotonic() + pause_s > deadline:
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 2.0)
