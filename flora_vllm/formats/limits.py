"""How much of an adapter is looked at, decided before the looking: an adapter is a stranger's file in a shared server.

Every number is several times what the largest honest checkpoint needs (rank 256 on every linear layer of a 126-layer
model: 1,764 tensors, a header of 300 KB, a config of 70 KB that lists each module by name).
"""

from collections.abc import Mapping, Sequence
from typing import Any

MAX_CONFIG_BYTES = 1 << 20
MAX_SIDECAR_BYTES = 64 << 10
MAX_WEIGHTS_BYTES = 8 << 30
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536
# A tensor's name, a module's, and an entry of a list of modules.
MAX_NAME_LETTERS = 512
# Any list or object in adapter_config.json, and how deep they may lie in each other.
MAX_ENTRIES = 16_384
MAX_DEPTH = 16
MAX_PATTERN_LETTERS = 8_192
# Patterns of one rank_pattern, alpha_pattern, … that are more than a module's name, and their letters together.
MAX_PATTERNS = 256
MAX_PATTERNS_LETTERS = 16_384
# A pattern with its repeats written out (`regex` does write them out): atoms.
MAX_PATTERN_ATOMS = 20_000
# What a message says of one value.
MAX_SHOWN_LETTERS = 120
_SHOWN_ENTRIES = 8


def brief(text: str) -> str:
    """`repr(text)`, cut to what a message may say of one value; what is no text (surrogates) as escapes."""
    if len(text) <= MAX_SHOWN_LETTERS:
        return ascii(text) if not text.isprintable() else repr(text)
    return f"{ascii(text[:MAX_SHOWN_LETTERS])[:MAX_SHOWN_LETTERS]}… ({len(text)} letters)"


def shown(value: Any) -> str:
    """`repr(value)` cut to what fits in one line of a message; a long list is not written out first."""
    if isinstance(value, str):
        return brief(value)
    if isinstance(value, list) and len(value) > _SHOWN_ENTRIES:
        head = ", ".join(shown(entry) for entry in value[:_SHOWN_ENTRIES])
        return f"[{head[:MAX_SHOWN_LETTERS]}, … ({len(value)} entries)]"
    if isinstance(value, dict) and len(value) > _SHOWN_ENTRIES:
        head = ", ".join(f"{brief(key)}: …" for key in list(value)[:_SHOWN_ENTRIES])
        return f"{{{head[:MAX_SHOWN_LETTERS]}, … ({len(value)} entries)}}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_LETTERS else f"{text[:MAX_SHOWN_LETTERS]}…"


def name_fault(name: str) -> str | None:
    """Why `name` cannot be a tensor's or a module's, None if it can."""
    if len(name) > MAX_NAME_LETTERS:
        return f"the name {brief(name)} is too long; at most {MAX_NAME_LETTERS} letters are read"
    if not name.isprintable():
        return f"the name {brief(name)} has characters that cannot be printed"
    return None


def value_fault(value: Any, where: str = "it", depth: int = 0) -> str | None:
    """Why a parsed JSON value is too large to be looked at, None if it is not."""
    if isinstance(value, str):
        if len(value) > MAX_PATTERN_LETTERS:
            return f"{where} is a text of {len(value)} letters; at most {MAX_PATTERN_LETTERS} are read"
        return None
    if not isinstance(value, Sequence | Mapping):
        return None
    if len(value) > MAX_ENTRIES:
        return f"{where} has {len(value)} entries; at most {MAX_ENTRIES} are read"
    if depth == MAX_DEPTH and value:
        return f"{where} is nested more than {MAX_DEPTH} deep"
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, entry in pairs:
        key_fault = value_fault(key, f"a key of {where}") if isinstance(key, str) else None
        inside = brief(key) if depth == 0 and isinstance(key, str) else where
        if fault := key_fault or value_fault(entry, inside, depth + 1):
            return fault
    return None
