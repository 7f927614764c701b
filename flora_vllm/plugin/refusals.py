"""Our refusal of an adapter, found in what an engine's errors say: they cross its processes as text."""

import importlib
import re

from flora_vllm.plugin.hooks import offers

INVALID = "vllm.exceptions:LoRAAdapterInvalidError"  # patches/0004

_OUR_MESSAGE = re.compile(r"adapter .*? cannot be served \(\d+ faults?\):(?:\n  - [^\n]*)+", re.DOTALL)
_END_OF_RPC_ERROR = re.compile(r"', please check the stack trace.*$", re.DOTALL)


def our_message(text: str) -> str | None:
    """Our refusal inside an engine's error text, or None if the error is not ours."""
    match = _OUR_MESSAGE.search(text.replace("\\n", "\n"))
    return _END_OF_RPC_ERROR.sub("", match[0]) if match else None


def refusal(error: Exception) -> str | None:
    """Why an adapter was refused, if that is what an engine's error says."""
    if offers(INVALID):
        invalid = importlib.import_module("vllm.exceptions").LoRAAdapterInvalidError
        return getattr(error, "reason", None) if isinstance(error, invalid) else None
    return our_message(str(error))
