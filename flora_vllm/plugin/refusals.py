"""Our refusal of an adapter, found in what an engine's errors say: they cross its processes as text."""

import functools
import importlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.options import options_of

logger = logging.getLogger(__name__)

INVALID = "vllm.exceptions:LoRAAdapterInvalidError"  # patches/0004

# Of refusals for want of room, or on another rank: the same content may be taken at another time.
_PASSING = (
    "that may run beside it",  # memory.py
    "has no room beside the others",
    "pinned adapters have all",  # manager.py
    "pinned adapters leave",  # worker_manager.py
    "the server cannot keep a copy",  # loader.py
    "another rank of this engine refused it",  # probe.py
)
_OUR_MESSAGE = re.compile(r"adapter .*? cannot be served \(\d+ faults?\):(?:\n  - [^\n]*)+", re.DOTALL)
_END_OF_RPC_ERROR = re.compile(r"', please check the stack trace.*$", re.DOTALL)


def our_message(text: str) -> str | None:
    """Our refusal inside an engine's error text, or None if the error is not ours."""
    match = _OUR_MESSAGE.search(text.replace("\\n", "\n"))
    return _END_OF_RPC_ERROR.sub("", match[0]) if match else None


def is_passing(message: str) -> bool:
    """Whether a refusal is no fault of the adapter's content, as far as it says."""
    return any(words in message for words in _PASSING)


def refusal(error: Exception) -> str | None:
    """Why an adapter was refused, if that is what an engine's error says."""
    if offers(INVALID):
        invalid = importlib.import_module("vllm.exceptions").LoRAAdapterInvalidError
        return getattr(error, "reason", None) if isinstance(error, invalid) else None
    return our_message(str(error))


def as_vllm_says(error: Exception) -> Exception:
    """A refusal as the engine's core has to raise it to be known as one by whoever asked."""
    if isinstance(error, AdapterError) and offers(INVALID):
        return importlib.import_module("vllm.exceptions").LoRAAdapterInvalidError(str(error))
    return error


@dataclass(frozen=True)
class Refused:
    """A worker's answer to a load or a pin in place of the exception."""

    error: Exception


def answer_with_refusals() -> None:
    """Have workers answer a load or a pin that they refuse or, one of several ranks, fail at, and the engine raise it.

    An exception would leave the answers of the ranks after it unread (vLLM's multiprocess executor stops at the first),
    and every later call of all ranks, a step's too, would be given the answer of the call before it.
    """
    worker: Any = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    executor: Any = importlib.import_module("vllm.v1.executor.abstract").Executor

    def add_lora(self: Any, lora_request: Any) -> bool:
        answers = self.collective_rpc("add_lora", args=(lora_request,))
        refused = _refused(answers)
        if refused:
            if len(refused) < len(answers):  # never on some ranks only
                self.remove_lora(lora_request.lora_int_id)
            raise refused[0]
        return all(answers)

    def pin_lora(self: Any, lora_id: int) -> bool:
        answers = self.collective_rpc("pin_lora", args=(lora_id,))
        if refused := _refused(answers):
            raise refused[0]
        return all(answers)

    asks: dict[str, Callable[..., bool]] = {"add_lora": add_lora, "pin_lora": pin_lora}
    for name, ask in asks.items():
        setattr(worker, name, _answering(getattr(worker, name)))
        setattr(executor, name, functools.wraps(getattr(executor, name))(ask))


def _answering(act: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A worker's method, which answers where it would have raised."""

    @functools.wraps(act)
    def answer(self: Any, adapter: Any) -> Any:
        try:
            return act(self, adapter)
        except Exception as error:
            if isinstance(error, AdapterError) or refusal(error) is not None:
                return Refused(error)
            if options_of(self.vllm_config.additional_config) is None or self.parallel_config.world_size == 1:
                raise
            logger.exception("%s of adapter %r failed", act.__name__, getattr(adapter, "lora_name", adapter))
            return Refused(RuntimeError(f"{type(error).__name__}: {error}"))

    return answer


def _refused(answers: Sequence[Any]) -> list[Exception]:
    return [given.error for given in answers if isinstance(given, Refused)]
