"""The equation as a loop: the oracle of every op. Never optimised, never used to serve."""

from collections.abc import Sequence

import torch

from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms


def reference_linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    sizes: Sequence[int],
    slots: Sequence[LayerTerms | None],
    segments: Segments,
) -> torch.Tensor:
    """y[t] = plain ∘ W x[t] + Σ_j b[j] ∘ W(a[j] ∘ x[t]) + (down x[t]) up + bias + offset, slice by slice, in float64.

    x is turned before the products and the sum swapped after the bias where a slot's rare terms say so.

    `sizes`: out features of each slice, in order, summing to O. `slots[s]`: the terms of slot s (None: not adapted).
    Returns (T, O) float64. Source: arXiv 2312.05677, equations 4-6, for the Hadamard part.
    """
    x, weight = x_TI.double(), weight_OI.double()
    bias = torch.zeros(weight.shape[0]).double() if bias_O is None else bias_O.double()
    y_TO = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=torch.float64)
    for slot, rows in segments:
        layer_terms = slots[slot]
        for t in rows.tolist():
            start = 0
            for i, size in enumerate(sizes):
                part = slice(start, start + size)
                terms = None if layer_terms is None else layer_terms[i]
                y_TO[t, part] = _one_token(x[t], weight[part], bias[part], terms)
                start += size
    return y_TO


def _one_token(
    x_I: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor, terms: SliceTerms | None
) -> torch.Tensor:
    if terms is None:
        return weight_OI @ x_I + bias_O
    rare = {stage: [term for term in terms.rare if term.stage == stage] for stage in ("input", "added", "output")}
    turned_I = x_I
    for term in rare["input"]:
        turned_I = term.apply(turned_I[None])[0]
    y = _products(turned_I, weight_OI, terms)
    if terms.down_RI is not None:
        assert terms.up_RO is not None, "a low-rank term has both sides"
        y = y + (terms.down_RI.double() @ x_I) @ terms.up_RO.double()
    for term in rare["added"]:
        y = y + term.apply(x_I[None])[0]
    y = y + bias_O
    if terms.offset_O is not None:
        y = y + terms.offset_O.double()
    for term in rare["output"]:
        y = term.apply(y[None])[0].to(y.dtype)
    return y


def _products(x_I: torch.Tensor, weight_OI: torch.Tensor, terms: SliceTerms) -> torch.Tensor:
    y = torch.zeros(weight_OI.shape[0], dtype=weight_OI.dtype)
    if terms.plain_O is not None:
        y = y + terms.plain_O.double() * (weight_OI @ x_I)
    if terms.a_RI is not None:
        assert terms.b_RO is not None, "scaled products have both sides"
        for a_I, b_O in zip(terms.a_RI.double(), terms.b_RO.double(), strict=True):
            y = y + b_O * (weight_OI @ (a_I * x_I))
    return y
