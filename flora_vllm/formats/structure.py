"""What adapters may have in common: everything in their files but the numbers."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.formats.files import CONFIG_NAME, SIDECAR_NAME, WEIGHTS_NAME
from flora_vllm.formats.tensor_file import LENGTH_BYTES, header_length, load_json_object

# Lists that PEFT makes of sets and saves in whatever order that gave.
_SETS = ("target_modules", "exclude_modules")
# Bytes of a text that is remembered; a few are.
_MOST_REMEMBERED = 1 << 16


def structure_of(files: Mapping[str, bytearray], task: str | None) -> str | None:
    """A digest that two adapters share exactly if they differ in the tensors' numbers alone; None of unreadable files.

    `task`: which of the adapter's tasks is asked for.
    """
    try:
        texts = [_text_of(files[CONFIG_NAME]), _text_of(files.get(SIDECAR_NAME, b"{}"))]
        data = files[WEIGHTS_NAME]
        header = memoryview(data)[: LENGTH_BYTES + header_length(memoryview(data), len(data))]
    except (KeyError, AdapterError):
        return None
    digest = hashlib.sha256(json.dumps([*texts, task, SIDECAR_NAME in files, len(data)]).encode())
    digest.update(header)
    return digest.hexdigest()


def _text_of(text: bytes | bytearray) -> str:
    # Most configs are the one before to the byte, and need not be parsed again.
    return (_remembered if len(text) <= _MOST_REMEMBERED else _canonical)(bytes(text))


def _canonical(text: bytes) -> str:
    values: dict[str, Any] = load_json_object(text)
    for key in _SETS:
        names = values.get(key)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            values[key] = sorted(names)
    return json.dumps(values)


_remembered = functools.lru_cache(maxsize=32)(_canonical)
