"""What an adapter does to one linear layer, as data: a tuple of terms of a few kinds.

    y = finish( Σ_c b_c ∘ W(a_c ∘ turn x)  +  Σ_l out_l ∘ up_l( mid_l ∘ down_l x )  +  D x ) + bias + offset

A family of adapters is a reader that states its files as these terms; a kind owns all its sides, one file each. The
table below is the only list of kinds: what cuts, folds, merges and counts terms loops over them and asks it.
See README.md beside this file for how to add a family or a kind.
"""

from collections.abc import Mapping, Sequence

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.terms import SliceTerms
from flora_vllm.terms.added import ADDED, Added
from flora_vllm.terms.arena import Arena
from flora_vllm.terms.bases import BASES, Bases
from flora_vllm.terms.circulant import CIRCULANT, Circulant
from flora_vllm.terms.dense import DENSE, Dense
from flora_vllm.terms.from_base import FROM_BASE, FromBase
from flora_vllm.terms.gain import GAIN, Gain
from flora_vllm.terms.gated import GATED, Gated
from flora_vllm.terms.kind import Cut, Draft, Kind, Merging, Probe, Term
from flora_vllm.terms.kron import KRON, Kron
from flora_vllm.terms.offset import OFFSET, Offset
from flora_vllm.terms.product import PRODUCT, Product
from flora_vllm.terms.replaced import REPLACED, Replaced
from flora_vllm.terms.routed import ROUTED, Routed
from flora_vllm.terms.shared import Shared
from flora_vllm.terms.sparse import SPARSE, Sparse
from flora_vllm.terms.swap import SWAP, Swap
from flora_vllm.terms.turn import TURN, Turn

__all__ = [
    "KINDS",
    "Added",
    "Arena",
    "Cut",
    "Dense",
    "FromBase",
    "Gain",
    "Gated",
    "Kind",
    "Kron",
    "Offset",
    "Probe",
    "Product",
    "Replaced",
    "Routed",
    "Shared",
    "Sparse",
    "Swap",
    "Term",
    "Turn",
    "check_fit",
    "fold",
    "kind_of",
    "merged",
    "resolve",
]

KINDS: Mapping[type, Kind] = {
    Product: PRODUCT,
    Turn: TURN,
    Replaced: REPLACED,
    Added: ADDED,
    Gated: GATED,
    Routed: ROUTED,
    Bases: BASES,
    Kron: KRON,
    Circulant: CIRCULANT,
    Sparse: SPARSE,
    Dense: DENSE,
    Gain: GAIN,
    Offset: OFFSET,
    Swap: SWAP,
    FromBase: FROM_BASE,
}


_ONE = torch.ones(1)


def kind_of(term: Term) -> Kind:
    return KINDS[type(term)]


def resolve(terms: Sequence[Term], probe: Probe) -> tuple[Term, ...]:
    """The terms without those that had to wait for the base. Raises AdapterError where the base does not fit them."""
    resolved: list[Term] = []
    for term in terms:
        becomes = kind_of(term).resolve
        resolved += (term,) if becomes is None else resolve(becomes(term, probe), probe)
    return tuple(resolved)


def fold(terms: Sequence[Term], cut: Cut) -> SliceTerms:
    """This rank's part of one slice, scales and gains folded. Raises AdapterError where this rank cannot hold it."""
    draft = Draft(cut)
    if not any(isinstance(term, Product) for term in terms):
        draft.add_plain(_ONE)
    # Most modules have one term, and an adapter hundreds of modules.
    for term in terms if len(terms) == 1 else sorted(terms, key=lambda term: kind_of(term).order):
        kind_of(term).fold(term, draft)
    return draft.finished()


def merged(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None, terms: Sequence[Term]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and bias that do what the terms do, in float32 (float64 for float64 weights), rounded once.

    The bias is None if neither base nor terms have one. Raises AdapterError if the terms don't fit the weight.
    """
    dtype = torch.float64 if weight_OI.dtype == torch.float64 else torch.float32
    base_OI = weight_OI.to(dtype)
    merging = Merging(base_OI, None if bias_O is None else bias_O.to(dtype), torch.zeros_like(base_OI))
    check_fit(tuple(weight_OI.shape), terms)
    if not any(isinstance(term, Product) for term in terms):
        PRODUCT.merge(Product(), merging)
    # Of several turns the last one is next to W.
    turns = [term for term in terms if isinstance(term, Turn)]
    others = [term for term in terms if not isinstance(term, Turn)]
    for term in sorted([*reversed(turns), *others], key=lambda term: kind_of(term).order):
        kind_of(term).merge(term, merging)
    bias = merging.bias_O
    if merging.offset_O is not None:
        bias = merging.offset_O if bias is None else bias + merging.offset_O
    bias_dtype = weight_OI.dtype if bias_O is None else bias_O.dtype
    return merging.sum_OI.to(weight_OI.dtype), None if bias is None else bias.to(bias_dtype).clone()


def check_fit(shape: tuple[int, ...], terms: Sequence[Term]) -> None:
    """Raises AdapterError if the terms' tensors don't fit a weight of this shape, (O, I)."""
    for term in terms:
        wanted = kind_of(term).shape(term)
        if len(shape) != 2 or any(want not in (None, size) for want, size in zip(wanted, shape, strict=False)):
            out_features, in_features = ("any" if want is None else want for want in wanted)
            raise AdapterError(f"terms of ({out_features}, {in_features}) do not fit a weight of shape {shape}")
