"""Every error this package raises on purpose.

    FloraError
      AdapterError   an adapter that cannot be served exactly; the message lists every fault
      ClusterError   a Ray cluster that is not there, or an application on it that did not come up
      ConfigError    an option with a value that makes no sense
      HookError      vLLM is not the vLLM we checked; serving would not be safe
      StepError      a step's adapter tokens were not served by our op; its output must not be used

They refine a standard error, carry only a message and therefore pickle: they cross process and Ray borders.
"""

from collections.abc import Sequence


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


# A message goes over HTTP and into logs. Bytes of UTF-8.
MAX_MESSAGE_BYTES = 8 << 10
_MAX_FAULT_BYTES = 2 << 10


def adapter_error(where: str, faults: Sequence[str]) -> AdapterError:
    """One message for the faults of the adapter at `where`: all of them if they fit into MAX_MESSAGE_BYTES."""
    count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
    head = f"adapter {bounded(where, _MAX_FAULT_BYTES)} cannot be served ({count}):"
    lines = [f"\n  - {bounded(fault, _MAX_FAULT_BYTES)}" for fault in faults]
    # Room for the line that says how many are left out.
    left = MAX_MESSAGE_BYTES - len(head.encode()) - 64
    shown = 0
    while shown < len(lines) and (left := left - len(lines[shown].encode())) >= 0:
        shown += 1
    rest = f"\n  - and {len(lines) - shown} more, left out of this message" if shown < len(lines) else ""
    return AdapterError(head + "".join(lines[:shown]) + rest)


def bounded(text: str, most_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """`text` as valid UTF-8 of at most `most_bytes` bytes: cut at the end, lone surrogates written as escapes."""
    data = text.encode(errors="backslashreplace")
    if len(data) > most_bytes:
        return data[: most_bytes - 3].decode(errors="ignore") + "…"
    return data.decode()
