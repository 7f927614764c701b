"""New weights for a running engine, refused where the old ones are no tensors any more.

On a CPU a layer's weight is packed once, for our op or for vLLM's, after the model was loaded and looked at. vLLM would
find an empty one in its place half way through, and leave a model that cannot run.
"""

import functools
import importlib
from typing import Any

from flora_vllm.errors import ConfigError
from flora_vllm.plugin.options import options_of

CALLS = ("reload_weights", "start_weight_update")


def install() -> None:
    """Wraps what begins to replace weights in a worker, and the engine core's calls of it; inert without FLoRA.

    The core asks first: an exception of several ranks would leave all answers but the first unread (refusals.py).
    """
    worker: Any = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    core: Any = importlib.import_module("vllm.v1.engine.core").EngineCore
    for name in CALLS:
        setattr(worker, name, _checked(getattr(worker, name)))
    call = core.collective_rpc

    @functools.wraps(call)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if method in CALLS:
            for layer in call(self, _packed_layer):
                _refuse(layer)
        return call(self, method, *args, **kwargs)

    core.collective_rpc = collective_rpc


def _checked(original: Any) -> Any:
    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(_packed_layer(self))
        return original(self, *args, **kwargs)

    return run


def _packed_layer(worker: Any) -> str | None:
    """A linear layer of this worker's model whose weight was packed; None without one, or without FLoRA."""
    if options_of(worker.vllm_config.additional_config) is None:
        return None
    linear = importlib.import_module("vllm.model_executor.layers.linear").LinearBase
    for name, module in worker.get_model().named_modules():
        weight = getattr(module, "weight", None) if isinstance(module, linear) else None
        if weight is not None and not weight.numel():
            return name
    return None


def _refuse(layer: str | None) -> None:
    if layer is not None:
        raise ConfigError(
            f"the base's weights cannot be replaced while this engine runs: that of {layer!r} is packed for the CPU; "
            "start the server anew with the new weights, or without --enable-flora"
        )
