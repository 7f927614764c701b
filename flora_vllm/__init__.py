"""Serve FLoRA, LoRA, IA3 and HiRA adapters from stock vLLM, mixed in one batch.

The names below are the public ones; everything else may change. They are imported at first use, so that
`import flora_vllm` is quick and works without vLLM, PEFT, Ray, Triton or a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flora_vllm.errors import AdapterError, ClusterError, ConfigError, FloraError, HookError, StepError
    from flora_vllm.formats import read_adapter, write_flora
    from flora_vllm.plugin.offline import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AdapterError",
    "ClusterError",
    "ConfigError",
    "FloraError",
    "HookError",
    "StepError",
    "__version__",
    "read_adapter",
    "write_flora",
]

_HOME = {
    "LLM": "flora_vllm.plugin.offline",
    "AdapterError": "flora_vllm.errors",
    "ClusterError": "flora_vllm.errors",
    "ConfigError": "flora_vllm.errors",
    "FloraError": "flora_vllm.errors",
    "HookError": "flora_vllm.errors",
    "StepError": "flora_vllm.errors",
    "read_adapter": "flora_vllm.formats",
    "write_flora": "flora_vllm.formats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flora_vllm' has no attribute '{name}'; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
