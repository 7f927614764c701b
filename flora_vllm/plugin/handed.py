"""Adapters that are handed over instead of named by a path: tensors on a request, or files in an upload.

Trainers keep an adapter's tensors in memory and give vLLM a LoRARequest of their own with `peft_config` and
`lora_tensors`. Everything behind reads two files, so both kinds become a directory of this process until the workers
have made their copies of it; or of the supervisor's, who loads them again if the server dies, and removes them when
they are not served any more. Nothing is ever unpickled.
"""

import atexit
import enum
import functools
import importlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME, digest_of
from flora_vllm.plugin import scratch

logger = logging.getLogger(__name__)

_NAME_LETTERS = 32
_OWN_NAME = re.compile(rf"[0-9a-f]{{{_NAME_LETTERS}}}")
_users: Counter[Path] = Counter()
# Uploads are written in threads.
_lock = threading.Lock()


def _root() -> Path:
    with _lock:
        return _make_root()


@functools.cache
def _make_root() -> Path:
    if kept := os.environ.get(scratch.KEPT_UPLOADS):
        return Path(kept)
    root = scratch.make(scratch.HANDED)
    atexit.register(scratch.remove, root)
    return root


def is_handed(path: str) -> bool:
    """Whether the directory is of such an adapter: named as `directory_of` names them, which `..` is not."""
    own = Path(path)
    return own.parent.name.startswith(scratch.HANDED) and own.parent == _root() and bool(_OWN_NAME.fullmatch(own.name))


@contextmanager
def directory_of(config: bytes, weights: bytes) -> Iterator[str]:
    """A directory with the adapter; equal content has the same path. It is there within the context, or longer.

    Raises AdapterError if there is no room for it."""
    files = {CONFIG_NAME: config, WEIGHTS_NAME: weights}
    try:
        path = _root() / digest_of(files)[:_NAME_LETTERS]
        if not _is_used(path):
            _write(path, files)
    except OSError as error:
        raise no_room(len(config) + len(weights), error) from error
    try:
        yield str(path)
    finally:
        with _lock:
            _users[path] -= 1
            if not _users[path]:
                del _users[path]
                if not os.environ.get(scratch.KEPT_UPLOADS):
                    shutil.rmtree(path, ignore_errors=True)


def _is_used(path: Path) -> bool:
    """Whether it is there; then it has one user more."""
    with _lock:
        if path in _users:
            _users[path] += 1
        return path in _users


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    """Its first user's, unless another was faster; nobody waits for whoever writes."""
    written = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        for name, content in files.items():
            (written / name).write_bytes(content)
        with _lock:
            try:
                written.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
                os.utime(path)  # kept from before, or by another server: used anew
            _users[path] += 1
    finally:
        shutil.rmtree(written, ignore_errors=True)


def no_room(needed: int, error: OSError) -> AdapterError:
    """`needed` bytes of an adapter could not be written to the temporary directory; where that is, the log says."""
    logger.error("an adapter of %d bytes cannot be kept in %s: %s", needed, tempfile.gettempdir(), error)
    return AdapterError(
        f"the server cannot keep the adapter's {needed} bytes in its temporary directory ({error.strerror}); make room "
        "there, or give the server a path"
    )


@contextmanager
def on_disk(request: Any) -> Iterator[Any]:
    """The LoRARequest with a path, as vLLM's own class; the same request if it is one. Raises AdapterError."""
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    tensors = getattr(request, "lora_tensors", None)
    if tensors is None:
        yield request if type(request) is lora_request else plain(request)
        return
    with directory_of(*_files_of(request, tensors)) as path:
        yield plain(request, lora_path=path)


def plain(request: Any, **changes: Any) -> Any:
    """A LoRARequest of vLLM's own class: processes that know no other would get one without its name or path."""
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    values = {name: getattr(request, name) for name in lora_request.__struct_fields__}
    return lora_request(**{**values, **changes})


def _files_of(request: Any, tensors: Mapping[str, Any]) -> tuple[bytes, bytes]:
    from safetensors.torch import save

    config: Any = getattr(request, "peft_config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping) or not isinstance(tensors, Mapping):
        raise adapter_error(
            repr(request.lora_name),
            [
                f"a request with lora_tensors needs peft_config, the content of {CONFIG_NAME} as a mapping, got "
                f"{type(config).__name__}; lora_tensors must be a mapping of names to tensors, got "
                f"{type(tensors).__name__}"
            ],
        )
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        return json.dumps(dict(config), default=_as_json).encode(), save(own, metadata={"format": "pt"})
    except (TypeError, ValueError) as error:
        raise AdapterError(f"adapter {request.lora_name!r}: peft_config cannot be written as JSON ({error})") from error


def _as_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    raise TypeError(f"{value!r} of type {type(value).__name__}")
