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


def adapter_error(where: str, faults: Sequence[str]) -> AdapterError:
    """One message for all faults of the adapter at `where`."""
    count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
    return AdapterError(f"adapter {where} cannot be served ({count}):\n" + "\n".join(f"  - {f}" for f in faults))
