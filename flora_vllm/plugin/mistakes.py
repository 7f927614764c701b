"""A user's mistake on a server's command line is one line, not the end of a hundred lines of traceback.

Only for errors of ours, only where `vllm serve` and its like parse a command line: in a script of the user's own the
traceback shows where it went wrong. `VLLM_LOGGING_LEVEL=DEBUG` brings every traceback back.
"""

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from flora_vllm.errors import ConfigError, FloraError, StepError

_REFUSAL = re.compile(r"(Worker failed with error ')?adapter .* cannot be served")
# Words that only a path begins with; anything else may be a hub id.
_PATH_BEGINNINGS = ("/", "./", "../", "~")


def is_users(error: BaseException | None) -> bool:
    """Whether `error` says all there is to say: one of ours, but not of a step that went wrong.

    vLLM turns the refusal of one of --lora-modules into a ValueError, and one that a worker sends into a RuntimeError.
    """
    is_refusal = isinstance(error, ValueError | RuntimeError) and _REFUSAL.match(str(error)) is not None
    return is_refusal or (isinstance(error, FloraError) and not isinstance(error, StepError))


def wants_tracebacks() -> bool:
    return os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "DEBUG"


def tell_in_one_line() -> None:
    """From here on this process tells a user's mistake that ends it in its message alone. May be called often."""
    if sys.excepthook is _tell or wants_tracebacks():
        return
    _others.append(sys.excepthook)
    sys.excepthook = _tell


_others: list[Any] = []


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if is_users(error):
        print(f"flora-vllm: error: {error}\n(VLLM_LOGGING_LEVEL=DEBUG shows where it was found)", file=sys.stderr)
    else:
        _others[-1](kind, error, trace)


class _OneLine:
    """Makes log records; those of vLLM's that tell a user's mistake without its traceback."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        error = record.exc_info[1] if record.exc_info and record.name.startswith("vllm.") else None
        if is_users(error) and not wants_tracebacks():
            record.msg, record.args = f"{record.getMessage()} {error}", ()
            record.exc_info = record.exc_text = None
        return record


@functools.cache
def log_in_one_line() -> None:
    """vLLM's log shows a user's mistake without its traceback, in this process. May be called often.

    Not at a handler: workers come here before vLLM has made its own, and it makes them anew with each configuration.
    """
    logging.setLogRecordFactory(_OneLine(logging.getLogRecordFactory()))


def check_lora_modules(modules: Sequence[Any] | None) -> None:
    """Refuse now what would fail minutes later, with the model loaded. Raises ConfigError with every fault."""
    from flora_vllm.formats.tasks import split_task

    faults = []
    for module in modules or ():
        path = Path(split_task(str(module.path))[0]).expanduser()
        if str(module.path).startswith(_PATH_BEGINNINGS) and not path.is_dir():
            faults.append(f"{module.name}={module.path}: {'not a directory' if path.exists() else 'no such directory'}")
        elif path.is_dir() and not (path / "adapter_config.json").is_file():
            faults.append(f"{module.name}={module.path}: no adapter_config.json in it")
    if faults:
        raise ConfigError(f"--lora-modules: {'; '.join(faults)}")
