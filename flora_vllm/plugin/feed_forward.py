"""Which feed-forward blocks of a vLLM model rows can be routed through, expert by expert (`flora_vllm.feed_forward`).

A module with the children gate_up_proj, act_fn and down_proj is one if it is exactly down(act_fn(gate_up(x))): it is
run once with known outputs of the two layers, and every one is, for what it does may differ from layer to layer.
"""

import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from flora_vllm.experts import ACTIVATIONS
from flora_vllm.feed_forward import FeedForward, routed_terms
from flora_vllm.layers import Adapted, AdaptedLinear
from flora_vllm.ops.terms import LayerTerms

logger = logging.getLogger(__name__)

_GATE_UP, _ACTIVATION, _DOWN = "gate_up_proj", "act_fn", "down_proj"
# transformers' names -> those of ACTIVATIONS.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# What roundings of one activation may differ by, in float32, for inputs up to 4.
_SAME = 1e-4


def take_over(
    model: torch.nn.Module, layers: Mapping[str, Adapted], device: torch.device
) -> Iterator[tuple[str, frozenset[str]]]:
    """Join the adapted layers of each such block; the names of these layers, and of what its activation is."""
    for name, module in model.named_modules():
        names = f"{name}.{_GATE_UP}", f"{name}.{_DOWN}"
        gate_up, down = (layers.get(each) for each in names)
        activation = getattr(module, _ACTIVATION, None)
        if not isinstance(gate_up, AdaptedLinear) or not isinstance(down, AdaptedLinear) or activation is None:
            continue
        if _is_block(module, device):
            FeedForward(gate_up, activation, down, device)
            known = _names_of(activation, device)
            yield from ((each, known) for each in names)


def _names_of(activation: Any, device: torch.device) -> frozenset[str]:
    """What transformers calls the activation; measured, for a class does not say which of them its instance is."""
    gate, up = torch.linspace(-4, 4, 64, device=device)[None], torch.full((1, 64), 2.0, device=device)
    found = activation(torch.cat([gate, up], 1))
    return frozenset(
        name for name, ours in _ACTIVATIONS.items() if (ACTIVATIONS[ours](gate, up) - found).abs().max() < _SAME
    )


def routed_faults(layers: Mapping[str, LayerTerms], blocks: Mapping[str, Collection[str]]) -> list[str]:
    """The faults of an adapter with experts of blocks where this model has none, or other ones."""
    routed = {name: [*filter(None, routed_terms(terms))] for name, terms in layers.items()}
    strange = [name for name, terms in routed.items() if terms and name not in blocks]
    if strange:
        return [
            f"{len(strange)} layers, the first {strange[0]!r}, have experts of a whole feed-forward block, which is "
            f"served where a block is {_DOWN}({_ACTIVATION}({_GATE_UP}(x))) alone; this model's is not: serve the "
            "adapter on a model of the Llama, Qwen2, Mistral, Gemma or Phi-3 kind"
        ]
    return [
        f"layer {name!r}: its experts have the activation {term.activation!r}, the model has "
        f"{' or '.join(sorted(blocks[name])) or 'another'}; was the adapter trained on another model?"
        for name, terms in routed.items()
        for term in terms[:1]
        if term.activation not in (None, *blocks[name])
    ]


def _is_block(module: Any, device: torch.device) -> bool:
    """Whether what comes in goes to gate_up alone, its output through the activation to down, and down's comes out."""
    gate_up, down = getattr(module, _GATE_UP), getattr(module, _DOWN)
    read: dict[str, torch.Tensor] = {}

    def recording(key: str, output: torch.Tensor) -> Any:
        def apply(_layer: Any, x: torch.Tensor, _bias: Any = None) -> torch.Tensor:
            read[key] = x
            return output.clone()  # ranks add theirs up in place

        return apply

    numbers = torch.Generator().manual_seed(0)

    def known(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(-8, 9, (1, width), generator=numbers).to(device, dtype)  # which ranks can add up exactly

    x = known(gate_up.input_size, gate_up.params_dtype)
    made = {
        key: known(sum(layer.output_partition_sizes), layer.params_dtype)
        for key, layer in ((_GATE_UP, gate_up), (_DOWN, down))
    }
    methods = [(layer, layer.quant_method) for layer in (gate_up, down)]
    try:
        for (layer, method), key in zip(methods, made, strict=True):
            layer.quant_method = copy.copy(method)
            layer.quant_method.apply = recording(key, made[key])
        with torch.no_grad():
            found = module(x.clone())
            inner = getattr(module, _ACTIVATION)(made[_GATE_UP])
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError) as error:
        logger.info("%s is no feed-forward block to route rows through: %s", type(module).__name__, error)
        return False
    finally:
        for layer, method in methods:
            layer.quant_method = method
    ranks = down.tp_size if down.reduce_results else 1  # each has given the same
    wanted = ((read.get(_GATE_UP), x), (read.get(_DOWN), inner), (found, ranks * made[_DOWN]))
    return all(isinstance(one, torch.Tensor) and torch.equal(one, other) for one, other in wanted)
