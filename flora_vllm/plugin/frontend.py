"""Server side: names, identities, load, unload and resolvers of vLLM's OpenAI server, for engines with FLoRA.

The engine knows an adapter as `name@digest` of its content, clients as `name`. So a reload under the same name is
another adapter to the engine: requests that run finish on the old weights, prefix caches never mix versions, and no
name ever has two live ids (which would end vLLM's engine). An adapter's id is permanent for its identity (a mix's:
for long after it was released).
"""

import asyncio
import functools
import hashlib
import importlib
import os
from collections import OrderedDict
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.formats import digest_and_family, resolve_under, split_task
from flora_vllm.formats.dlp import read_chooser
from flora_vllm.formats.files import CONFIG_NAME
from flora_vllm.plugin import choosers, mixes, preload, sleeping, traffic, uploads
from flora_vllm.plugin.access import CHOICE, CURRENT, OPERATOR, is_operators, root_of_request
from flora_vllm.plugin.digests import check_digest
from flora_vllm.plugin.handed import is_handed
from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.identity import identity, plain_name
from flora_vllm.plugin.lasting import in_background
from flora_vllm.plugin.lent import LENT, UNLOADS
from flora_vllm.plugin.mix_paths import CHOOSER_PREFIX, ENCODED
from flora_vllm.plugin.options import FloraOptions, options_of_engine
from flora_vllm.plugin.preload import NAMED
from flora_vllm.plugin.published import identity_of
from flora_vllm.plugin.refusals import refusal

_POLL_S = 0.1
MOST_RETIRED = 4096
_FIRST_OF_OWN = 1 << 30
# (path, root) of what a resolver found for the present request: the operator's place, whatever the clients' root is.
_found: ContextVar[tuple[str, str] | None] = ContextVar("flora_found", default=None)


def install() -> None:
    """Replaces methods of OpenAIServingModels and of the two engines, once; inert without FLoRA."""
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
    preload.install()
    uploads.install()
    sleeping.install()
    _register_resolver()


def _if_flora(original: Any, replacement: Any) -> Any:
    if asyncio.iscoroutinefunction(original):

        @functools.wraps(original)
        async def chosen_async(self: Any, *args: Any, **kwargs: Any) -> Any:
            if options_of_engine(self.engine_client) is None:
                return await original(self, *args, **kwargs)
            return await replacement(original, self, *args, **kwargs)

        return chosen_async

    @functools.wraps(original)
    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if options_of_engine(self.engine_client) is None:
            return original(self, *args, **kwargs)
        return replacement(original, self, *args, **kwargs)

    return chosen


def _model_name(original: Any, self: Any, lora_request: Any = None) -> str:
    name = original(self, lora_request)
    return name if lora_request is None else plain_name(name)


async def _show_available_models(original: Any, self: Any) -> Any:
    models = await original(self)
    known = {request.lora_name: name for name, request in self.lora_requests.items()}
    for card in models.data:
        card.id = known.get(card.id, card.id)
        # The parts of a mix may be others' adapters.
        if CURRENT.get() is not OPERATOR and (card.root or "").startswith(ENCODED):
            card.root = card.id
    return models


async def _load_lora_adapter(original: Any, self: Any, request: Any, base_model_name: str | None = None) -> Any:
    async with self.lora_resolver_lock[request.lora_name]:
        refused = await self._check_load_lora_adapter_request(request)
        if refused is not None:
            return refused
        confined = not (
            is_operators(self.static_lora_modules, request.lora_name, request.lora_path) or is_handed(request.lora_path)
        )
        result = await admit(self, request.lora_name, request.lora_path, base_model_name, confined)
    if isinstance(result, str):
        return f"Success: LoRA adapter '{request.lora_name}' added successfully."
    return result


async def _unload_lora_adapter(original: Any, self: Any, request: Any) -> Any:
    async with self.lora_resolver_lock[request.lora_name]:
        refused = await self._check_unload_lora_adapter_request(request)
        if refused is not None:
            return refused
        await release(self, self.lora_requests.pop(request.lora_name))
        for choice in [name for name in self.lora_requests if choosers.is_choice_of(name, request.lora_name)]:
            # Requests' mixes make room for each other meanwhile.
            if (mix := self.lora_requests.pop(choice, None)) is not None:
                await release(self, mix)
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
            result = await admit(self, lora_name, found.lora_path, None, confined=True)
            if isinstance(result, str):
                return self.lora_requests[lora_name]
            failures.append(result)
        if failures:
            return failures[0]
        return error_response(f"adapter {lora_name!r} does not exist", HTTPStatus.NOT_FOUND)


_SERVING = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_ADMISSION = f"{_SERVING}.admit_lora"  # patches/0011
# Method -> ours, and what vLLM would have to offer to make it needless.
_REPLACEMENTS = {
    "model_name": (_model_name, NAMED),
    "show_available_models": (_show_available_models, NAMED),
    "load_lora_adapter": (_load_lora_adapter, _ADMISSION),
    "unload_lora_adapter": (_unload_lora_adapter, UNLOADS),
    "resolve_lora": (_resolve_lora, _ADMISSION),
}


def error_response(message: str, status: HTTPStatus) -> Any:
    serving = importlib.import_module("vllm.entrypoints.openai.models.serving")
    kind = "NotFoundError" if status == HTTPStatus.NOT_FOUND else "BadRequestError"
    return serving.create_error_response(message=message, err_type=kind, status_code=status)


async def admit(
    self: Any,
    name: str,
    content: str | mixes.Mix,
    base_model_name: str | None = None,
    confined: bool = False,
    told: str | None = None,
    by_request: bool = False,
) -> Any:
    """Have the engine load `content`, or what is now at that path, under `name`; its identity, or an error response.

    `told`: what answers, logs and metrics call it, if not by `name`. `by_request`: a mix that a request asks for.
    """
    mix = None if isinstance(content, str) else content
    path = content if isinstance(content, str) else mixes.encoded(content)
    request = importlib.import_module("vllm.lora.request").LoRARequest(told or name, 1, path)
    try:
        await _identify(self, request, confined, mix, by_request)
    except AdapterError as error:
        if _is_missing(self, path):
            # With vLLM's own words, which clients match.
            return error_response(f"{error} (No adapter found for {path})", HTTPStatus.NOT_FOUND)
        return error_response(str(error), HTTPStatus.BAD_REQUEST)
    known = request.lora_name
    current = self.lora_requests.get(name)
    if current is not None and current.lora_name == known:
        return known
    if base_model_name is not None and self.is_base_model(base_model_name):
        request.base_model_name = base_model_name
    refused = await _try(self, request) if choosers.is_chooser(request.lora_path) else await _add(self, request)
    if refused is not None:
        choosers.choosers_of(self).pop(known, None)
        return refused
    self.lora_requests[name] = request
    if current is not None:
        in_background(self, release(self, current))
    return known


async def _add(self: Any, request: Any) -> Any:
    """Have the engine load it; None, or an error response."""
    try:
        with preload.identified():
            await self.engine_client.add_lora(request)
    except Exception as error:  # noqa: BLE001 - the engine's errors arrive as text, of whatever class its transport uses
        message = refusal(error)
        if self.engine_client.vllm_config.parallel_config.data_parallel_size > 1:
            # Another of the engines may have it, or be loading it; whether it lets go of it is not what was asked.
            await asyncio.wait({in_background(self, release(self, request))})
        if message is None:
            return error_response(str(error), HTTPStatus.INTERNAL_SERVER_ERROR)
        return error_response(message, HTTPStatus.BAD_REQUEST)
    return None


async def _try(self: Any, request: Any) -> Any:
    """Whether the engine takes all that a chooser may ask of it; None, or an error response."""
    name = plain_name(request.lora_name)
    trial = f"{name}{CHOICE}"
    for mix in choosers.trials(choosers.choosers_of(self)[request.lora_name]):
        result = await admit(self, trial, mix, told=name, by_request=True)
        if not isinstance(result, str):
            return result
        await release(self, self.lora_requests.pop(trial))
    return None


def _resolve(path: str, root: str | None) -> str:
    directory, task = split_task(path)
    if root is not None:
        found = str(resolve_under(root, directory))
    else:
        found = preload.absolute_path(directory)
    return found if task is None else f"{found}#{task}"


def _is_missing(self: Any, path: str) -> bool:
    """Whether there is no adapter at `path`; never told of paths below an adapter root."""
    if mixes.is_mix(path) or _adapter_root(self) is not None:
        return False
    found = Path(split_task(path.removeprefix(CHOOSER_PREFIX))[0])
    try:
        return not (found.is_file() or (found if choosers.is_chooser(path) else found / CONFIG_NAME).exists())
    except OSError:  # a name that is too long for the file system
        return True


def _checked_options(self: Any) -> FloraOptions:
    options = options_of_engine(self.engine_client)
    assert options is not None, "called for engines with FLoRA only"
    return options


def _adapter_root(self: Any) -> str | None:
    return root_of_request(_checked_options(self).adapter_root)


def _root_of(self: Any, path: str) -> str | None:
    found = _found.get()
    return found[1] if found is not None and found[0] == path else _adapter_root(self)


def _beside(self: Any) -> tuple[int, int]:
    """How many servers this engine has, and which of them this is."""
    parallel = self.engine_client.vllm_config.parallel_config
    return parallel._api_process_count, parallel._api_process_rank


def id_of_own(counted: int, rank: int, servers: int) -> int:
    """An id that no other server gives, from the first one that no file gets. vLLM keeps ids in 32 bits."""
    return _FIRST_OF_OWN + counted * servers + rank


async def _identify(
    self: Any, request: Any, confined: bool, mix: mixes.Mix | None = None, by_request: bool = False
) -> None:
    """Give the request the identity of `mix`, or of what its path says: content, mix, chooser. Raises AdapterError."""
    name, path = request.lora_name, request.lora_path
    root = _root_of(self, path) if confined else None
    allowed = _checked_options(self).adapter_digests
    chooser, family = None, mixes.MIX
    if mix is None and not confined:
        mix = mixes.decoded(path)  # of a server that was started again
        # What is taken off the operator's list is not loaded again.
        for part in mix.parts if mix is not None and allowed is not None else ():
            digest, _ = await asyncio.to_thread(digest_and_family, part.path, None)
            await asyncio.to_thread(check_digest, allowed, part.name, digest)
    if mix is None and mixes.is_mix(path):
        mix = mixes.mix_of(mixes.asked_in(path), self.lora_requests)
    if mix is not None:
        request.lora_path, digest, family = mixes.encoded(mix), mixes.digest_of_mix(mix), mixes.family_of(mix)
    elif choosers.is_chooser(path):
        folder = await asyncio.to_thread(_resolve, path.removeprefix(CHOOSER_PREFIX), root)
        choosers.check_room(self, name)
        chooser = await asyncio.to_thread(read_chooser, folder, root)
        for choice in chooser.choices:
            await asyncio.to_thread(check_digest, allowed, f"{name}: {choice.name}", choice.digest)
        request.lora_path, digest = CHOOSER_PREFIX + folder, chooser.digest
    else:
        request.lora_path = await asyncio.to_thread(_resolve, path, root)
        digest, family = await asyncio.to_thread(digest_and_family, request.lora_path, root)
        await asyncio.to_thread(check_digest, allowed, name, digest)
    # Servers of one engine load what the command line names in one order, and count alike; not what requests mix. So
    # each has mixes of its own: two ids of one name, or two names of one id, would be served as one.
    servers, rank = _beside(self) if by_request else (1, 0)
    is_shared = servers == 1
    known = identity(name, digest if is_shared else hashlib.sha256(f"{digest} {rank}".encode()).hexdigest())
    if chooser is not None:
        choosers.check_room(self, name)  # others were read meanwhile
        choosers.choosers_of(self)[known] = chooser
    ids = self.__dict__.setdefault("_flora_ids", {})
    if known not in ids:
        ids[known] = self.lora_id_counter.inc(1) if is_shared else id_of_own(self.lora_id_counter.inc(1), rank, servers)
    traffic.FAMILIES[known] = family
    _retired(self).pop(known, None)
    request.lora_name, request.lora_int_id, request.load_inplace = known, ids[known], False
    if offers(NAMED):
        request.served_name = name


async def _admit_offered(self: Any, request: Any) -> None:
    """What vLLM calls where it takes an admission hook."""
    if options_of_engine(self.engine_client) is None:
        return
    errors = importlib.import_module("vllm.exceptions")
    path = request.lora_path
    try:
        if choosers.is_chooser(path):
            raise AdapterError(f"{path!r}: DLP-LoRA needs a vLLM in which the plugin loads adapters itself")
        await _identify(self, request, not is_operators(self.static_lora_modules, request.lora_name, path))
    except AdapterError as error:
        kind = errors.VLLMNotFoundError if _is_missing(self, path) else errors.VLLMValidationError
        raise kind(str(error)) from error


async def release(self: Any, request: Any) -> None:
    """Free the engine's copy of an adapter that lost its name, once its last running request has finished."""
    engine = self.engine_client
    if choosers.choosers_of(self).pop(request.lora_name, None) is not None:
        return
    if _in_flight(engine, request.lora_name):
        in_background(self, _release_when_idle(self, request))
    # Choices of one chooser may be equal in content, and then are one adapter; whoever asks, all names count.
    elif all(live.lora_int_id != request.lora_int_id for live in dict.values(self.lora_requests)):
        _retire(self, request.lora_name)  # first: it may be asked for meanwhile
        await engine.remove_lora(request.lora_int_id)


async def _release_when_idle(self: Any, request: Any) -> None:
    while _in_flight(self.engine_client, request.lora_name):
        await asyncio.sleep(_POLL_S)
    # Not beside a load that brings it back.
    async with self.lora_resolver_lock[plain_name(request.lora_name)]:
        await release(self, request)


def _retired(self: Any) -> OrderedDict[str, None]:
    """Identities of adapters that were released and not asked for since, the oldest first."""
    return self.__dict__.setdefault("_flora_retired", OrderedDict())


def _retire(self: Any, known: str) -> None:
    """Contents, and prompts' mixes, are without number: ids are forgotten, long after any request can be on its way."""
    _retired(self)[known] = None
    while len(_retired(self)) > MOST_RETIRED:
        oldest, _ = _retired(self).popitem(last=False)
        self._flora_ids.pop(oldest, None)
        traffic.FAMILIES.pop(oldest, None)


def _in_flight(engine: Any, lora_name: str) -> bool:
    """Whether the engine runs a request of this adapter, or a handler may still ask with it."""
    processor = getattr(engine, "output_processor", None)
    states = processor.request_states.values() if processor is not None else ()
    is_lent = any(request.lora_name == lora_name for request in LENT.requests())
    return is_lent or any(identity_of(state) == lora_name for state in states)


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
            if not (path / CONFIG_NAME).is_file():
                return None
            _found.set((str(path), root))
            return lora_request(lora_name, 1, str(path))

    # vLLM's own resolver of the same directory takes LoRA only and follows names and links out of it.
    resolver.LoRAResolverRegistry.resolvers.pop("Filesystem Resolver", None)
    resolver.LoRAResolverRegistry.register_resolver("flora directory resolver", FloraDirectoryResolver())
