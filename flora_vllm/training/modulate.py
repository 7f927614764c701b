"""FLoRA's product on one linear layer, two ways, both differentiable: base calls on scaled inputs, or a scaled weight.

    stacked    Σ_j b_OR[:, j] ∘ W(a_RI[j] ∘ x)      R base products; W may be hidden behind a call
    modulated  (W ∘ (b_OR a_RI)) x                  one product; W must be readable

`b_OR` carries the reduction (divided by R for "mean"). Shape letters: T tokens (any leading shape), R rank,
I in features, O out features. Memory kept for backward: stacked R tensors (T, O) and the scaled inputs; modulated
x alone (the scaled weight is formed again in backward), with two (O, I) buffers alive inside one layer's backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

# What one pass over an (O, I) buffer costs, in multiply-adds per element of the base product; the ratio of arithmetic
# to memory speed of the device. Used for choosing a path only, never for a result.
PASS_COST = {"cpu": 24, "cuda": 1000}


def prefers_modulated(tokens: int, rank: int, device_type: str, training: bool) -> bool:
    """Whether the scaled weight is cheaper than R base products for `tokens` rows.

    Per element of W: stacked costs R·T forward and again R·T backward; modulated T + passes forward, and
    2·T + passes backward (input and weight gradient), where forming the product takes R + 2 passes.
    """
    cost = PASS_COST.get(device_type, PASS_COST["cuda"])
    stacked = rank * tokens * (2 if training else 1)
    modulated = 3 * tokens + 3 * cost * (rank + 2) if training else tokens + cost * (rank + 2)
    return modulated < stacked


def stacked_product(
    base: Callable[[torch.Tensor], torch.Tensor], x_TI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor
) -> torch.Tensor:
    """Semantics: sum(b_OR[:, j] * base(a_RI[j] * x_TI) for j in range(R)); `base` applies W without bias.

    Factors multiply in their own dtype (float32 as PEFT keeps them); each product enters `base` in x's dtype.
    Returns (T, O) in the wider of the two.
    """
    y_TO = b_OR[:, 0] * base((x_TI * a_RI[0]).to(x_TI.dtype))
    for j in range(1, a_RI.shape[0]):
        y_TO = y_TO + b_OR[:, j] * base((x_TI * a_RI[j]).to(x_TI.dtype))
    return y_TO


def modulated_product(
    weight_OI: torch.Tensor, x_TI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor
) -> torch.Tensor:
    """Semantics: x_TI @ (weight_OI * (b_OR @ a_RI)).T; returns (T, O) in x's dtype."""
    return _Modulated.apply(weight_OI, x_TI, a_RI, b_OR)


def modulated_weight(weight_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """Semantics: weight_OI * (b_OR @ a_RI), in the factors' dtype or wider."""
    return weight_OI * (b_OR @ a_RI)


class _Modulated(torch.autograd.Function):
    """Keeps x and the factors for backward and forms the scaled weight again there."""

    @staticmethod
    def forward(
        ctx: Any, weight_OI: torch.Tensor, x_TI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_OI, x_TI, a_RI, b_OR)
        with torch.autocast(x_TI.device.type, enabled=False):
            return torch.nn.functional.linear(x_TI, modulated_weight(weight_OI, a_RI, b_OR).to(x_TI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight_OI, x_TI, a_RI, b_OR = ctx.saved_tensors  # type: ignore[attr-defined]
        wants_weight, wants_x, wants_a, wants_b = ctx.needs_input_grad  # type: ignore[attr-defined]
        grad_weight = grad_x = grad_a = grad_b = None
        with torch.autocast(x_TI.device.type, enabled=False):
            if wants_x:
                grad_x = grad_TO @ modulated_weight(weight_OI, a_RI, b_OR).to(grad_TO.dtype)
            if wants_weight or wants_a or wants_b:
                # d(loss)/d(scaled weight), then through the elementwise product.
                grad_OI = grad_TO.reshape(-1, grad_TO.shape[-1]).mT @ x_TI.reshape(-1, x_TI.shape[-1])
                if wants_weight:
                    grad_weight = (grad_OI * (b_OR @ a_RI)).to(weight_OI.dtype)
                if wants_a or wants_b:
                    grad_OI = grad_OI.to(a_RI.dtype) * weight_OI
                    grad_OI = grad_OI.to(a_RI.dtype)
                    grad_a = b_OR.mT @ grad_OI if wants_a else None
                    grad_b = grad_OI @ a_RI.mT if wants_b else None
        return grad_weight, grad_x, grad_a, grad_b
