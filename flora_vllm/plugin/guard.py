"""What a client may ask of the server's adapter table, and what it is told: around frontend.py, which does the work.

Names are judged before anything is looked up or kept by them; a tenant gets the same answer for another's adapter as
for one that does not exist; an answer is valid text of bounded length and names no path that the client did not send.
"""

import asyncio
import functools
import importlib
import logging
import weakref
from http import HTTPStatus
from typing import Any

from flora_vllm.errors import adapter_error, bounded, without_paths
from flora_vllm.formats.limits import brief
from flora_vllm.formats.paths import path_fault
from flora_vllm.plugin.access import CURRENT, ScopedRequests, is_operators
from flora_vllm.plugin.answers import error_kind
from flora_vllm.plugin.handed import is_handed
from flora_vllm.plugin.lasting import to_its_end
from flora_vllm.plugin.mix_paths import ENCODED
from flora_vllm.plugin.names import name_fault
from flora_vllm.plugin.options import FloraOptions, options_of

logger = logging.getLogger(__name__)

MAY_NOT_LOAD = "this key may not load or unload adapters"


def install() -> None:
    """Wraps OpenAIServingModels and the text of error answers, once; inert without FLoRA."""
    serving: Any = importlib.import_module("vllm.entrypoints.openai.models.serving").OpenAIServingModels
    if hasattr(serving, "_flora_guarded"):
        return
    serving._flora_guarded = True
    for name, guarded in (("load_lora_adapter", _load), ("unload_lora_adapter", _unload), ("resolve_lora", _resolve)):
        setattr(serving, name, _if_flora(getattr(serving, name), guarded))
    make = serving.__init__

    @functools.wraps(make)
    def make_scoped(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if _options(self) is not None:
            self.lora_requests = ScopedRequests(self.lora_requests)
            self.lora_resolver_lock = Locks()

    serving.__init__ = make_scoped
    _bound_error_texts()


def _if_flora(original: Any, guarded: Any) -> Any:
    @functools.wraps(original)
    async def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = _options(self)
        if options is None:
            return await original(self, *args, **kwargs)
        return await guarded(functools.partial(original, self), self, options, *args, **kwargs)

    return chosen


async def _load(load: Any, self: Any, options: FloraOptions, request: Any, base_model_name: str | None = None) -> Any:
    is_known = is_operators(self.static_lora_modules, request.lora_name or "", request.lora_path or "")
    if (refused := load_fault(request, options, is_known=is_known)) is not None:
        return _error(*refused)
    sent_path = None if is_handed(request.lora_path or "") else request.lora_path
    return presentable(await load(request, base_model_name), sent_path)


async def _unload(unload: Any, self: Any, options: FloraOptions, request: Any) -> Any:
    name = request.lora_name
    if name and name not in self.lora_requests:
        return _error(f"The lora adapter {brief(name)} cannot be found.", HTTPStatus.NOT_FOUND)
    if not CURRENT.get().may_load:
        return _error(MAY_NOT_LOAD, HTTPStatus.FORBIDDEN)
    return presentable(await unload(request), None)


async def _resolve(resolve: Any, self: Any, options: FloraOptions, lora_name: str) -> Any:
    if name_fault(lora_name, options.adapter_names) is not None or not CURRENT.get().may_use(lora_name):
        return _error(f"the adapter {brief(lora_name)} does not exist", HTTPStatus.NOT_FOUND)
    return presentable(await to_its_end(self, resolve(lora_name)), None)


def _options(self: Any) -> FloraOptions | None:
    return options_of(self.engine_client.vllm_config.additional_config)


def load_fault(request: Any, options: FloraOptions, *, is_known: bool = False) -> tuple[str, HTTPStatus] | None:
    """Why this request to load is refused before vLLM looks at it: (message, status), or None.

    `is_known`: the command line names what it names.
    """
    if not request.lora_name or not request.lora_path:
        return None  # refused by vLLM's own check, in its words
    if (refused := name_refusal(request.lora_name, options)) is not None:
        return refused
    # A mix as the engine knows it may be longer than a path.
    is_mix = is_known and request.lora_path.startswith(ENCODED)
    if not is_mix and (fault := path_fault(request.lora_path)) is not None:
        return str(adapter_error(brief(request.lora_name), [fault])), HTTPStatus.BAD_REQUEST
    return None


def name_refusal(name: str, options: FloraOptions) -> tuple[str, HTTPStatus] | None:
    """Why the present request may load nothing under this name: (message, status), or None."""
    tenant = CURRENT.get()
    if (fault := name_fault(name, options.adapter_names)) is not None:
        return fault, HTTPStatus.BAD_REQUEST
    if not tenant.may_load or not tenant.may_use(name):
        return f"this key may not load an adapter named {brief(name)}", HTTPStatus.FORBIDDEN
    return None


def presentable(answer: Any, sent_path: str | None) -> Any:
    """The answer as the client may see it; an error of the server's own is logged and told without its text."""
    error = getattr(answer, "error", None)
    if error is None:
        return answer
    if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("an adapter could not be loaded: %s", error.message)
        error.message = "the server could not load the adapter; its log says why"
    else:
        error.message = bounded(without_paths(error.message, sent_path))
    return answer


def _error(message: str, status: HTTPStatus) -> Any:
    serving: Any = importlib.import_module("vllm.entrypoints.openai.models.serving")
    return serving.create_error_response(message=bounded(message), err_type=error_kind(status), status_code=status)


def _bound_error_texts() -> None:
    """Every error answer of this server is valid text of bounded length, whatever of the request it repeats."""
    for module in (
        importlib.import_module("vllm.entrypoints.serve.exception_handling.error_response"),
        importlib.import_module("vllm.entrypoints.serve.exception_handling.handlers.http"),
        importlib.import_module("vllm.entrypoints.serve.exception_handling.handlers.validation"),
        importlib.import_module("vllm.entrypoints.speech_to_text.realtime.connection"),
    ):
        vars(module)["sanitize_message"] = _bounded_after(module.sanitize_message)
    # Where in the request the fault is, of whose keys may be of any length.
    place = importlib.import_module("vllm.entrypoints.serve.exception_handling.handlers.validation")
    vars(place)["clean_loc_for_param"] = _bounded(place.clean_loc_for_param)


def _bounded_after(sanitize: Any) -> Any:
    @functools.wraps(sanitize)
    def sanitize_message(message: str) -> str:
        return bounded(sanitize(bounded(message)))

    return sanitize_message


def _bounded(write: Any) -> Any:
    @functools.wraps(write)
    def bounded_text(*args: Any) -> str:
        return bounded(write(*args))

    return bounded_text


class Locks:
    """Name -> the lock that is held while that name is looked up; there is none for a name that nobody is looking up.

    Stands in for vLLM's table of locks, which keeps one for every name that any client ever sent.
    """

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
