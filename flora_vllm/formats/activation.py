"""Activated adapters (aLoRA, arXiv 2504.12397): where in a prompt an adapter takes over from the base model.

Tokens before the last occurrence of the adapter's invocation sequence are the base model's, those from its first token
on the adapter's; a prompt without it is the base model's to its end. So the base model's keys and values of what comes
before stay valid. PEFT 0.21 decides the same for LoRA (`peft/tuners/lora/variants.py::calculate_alora_offsets`);
here it is a property of the adapter, whatever its family.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

KEY = "alora_invocation_tokens"
MOST_TOKENS = 4096
ALLOWED = f"null, or a list of 1 to {MOST_TOKENS} token ids (integers of at least 0)"
_CODE = "q"  # 8 bytes a token
# PEFT hands the places to its adapted layers alone (`peft/peft_model.py`, `get_alora_offsets_for_forward`).
EVERYWHERE = (
    f"with {KEY} PEFT has it act on every token, where what comes before these is the base model's here; train without "
    "one of both"
)


def is_invocation(value: object) -> bool:
    """Whether a config may have this value; an empty list is PEFT's way to say that there is none."""
    return value in (None, [], {}) or (
        isinstance(value, list)
        and len(value) <= MOST_TOKENS
        and all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in value)
    )


def invocation_tokens(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The invocation sequence of a checked config; None: the adapter applies to every token."""
    return tuple(config.get(KEY) or ()) or None


def first_adapted_token(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Index of the first token that is the adapter's; None: the whole request is the base model's.

    Linear in the prompt, whatever the tokens: an adapter's author chooses one, its users the other.
    """
    size = array(_CODE).itemsize
    text, wanted = (array(_CODE, reversed(tokens)).tobytes() for tokens in (prompt, invocation))
    place = text.find(wanted)
    while place > 0 and place % size:
        place = text.find(wanted, place + 1)
    return None if place < 0 else len(prompt) - place // size - len(invocation)
