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
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from flora_vllm.errors import AdapterError, adapter_error, without_paths
from flora_vllm.formats import content_digest, split_task
from flora_vllm.plugin.digests import check_digest
from flora_vllm.plugin.handed import on_disk, plain
from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.identity import identity, plain_name
from flora_vllm.plugin.lent import is_lent
from flora_vllm.plugin.options import options_of_engine
from flora_vllm.plugin.refusals import INVALID, refusal

NAMED = "vllm.lora.request:LoRARequest.served_name"  # patches/0008
_identified: ContextVar[bool] = ContextVar("flora_identified", default=False)


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
    directory, task = split_task(path)
    try:
        found = find(directory)
        return found if task is None else f"{found}#{task}"
    except Exception as error:
        raise adapter_error(
            repr(path),
            [f"it is no directory here and cannot be had from the hub ({type(error).__name__}: {_first_line(error)})"],
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def install() -> None:
    """Has vLLM's two engines ask before they add a request or load an adapter; inert without FLoRA."""
    sync_engine: Any = importlib.import_module("vllm.v1.engine.llm_engine").LLMEngine
    async_engine: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
    if offers("vllm.v1.engine.async_llm:AsyncLLM.lora_gate"):  # patches/0009
        sync_engine.lora_gate = SimpleNamespace(admit=_admit, load=_load, forget=_forget)
        async_engine.lora_gate = SimpleNamespace(admit=_admit_async, load=_load_async, forget=_forget)
        return
    _wrap_sync(sync_engine)
    _wrap_async(async_engine)


def _admit(engine: Any, request: Any) -> Any:
    """The request's adapter as the engine knows it, loaded."""
    if options_of_engine(engine) is None:
        return request
    if _must_load(engine, request):
        engine.add_lora(request)
    return _copy(request, _name_of(engine, request), load_inplace=False)


async def _admit_async(engine: Any, request: Any) -> Any:
    if options_of_engine(engine) is None:
        return request
    if _must_load(engine, request):
        await engine.add_lora(request)
    return _copy(request, _name_of(engine, request), load_inplace=False)


def _load(engine: Any, lora_request: Any, load: Callable[[Any], Any]) -> Any:
    """`load`, told the adapter's identity."""
    if options_of_engine(engine) is None:
        return load(lora_request)
    with on_disk(lora_request) as given:
        request = given if _identified.get() else _identify(engine, given)
        try:
            result = load(request)
        except Exception as error:  # of any class: refusals cross processes as text; what is none goes on as it is
            message = None if offers(INVALID) else refusal(error)
            if message is None:
                raise
            raise AdapterError(message) from error
    _known(engine)[request.lora_int_id] = request.lora_name
    return result


async def _load_async(engine: Any, lora_request: Any, load: Callable[[Any], Any]) -> Any:
    if options_of_engine(engine) is None:
        return await load(lora_request)
    with contextlib.ExitStack() as kept:
        given = await asyncio.to_thread(kept.enter_context, on_disk(lora_request))  # it may be large
        # What is at its path now may be other content than that which was lent: the workers refuse it.
        has_identity = _identified.get() or is_lent(lora_request)
        request = given if has_identity else await asyncio.to_thread(_identify, engine, given)
        try:
            result = await load(request)
        except Exception as error:  # of any class: refusals cross processes as text; what is none goes on as it is
            message = refusal(error) if is_lent(lora_request) else None
            if message is None:
                raise
            raise AdapterError(without_paths(message, None)) from error  # who asks a question never sent the path
    _known(engine)[request.lora_int_id] = request.lora_name
    return result


def _forget(engine: Any, lora_id: int) -> None:
    _known(engine).pop(lora_id, None)


def _wrap_sync(engine: Any) -> None:
    add, load, remove = engine.add_request, engine.add_lora, engine.remove_lora

    @functools.wraps(add)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = _adapter_of(args, kwargs)
        if wanted is not None:
            args, kwargs = _with(args, kwargs, wanted, _admit(self, wanted))
        return add(self, *args, **kwargs)

    @functools.wraps(load)
    def add_lora(self: Any, lora_request: Any) -> Any:
        return _load(self, lora_request, functools.partial(load, self))

    @functools.wraps(remove)
    def remove_lora(self: Any, lora_id: int) -> Any:
        _forget(self, lora_id)
        return remove(self, lora_id)

    engine.add_request, engine.add_lora, engine.remove_lora = add_request, add_lora, remove_lora


def _wrap_async(engine: Any) -> None:
    add, load, remove = engine.add_request, engine.add_lora, engine.remove_lora

    @functools.wraps(add)
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = _adapter_of(args, kwargs)
        if wanted is not None:
            args, kwargs = _with(args, kwargs, wanted, await _admit_async(self, wanted))
        return await add(self, *args, **kwargs)

    @functools.wraps(load)
    async def add_lora(self: Any, lora_request: Any) -> Any:
        return await _load_async(self, lora_request, functools.partial(load, self))

    @functools.wraps(remove)
    async def remove_lora(self: Any, lora_id: int) -> Any:
        _forget(self, lora_id)
        return await remove(self, lora_id)

    engine.add_request, engine.add_lora, engine.remove_lora = add_request, add_lora, remove_lora


def _known(engine: Any) -> dict[int, str]:
    """Adapter id -> identity of what this engine has loaded under it since its last removal."""
    return engine.__dict__.setdefault("_flora_known", {})


def _name_of(engine: Any, request: Any) -> str:
    """The identity under which the request's adapter was loaded; its own name if it has just been removed again."""
    known: str | None = _known(engine).get(request.lora_int_id)
    return request.lora_name if known is None else known


def _adapter_of(args: tuple, kwargs: dict) -> Any:
    """The LoRARequest among add_request's arguments."""
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
    if (options := options_of_engine(engine)) is not None:
        check_digest(options.adapter_digests, plain_name(request.lora_name), digest)
    name = identity(request.lora_name, digest)
    if request.lora_name == identity(plain_name(request.lora_name), digest):
        name = request.lora_name
    return _copy(request, name, load_inplace=request.load_inplace if known is None else known != name)


@functools.cache
def _has_served_name() -> bool:
    return offers(NAMED)


def _copy(request: Any, name: str, *, load_inplace: bool) -> Any:
    changes = {"lora_name": name, "load_inplace": load_inplace}
    if _has_served_name():
        changes["served_name"] = plain_name(name)
    return plain(request, **changes)


def _with(args: tuple, kwargs: dict, wanted: Any, request: Any) -> tuple[tuple, dict]:
    """The arguments with `request` for `wanted`; a request that vLLM made of them is the engine's to change."""
    for argument in args:
        if getattr(argument, "lora_request", None) is wanted:
            argument.lora_request = request

    def own(value: Any) -> Any:
        return request if value is wanted else value

    return tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}
