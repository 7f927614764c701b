"""Every error this package raises on purpose.

    FloraError
      AdapterError   an adapter that cannot be served exactly; the message lists every fault
      ClusterError   a Ray cluster that is not there, or an application on it that did not come up
      ConfigError    an option with a value that makes no sense
      HookError      vLLM is not the vLLM we checked; serving would not be safe
      StepError      a step's adapter tokens were not served by our op; its output must not be used

They refine a standard error, carry only a message and therefore pickle: they cross process and Ray borders.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec


class FloraError(Exception):
    """Base of all errors raised by flora_vllm."""


class AdapterError(FloraError, ValueError):
    """The adapter was refused; nothing of it was kept."""


class ClusterError(FloraError, RuntimeError):
    """The cluster is not there, or did not come up; the message says what Ray said."""


class ConfigError(FloraError, ValueError):
    """An option is unknown or its value is not allowed."""


class HookError(FloraError, RuntimeError):
    """A part of vLLM that we rely on is missing or has changed."""


class StepError(FloraError, RuntimeError):
    """The model ran, but not through our op."""


def check_installed(what: str, extra: str, *modules: str) -> None:
    """Raises ConfigError, with what installs them, if `what` needs modules that are not there."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ConfigError(f'{what} needs {" and ".join(missing)}: pip install "flora-vllm[{extra}]"')


# A message goes over HTTP and into logs. Bytes of UTF-8.
MAX_MESSAGE_BYTES = 8 << 10
_MAX_FAULT_BYTES = 2 << 10
# A module's or tensor's name; the start of a word only, so that a long one is looked at once.
_DOTTED = re.compile(r"(?<![\w-])[\w-]++(?:\.[\w-]++){2,}+")
# Two steps at least, so that fractions and patterns in a message stay.
_PATH = re.compile(r"(?<![\w.:>/])/[^\s'\"`,;:()\[\]<>]+/[^\s'\"`,;:()\[\]<>]*")


def adapter_error(where: str, faults: Sequence[str]) -> AdapterError:
    """One message for the faults of the adapter at `where`: all kinds of them if they fit into MAX_MESSAGE_BYTES."""
    count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
    head = f"adapter {bounded(where, _MAX_FAULT_BYTES)} cannot be served ({count}):"
    lines = [f"\n  - {line}" for line in in_kinds([bounded(fault, _MAX_FAULT_BYTES) for fault in faults])]
    # Room for the line that says how many are left out.
    left = MAX_MESSAGE_BYTES - len(head.encode()) - 64
    shown = 0
    while shown < len(lines) and (left := left - len(lines[shown].encode())) >= 0:
        shown += 1
    rest = f"\n  - and {len(lines) - shown} more, left out of this message" if shown < len(lines) else ""
    return AdapterError(head + "".join(lines[:shown]) + rest)


def in_kinds(faults: Sequence[str]) -> list[str]:
    """One line for all faults that differ in the module's name and in numbers only: an example and their count."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(re.sub(r"\d+", "#", _DOTTED.sub("*", fault)), []).append(fault)
    return [f"{same[0]}{f' (and {len(same) - 1} more like it)' if same[1:] else ''}" for same in kinds.values()]


def bounded(text: str, most_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """`text` as valid UTF-8 of at most `most_bytes` bytes: cut at the end, lone surrogates written as escapes."""
    data = text.encode(errors="backslashreplace")
    if len(data) > most_bytes:
        return data[: most_bytes - 3].decode(errors="ignore") + "…"
    return data.decode()


def without_paths(message: str, sent: str | None) -> str:
    """`message` with every absolute path but `sent` replaced."""
    if not sent or not sent.startswith("/"):
        return _PATH.sub("<path>", message)
    return sent.join(_PATH.sub("<path>", piece) for piece in message.split(sent))
