"""The norms of a vLLM model: which of them run on a step's tokens, by calls that an adapter's rows can be taken from.

Models have norms fused into other kernels, read their weights elsewhere, or run them on other rows; a run of the model
shows which are plainly called. A compiled model fuses them, too, unless the operator has them called (--flora-norms).
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CompilationMode
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from flora_vllm.norms import AdaptedNorm
from flora_vllm.plugin.attach import LEFT_OUT, UNKNOWN_ROWS, Attached
from flora_vllm.plugin.hook_table import NORM_HOOKS
from flora_vllm.plugin.hooks import verify
from flora_vllm.plugin.trial import TOKENS, Trial
from flora_vllm.slots import LinearLayout, SliceLayout
from flora_vllm.step import Step

# By their own class: of subclasses nobody knows what they do.
_NORMS = (RMSNorm, GemmaRMSNorm, torch.nn.LayerNorm)
_COMPILED = (
    "norms are compiled into the model, where no adapter can follow; start the server with --flora-norms, which has "
    "each called for itself, or with --enforce-eager"
)


def norms_of(model: Any) -> dict[str, Any]:
    """The norms with a weight, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in _NORMS and module._parameters.get("weight") is not None
    }


def attach_norms(
    trial: Trial,
    attached: Attached,
    step_of: Callable[[str], Step | None],
    only: Callable[[str], bool],
    config: Any,
    device: torch.device,
    *,
    compiled_too: bool,
) -> None:
    """Take over every norm that adapters may change, and have `attached` say why of the others.

    Arguments as those of `attach`. `compiled_too`: in a compiled model, too, as a call of its own for each.
    """
    norms = trial.norms
    if not norms:
        return
    is_compiled = config.compilation_config.mode not in (None, CompilationMode.NONE)
    if is_compiled and not compiled_too:
        attached.refused |= dict.fromkeys(norms, _COMPILED)
        return
    verify(device.type, NORM_HOOKS)
    for name, module in norms.items():
        step = step_of(name)
        if step is None or not only(name):
            attached.refused[name] = UNKNOWN_ROWS if step is None else LEFT_OUT
        elif hasattr(module.weight, "weight_loader"):
            attached.refused[name] = "this model changes the norm's weight when it is loaded, an adapter's it would not"
        elif trial.fault is not None:
            attached.refused[name] = trial.fault
        elif {*trial.rows.get(name, ())} != {TOKENS}:
            attached.refused[name] = (
                "this norm is not called with a step's tokens as rows, where adapters cannot follow"
            )
        else:
            size = module.weight.numel()
            part = SliceLayout(name, size, 0, 0, size)
            attached.layouts[name] = LinearLayout(name, size, 0, size, (part,), size)
            attached.dtypes[name] = module.weight.dtype
            attached.biases[name] = None
            attached.norms[name] = AdaptedNorm(module, step, is_compiled=is_compiled)
