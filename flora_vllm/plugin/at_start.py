"""Adapters that the command line names: several are loaded at a time, and their ids follow its order.

vLLM loads them one after another; so a server would read one while its engine waits, and the other way round. Servers
of one engine must count ids alike, whichever file is read first.
"""

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator, Iterable, Iterator
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

from flora_vllm.plugin import choosers, mixes

AT_ONCE = 8
# What is set when the one before has its id, and what to set then.
_TURN: ContextVar[tuple[asyncio.Event, asyncio.Event] | None] = ContextVar("flora_turn", default=None)


async def load_static(original: Any, self: Any) -> None:
    """`OpenAIServingModels.init_static_loras`. Raises ValueError with the message of the first that is refused."""
    kind = importlib.import_module("vllm.entrypoints.serve.lora.protocol").LoadLoRAAdapterRequest

    async def load(module: Any, turn: tuple[asyncio.Event, asyncio.Event]) -> Any:
        _TURN.set(turn)  # of this task
        try:
            request = kind(lora_name=module.name, lora_path=module.path)
            return await self.load_lora_adapter(request=request, base_model_name=module.base_model_name)
        finally:
            async with in_order():  # of one that was refused without an id, too
                pass

    for group in _groups(self.static_lora_modules or ()):
        given = [asyncio.Event() for _ in range(len(group) + 1)]
        given[0].set()
        for result in await asyncio.gather(*map(load, group, pairwise(given))):
            if not isinstance(result, str):
                raise ValueError(result.error.message)


@contextlib.asynccontextmanager
async def in_order() -> AsyncIterator[None]:
    """Around what gives an adapter of the command line its id; others do not wait."""
    turn = _TURN.get()
    if turn is None:
        yield
        return
    before, after = turn
    await before.wait()
    try:
        yield
    finally:
        after.set()


def _groups(modules: Iterable[Any]) -> Iterator[list[Any]]:
    """What may be loaded together; what is made of adapters comes alone, after those before it."""
    group: list[Any] = []
    for module in modules:
        is_made = mixes.is_mix(module.path) or choosers.is_chooser(module.path)
        if group and (is_made or len(group) == AT_ONCE):
            yield group
            group = []
        group.append(module)
        if is_made:
            yield group
            group = []
    if group:
        yield group
