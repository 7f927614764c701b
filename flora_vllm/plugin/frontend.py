"""Server side: names, identities, load, unload and resolvers of vLLM's OpenAI server, for engines with FLoRA.

The engine knows an adapter as `name@digest` of its content, clients as `name`. So a reload under the same name is
another adapter to the engine: requests that run finish on the old weights, prefix caches never mix versions, and no
name ever has two live ids (which would end vLLM's engine). An adapter's id is permanent for its identity.
"""

import asyncio
import functools
import importlib
import itertools
import os
import re
from http import HTTPStatus
from pathlib import Path
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.formats import content_digest, resolve_under, split_task
from flora_vllm.plugin.access import root_of_request
from flora_vllm.plugin.digests import check_digest
from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.identity import identity, split_identity
from flora_vllm.plugin.options import FloraOptions, options_of

# The engine hands errors on as text only; this finds our message in it.
_OUR_MESSAGE = re.compile(r"adapter .*? cannot be served \(\d+ faults?\):(?:\n  - [^\n]*)+", re.DOTALL)
_END_OF_RPC_ERROR = re.compile(r"', please check the stack trace.*$", re.DOTALL)
_POLL_S = 0.1


def install() -> None:
    """Replaces methods of OpenAIServingModels and the two engines' add_request, once; inert without FLoRA."""
    serving = importlib.import_module("vllm.entrypoints.openai.models.serving").OpenAIServingModels
    if hasattr(serving, "_flora_wrapped"):
        return
    serving._flora_wrapped = True
    for name, (replacement, hook) in _REPLACEMENTS.items():
        if not offers(hook):
            original = getattr(serving, name)
            setattr(serving, name, _if_flora(original, replacement))
    if offers(_ADMISSION):
        serving.admit_lora = _admit_offered
    if not offers("vllm.v1.engine.async_llm:AsyncLLM._preload_lora"):  # patches/0009
        _preload_on_add_request()
    if not offers(_INVALID):
        _name_faults_of_add_lora()
    _register_resolver()


def _if_flora(original: Any, replacement: Any) -> Any:
    if asyncio.iscoroutinefunction(original):

        @functools.wraps(original)
        async def chosen_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _options(self.engine_client) is None:
                return await original(self, *args, **kwargs)
            return await replacement(original, self, *args, **kwargs)

        return chosen_async

    @functools.wraps(original)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _options(self.engine_client) is None:
            return original(self, *args, **kwargs)
        return replacement(original, self, *args, **kwargs)

    return chosen


def _options(engine: Any) -> FloraOptions | None:
    return options_of(engine.vllm_config.additional_config)


def plain_name(lora_name: str) -> str:
    return split_identity(lora_name)[0]


def _model_name(original: Any, self: Any, lora_request: Any = None) -> str:
    name = original(self, lora_request)
    return name if lora_request is None else plain_name(name)


async def _show_available_models(original: Any, self: Any) -> Any:
    models = await original(self)
    known = {request.lora_name: name for name, request in self.lora_requests.items()}
    for card in models.data:
        card.id = known.get(card.id, card.id)
    return models


def _is_operators(self: Any, name: str, path: str) -> bool:
    """Whether the command line names this adapter: such a path is not confined to the adapter root."""
    return any(static.name == name and static.path == path for static in self.static_lora_modules or ())


async def _load_lora_adapter(original: Any, self: Any, request: Any, base_model_name: str | None = None) -> Any:
    async with self.lora_resolver_lock[request.lora_name]:
        refused = await self._check_load_lora_adapter_request(request)
        if refused is not None:
            return refused
        confined = not _is_operators(self, request.lora_name, request.lora_path)
        result = await _admit(self, request.lora_name, request.lora_path, base_model_name, confined)
    if isinstance(result, str):
        return f"Success: LoRA adapter '{request.lora_name}' added successfully."
    return result


async def _unload_lora_adapter(original: Any, self: Any, request: Any) -> Any:
    async with self.lora_resolver_lock[request.lora_name]:
        refused = await self._check_unload_lora_adapter_request(request)
        if refused is not None:
            return refused
        await _release(self, self.lora_requests.pop(request.lora_name))
    return f"Success: LoRA adapter '{request.lora_name}' removed successfully."


async def _resolve_lora(original: Any, self: Any, lora_name: str) -> Any:
    async with self.lora_resolver_lock[lora_name]:
        if lora_name in self.lora_requests:
            return self.lora_requests[lora_name]
        failures = []
        for resolver in self.lora_resolvers:
            found = await resolver.resolve_lora(self.model_config.model, lora_name)
            if found is None:
                continue
            result = await _admit(self, lora_name, found.lora_path, None, confined=True)
            if isinstance(result, str):
                return self.lora_requests[lora_name]
            failures.append(result)
        if failures:
            return failures[0]
        return _error(f"adapter {lora_name!r} does not exist", HTTPStatus.NOT_FOUND)


_SERVING = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_UNLOADS = f"{_SERVING}._release_lora"  # patches/0003
_INVALID = "vllm.exceptions:LoRAAdapterInvalidError"  # patches/0004
_NAMED = "vllm.lora.request:LoRARequest.served_name"  # patches/0008
_ADMISSION = f"{_SERVING}.admit_lora"  # patches/0011
# Method -> ours, and what vLLM would have to offer to make it needless.
_REPLACEMENTS = {
    "model_name": (_model_name, _NAMED),
    "show_available_models": (_show_available_models, _NAMED),
    "load_lora_adapter": (_load_lora_adapter, _ADMISSION),
    "unload_lora_adapter": (_unload_lora_adapter, _UNLOADS),
    "resolve_lora": (_resolve_lora, _ADMISSION),
}


def _error(message: str, status: HTTPStatus) -> Any:
    serving = importlib.import_module("vllm.entrypoints.openai.models.serving")
    kind = "NotFoundError" if status == HTTPStatus.NOT_FOUND else "BadRequestError"
    return serving.create_error_response(message=message, err_type=kind, status_code=status)


async def _admit(self: Any, name: str, path: str, base_model_name: str | None, confined: bool) -> Any:
    """Have the engine load the content now at `path` under `name`; its identity, or an error response."""
    request = importlib.import_module("vllm.lora.request").LoRARequest(name, 1, path)
    try:
        await _identify(self, request, confined)
    except AdapterError as error:
        missing = _is_missing(self, path)
        return _error(str(error), HTTPStatus.NOT_FOUND if missing else HTTPStatus.BAD_REQUEST)
    known = request.lora_name
    current = self.lora_requests.get(name)
    if current is not None and current.lora_name == known:
        return known
    if base_model_name is not None and self.is_base_model(base_model_name):
        request.base_model_name = base_model_name
    try:
        await self.engine_client.add_lora(request)
    except Exception as error:  # noqa: BLE001 - the engine's errors arrive as text, of whatever class its transport uses
        message = _refusal(error)
        if message is None:
            return _error(str(error), HTTPStatus.INTERNAL_SERVER_ERROR)
        return _error(message, HTTPStatus.BAD_REQUEST)
    self.lora_requests[name] = request
    if current is not None:
        _in_background(self, _release(self, current))
    return known


def _resolve(path: str, root: str | None) -> str:
    directory, task = split_task(path)
    if root is not None:
        found = str(resolve_under(root, directory))
    else:
        found = importlib.import_module("vllm.lora.utils").get_adapter_absolute_path(directory)
    return found if task is None else f"{found}#{task}"


def _is_missing(self: Any, path: str) -> bool:
    try:
        return _adapter_root(self) is None and not Path(split_task(path)[0]).exists()
    except OSError:  # a name that is too long for the file system
        return True


def _checked_options(self: Any) -> FloraOptions:
    options = _options(self.engine_client)
    assert options is not None, "called for engines with FLoRA only"
    return options


def _adapter_root(self: Any) -> str | None:
    return root_of_request(_checked_options(self).adapter_root)


async def _identify(self: Any, request: Any, confined: bool) -> None:
    """Give the request the identity of the content now at its path. Raises AdapterError."""
    root = _adapter_root(self)
    name = request.lora_name
    request.lora_path = await asyncio.to_thread(_resolve, request.lora_path, root if confined else None)
    digest = await asyncio.to_thread(content_digest, request.lora_path, root if confined else None)
    await asyncio.to_thread(check_digest, _checked_options(self).adapter_digests, name, digest)
    known = identity(name, digest)
    ids = self.__dict__.setdefault("_flora_ids", {})
    if known not in ids:
        ids[known] = self.lora_id_counter.inc(1)
    request.lora_name, request.lora_int_id, request.load_inplace = known, ids[known], False
    if offers(_NAMED):
        request.served_name = name


async def _admit_offered(self: Any, request: Any) -> None:
    """What vLLM calls where it takes an admission hook."""
    if _options(self.engine_client) is None:
        return
    errors = importlib.import_module("vllm.exceptions")
    path = request.lora_path
    try:
        await _identify(self, request, not _is_operators(self, request.lora_name, path))
    except AdapterError as error:
        kind = errors.VLLMNotFoundError if _is_missing(self, path) else errors.VLLMValidationError
        raise kind(str(error)) from error


def our_message(text: str) -> str | None:
    """Our refusal inside an engine's error text, or None if the error is not ours."""
    match = _OUR_MESSAGE.search(text.replace("\\n", "\n"))
    return _END_OF_RPC_ERROR.sub("", match[0]) if match else None


def _refusal(error: Exception) -> str | None:
    """Why an adapter was refused, if that is what an engine's error says."""
    if offers(_INVALID):
        invalid = importlib.import_module("vllm.exceptions").LoRAAdapterInvalidError
        return getattr(error, "reason", None) if isinstance(error, invalid) else None
    return our_message(str(error))


async def _release(self: Any, request: Any) -> None:
    """Free the engine's copy of an adapter that lost its name, once its last running request has finished."""
    engine = self.engine_client
    if _in_flight(engine, request.lora_name):
        _in_background(self, _release_when_idle(self, request))
    else:
        await engine.remove_lora(request.lora_int_id)


async def _release_when_idle(self: Any, request: Any) -> None:
    while _in_flight(self.engine_client, request.lora_name):
        await asyncio.sleep(_POLL_S)
    if all(live.lora_int_id != request.lora_int_id for live in self.lora_requests.values()):
        await _release(self, request)


def _in_flight(engine: Any, lora_name: str) -> bool:
    processor = getattr(engine, "output_processor", None)
    states = processor.request_states.values() if processor is not None else ()
    return any(state.lora_name == lora_name for state in states)


def _in_background(self: Any, coroutine: Any) -> None:
    tasks = self.__dict__.setdefault("_flora_tasks", set())
    task = asyncio.ensure_future(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _known(engine: Any) -> set[int]:
    """Adapter ids this engine has loaded at least once since their last removal."""
    return engine.__dict__.setdefault("_flora_known", set())


def _preload_on_add_request() -> None:
    """An adapter first seen on a request is loaded before the request is queued: a faulty one then fails here, alone,
    and not inside a step of everybody's."""
    sync_engine = importlib.import_module("vllm.v1.engine.llm_engine").LLMEngine
    async_engine = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
    sync_add, async_add = sync_engine.add_request, async_engine.add_request
    sync_lora, async_lora = sync_engine.add_lora, async_engine.add_lora
    sync_remove, async_remove = sync_engine.remove_lora, async_engine.remove_lora

    @functools.wraps(sync_add)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        for lora_request in _unknown(self, args, kwargs):
            self.add_lora(lora_request)
        return sync_add(self, *args, **kwargs)

    @functools.wraps(async_add)
    async def add_request_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        for lora_request in _unknown(self, args, kwargs):
            await self.add_lora(lora_request)
        return await async_add(self, *args, **kwargs)

    @functools.wraps(sync_lora)
    def add_lora(self: Any, lora_request: Any) -> Any:
        result = sync_lora(self, lora_request)
        _known(self).add(lora_request.lora_int_id)
        return result

    @functools.wraps(async_lora)
    async def add_lora_async(self: Any, lora_request: Any) -> Any:
        result = await async_lora(self, lora_request)
        _known(self).add(lora_request.lora_int_id)
        return result

    @functools.wraps(sync_remove)
    def remove_lora(self: Any, lora_id: int) -> Any:
        _known(self).discard(lora_id)
        return sync_remove(self, lora_id)

    @functools.wraps(async_remove)
    async def remove_lora_async(self: Any, lora_id: int) -> Any:
        _known(self).discard(lora_id)
        return await async_remove(self, lora_id)

    sync_engine.remove_lora, async_engine.remove_lora = remove_lora, remove_lora_async
    sync_engine.add_request, async_engine.add_request = add_request, add_request_async
    sync_engine.add_lora, async_engine.add_lora = add_lora, add_lora_async


def _name_faults_of_add_lora() -> None:
    """The offline engine raises AdapterError for an adapter that cannot be served."""
    engine = importlib.import_module("vllm.v1.engine.llm_engine").LLMEngine
    original = engine.add_lora

    @functools.wraps(original)
    def add_lora(self: Any, lora_request: Any) -> Any:
        try:
            return original(self, lora_request)
        except Exception as error:  # see _OUR_MESSAGE
            message = _refusal(error)
            if message is None:
                raise
            raise AdapterError(message) from error

    engine.add_lora = add_lora


def _unknown(engine: Any, args: tuple, kwargs: dict) -> list[Any]:
    """The LoRARequest among add_request's arguments, if this engine serves FLoRA and has not loaded it yet."""
    if _options(engine) is None:
        return []
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    candidates = itertools.chain(args, kwargs.values(), [getattr(a, "lora_request", None) for a in args])
    requests: list[Any] = [value for value in candidates if isinstance(value, lora_request)]
    return [r for r in requests[:1] if r.lora_int_id not in _known(engine)]


def _register_resolver() -> None:
    """Find adapters of every family by name below VLLM_LORA_RESOLVER_CACHE_DIR, and nothing outside it."""
    root = os.environ.get("VLLM_LORA_RESOLVER_CACHE_DIR")
    if not root:
        return
    resolver = importlib.import_module("vllm.lora.resolver")
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest

    class FloraDirectoryResolver(resolver.LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            try:
                path = resolve_under(root, lora_name)
            except AdapterError:
                return None
            return lora_request(lora_name, 1, str(path)) if (path / "adapter_config.json").is_file() else None

    # vLLM's own resolver of the same directory takes LoRA only and follows names and links out of it.
    resolver.LoRAResolverRegistry.resolvers.pop("Filesystem Resolver", None)
    resolver.LoRAResolverRegistry.register_resolver("flora directory resolver", FloraDirectoryResolver())
