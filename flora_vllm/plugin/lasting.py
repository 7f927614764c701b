"""Work of a server that goes on though whoever began it has gone."""

import asyncio
from collections.abc import Coroutine
from typing import Any


def in_background(models: Any, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task:
    """A task, which the server's models keep until it is done."""
    tasks = models.__dict__.setdefault("_flora_tasks", set())
    task = asyncio.ensure_future(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


async def to_its_end(models: Any, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What it gives. vLLM cancels the handler of a client that has gone; a load that the engine was asked for must
    still come to be known here, or nobody would ever unload it."""
    return await asyncio.shield(in_background(models, coroutine))
