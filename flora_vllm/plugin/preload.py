"""An engine's adapters: known by their content, and loaded before the request that first names them is queued.

A request names an adapter by a name, an id and a path. The engine hears of it as `name@digest` of the content that was
at the path when it was loaded, so other content under the same id (`load_inplace`) never shares a prefix cache with it.
A faulty adapter fails here, alone, and not inside a step of everybody's. The server makes identities of its own
(frontend.py) and says so (`identified`).
"""

import asyncio
import contextlib
import functools
import importlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats import content_digest
from flora_vllm.plugin.handed import on_disk, plain
from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.identity import identity, plain_name
from flora_vllm.plugin.options import FloraOptions, options_of
from flora_vllm.plugin.refusals import INVALID, refusal

_identified: ContextVar[bool] = ContextVar("flora_identified", default=False)


def options_of_engine(engine: Any) -> FloraOptions | None:
    """The options of this engine; None if it does not serve FLoRA, or is a stand-in without a config."""
    return options_of(getattr(getattr(engine, "vllm_config", None), "additional_config", None))


@contextlib.contextmanager
def identified() -> Iterator[None]:
    """What is added to an engine within this context already carries its identity."""
    token = _identified.set(True)
    try:
        yield
    finally:
        _identified.reset(token)


def absolute_path(path: str) -> str:
    """Where an adapter lies on this machine, fetched from the hub if `path` is no directory. Raises AdapterError."""
    find = importlib.import_module("vllm.lora.utils").get_adapter_absolute_path
    try:
        return find(path)
    except Exception as error:
        raise adapter_error(
            repr(path),
            [f"it is no directory here and cannot be had from the hub ({type(error).__name__}: {_first_line(error)})"],
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def install() -> None:
    """Wraps add_request, add_lora and remove_lora of vLLM's two engines; inert without FLoRA."""
    _wrap_sync(importlib.import_module("vllm.v1.engine.llm_engine").LLMEngine)
    _wrap_async(importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM)


def _wrap_sync(engine: Any) -> None:
    add, load, remove = engine.add_request, engine.add_lora, engine.remove_lora

    @functools.wraps(add)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = _adapter_of(self, args, kwargs)
        if wanted is not None:
            if _must_load(self, wanted):
                self.add_lora(wanted)
            args, kwargs = _renamed(args, kwargs, wanted, _name_of(self, wanted))
        return add(self, *args, **kwargs)

    @functools.wraps(load)
    def add_lora(self: Any, lora_request: Any) -> Any:
        if options_of_engine(self) is None:
            return load(self, lora_request)
        with on_disk(lora_request) as given:
            request = given if _identified.get() else _identify(self, given)
            try:
                result = load(self, request)
            except Exception as error:  # see refusals.py
                message = None if offers(INVALID) else refusal(error)
                if message is None:
                    raise
                raise AdapterError(message) from error
        _known(self)[request.lora_int_id] = request.lora_name
        return result

    @functools.wraps(remove)
    def remove_lora(self: Any, lora_id: int) -> Any:
        _known(self).pop(lora_id, None)
        return remove(self, lora_id)

    engine.add_request, engine.add_lora, engine.remove_lora = add_request, add_lora, remove_lora


def _wrap_async(engine: Any) -> None:
    add, load, remove = engine.add_request, engine.add_lora, engine.remove_lora

    @functools.wraps(add)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = _adapter_of(self, args, kwargs)
        if wanted is not None:
            if _must_load(self, wanted):
                await self.add_lora(wanted)
            args, kwargs = _renamed(args, kwargs, wanted, _name_of(self, wanted))
        return await add(self, *args, **kwargs)

    @functools.wraps(load)
    async def add_lora(self: Any, lora_request: Any) -> Any:
        if options_of_engine(self) is None:
            return await load(self, lora_request)
        with on_disk(lora_request) as given:
            request = given if _identified.get() else await asyncio.to_thread(_identify, self, given)
            result = await load(self, request)
        _known(self)[request.lora_int_id] = request.lora_name
        return result

    @functools.wraps(remove)
    async def remove_lora(self: Any, lora_id: int) -> Any:
        _known(self).pop(lora_id, None)
        return await remove(self, lora_id)

    engine.add_request, engine.add_lora, engine.remove_lora = add_request, add_lora, remove_lora


def _known(engine: Any) -> dict[int, str]:
    """Adapter id -> identity of what this engine has loaded under it since its last removal."""
    return engine.__dict__.setdefault("_flora_known", {})


def _name_of(engine: Any, request: Any) -> str:
    """The identity under which the request's adapter was loaded; its own name if it has just been removed again."""
    known: str | None = _known(engine).get(request.lora_int_id)
    return request.lora_name if known is None else known


def _adapter_of(engine: Any, args: tuple, kwargs: dict) -> Any:
    """The LoRARequest among add_request's arguments, if this engine serves FLoRA."""
    if options_of_engine(engine) is None:
        return None
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    candidates = itertools.chain(args, kwargs.values(), [getattr(a, "lora_request", None) for a in args])
    return next((value for value in candidates if isinstance(value, lora_request)), None)


def _must_load(engine: Any, request: Any) -> bool:
    known = _known(engine).get(request.lora_int_id)
    if known is None:
        return True
    if known == request.lora_name:
        return False
    if plain_name(known) != request.lora_name:
        raise adapter_error(
            repr(request.lora_name),
            [f"its id {request.lora_int_id} is adapter {plain_name(known)!r}; give each adapter an id of its own"],
        )
    return request.load_inplace


def _identify(engine: Any, request: Any) -> Any:
    """A copy of the request with the identity of the content at its path; content that is there is not loaded anew."""
    known = _known(engine).get(request.lora_int_id)
    if known is not None and not request.load_inplace:
        return _copy(request, known, load_inplace=False)
    # vLLM's own request of what was removed since comes back with the identity it had.
    digest = content_digest(absolute_path(request.lora_path))
    name = identity(request.lora_name, digest)
    if request.lora_name == identity(plain_name(request.lora_name), digest):
        name = request.lora_name
    return _copy(request, name, load_inplace=known is not None and known != name)


def _copy(request: Any, name: str, *, load_inplace: bool) -> Any:
    return plain(request, lora_name=name, load_inplace=load_inplace)


def _renamed(args: tuple, kwargs: dict, wanted: Any, name: str) -> tuple[tuple, dict]:
    """The arguments with the adapter under its identity; a request that vLLM made of them is the engine's to change."""
    request = _copy(wanted, name, load_inplace=False)
    for argument in args:
        if getattr(argument, "lora_request", None) is wanted:
            argument.lora_request = request

    def own(value: Any) -> Any:
        return request if value is wanted else value

    return tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}
