"""Headers told by whatever serves a request: to that request's answer, and to no other's."""

import asyncio
from typing import Any

from flora_vllm.plugin.told import ToldHeaders, tell


async def answered(*names: str) -> list[list[tuple[bytes, bytes]]]:
    """Headers of requests that are served at once, each telling its own name from a task of its own."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def serve() -> None:
            await asyncio.sleep(0)
            if scope["name"]:
                tell("x-name", scope["name"])

        await asyncio.create_task(serve())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    async def ask(name: str) -> list[tuple[bytes, bytes]]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await ToldHeaders(app)({"type": "http", "name": name}, None, send)
        return sent[0]["headers"]

    return await asyncio.gather(*map(ask, names))


def test_each_answer_is_told_its_own() -> None:
    found = asyncio.run(answered("one", "", "two"))
    assert found == [[(b"a", b"b"), *more] for more in ([(b"x-name", b"one")], [], [(b"x-name", b"two")])]


def test_nobody_is_told_outside_a_request() -> None:
    tell("x-name", "lost")
    assert asyncio.run(answered("")) == [[(b"a", b"b")]]
