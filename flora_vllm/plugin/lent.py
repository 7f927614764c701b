"""Which adapters the server's request handlers may still ask the engine with: each is in use until nobody can.

A handler looks its LoRARequest up once and may ask with it many times: beam search once a token, /v1/responses once a
turn, in the background, too. Between two of them the engine knows of no request. So what a handler gets is lent: an
object of its own, in use for as long as anything refers to it, however its request ends.
"""

import functools
import importlib
import itertools
import types
from typing import Any
from weakref import WeakValueDictionary

from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.identity import split_identity
from flora_vllm.plugin.options import options_of_engine

UNLOADS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels._release_lora"  # patches/0003


@functools.cache
def _kind() -> Any:
    """A LoRARequest that can be told when nothing refers to it; engines get copies of it, of vLLM's own class."""
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    return types.new_class("LentRequest", (lora_request,), {"weakref": True})


class Lent:
    """The LoRARequests that are lent now."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._requests: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def lend(self, request: Any) -> Any:
        kind = _kind()
        lent = kind(**{name: getattr(request, name) for name in kind.__struct_fields__})
        self._requests[next(self._numbers)] = lent
        return lent

    def requests(self) -> list[Any]:
        return [*self._requests.values()]


LENT = Lent()


def is_lent(request: Any) -> bool:
    """Whether the server has lent it: then its name is an identity."""
    return isinstance(request, _kind())


def install() -> None:
    """Replaces a method of vLLM's handlers, and where vLLM asks an engine what is in use; inert without FLoRA."""
    serving: Any = importlib.import_module("vllm.entrypoints.serve.engine.serving").BaseServing
    look_up = serving._maybe_get_adapters

    @functools.wraps(look_up)
    def lend(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = look_up(self, *args, **kwargs)
        if found is None or options_of_engine(getattr(self.models, "engine_client", None)) is None:
            return found
        # Trainers put requests of their own into the server's table.
        return found if split_identity(found.lora_name)[1] is None else LENT.lend(found)

    serving._maybe_get_adapters = lend
    if not offers(UNLOADS):
        return
    engine: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
    uses = engine.uses_lora

    @functools.wraps(uses)
    def uses_lora(self: Any, lora_id: int) -> bool:
        return uses(self, lora_id) or any(request.lora_int_id == lora_id for request in LENT.requests())

    engine.uses_lora = uses_lora
