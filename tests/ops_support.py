"""Random layers, terms and loads for the op tests, and the error bound that every implementation must keep.

The bound. Let S be the output's absolute scale: the same equation with every number replaced by its size. A float32
result of sums over n products is within n 2^-24 S of the truth (standard forward bound, any order of summation).
Each bfloat16 rounding on the way to an output adds at most 2^-8 S: `ROUNDINGS` counts them per implementation.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from flora_vllm.ops.cpu.linear import NativeLinear
from flora_vllm.ops.dispatch import DispatchRule, PathChoice
from flora_vllm.ops.opaque_linear import OpaqueLinear
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.table import LinearKernel
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms
from flora_vllm.ops.torch_linear import TorchLinear

DTYPES = (torch.float32, torch.bfloat16)
IMPLEMENTATIONS = ("torch", "opaque", "native", "x86-64-v3", "x86-64")
# native: x scaled (or W modulated, or down x), then y. torch: also the base product, then the up product;
# its rows without terms round W x and then the sum with the bias.
ROUNDINGS = {"torch": 4, "opaque": 4}
SIZES = (24, 10, 67)
LOADS = ("identical", "distinct", "uniform", "zipf", "skewed")


class Case:
    """A random layer with its slots' terms, in one dtype."""

    def __init__(self, dtype: torch.dtype, in_features: int, sizes: Sequence[int] = SIZES, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.in_features, self.sizes = dtype, in_features, tuple(sizes)
        self.weight_OI = self.tensor(sum(sizes), in_features)
        self.bias_O: torch.Tensor | None = self.tensor(sum(sizes))
        self.slots: list[LayerTerms | None] = [None]

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def terms(self, size: int, rank=0, low=0, plain: str | None = None, offset=False) -> SliceTerms:
        """`plain`: "one", "even" (one weight for all outputs) or "each"; None: no W x."""
        return SliceTerms(
            plain_O=None if plain is None else self.plain(plain, size),
            a_RI=self.tensor(rank, self.in_features) if rank else None,
            b_RO=self.tensor(rank, size) if rank else None,
            down_RI=self.tensor(low, self.in_features) if low else None,
            up_RO=self.tensor(low, size) if low else None,
            offset_O=self.vector(size) if offset else None,
        )

    def plain(self, kind: str, size: int) -> torch.Tensor:
        return {"one": torch.ones(1), "even": self.vector(1), "each": self.vector(size)}[kind]

    def vector(self, size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.random)

    def add_slots(self, rank: int, count: int) -> "Case":
        """Slots of every kind around one rank: pure, mixed with all other terms, slices shared and missing."""
        for s in range(count):
            kinds: list[SliceTerms | None] = [
                self.terms(self.sizes[0], rank),
                self.terms(self.sizes[1 % len(self.sizes)], rank, low=1 + s % 5, plain="each", offset=True),
                None,
                self.terms(self.sizes[0], low=rank, plain=("one", "each")[s % 2]),
                self.terms(self.sizes[0], max(1, rank // 2), plain=("one", "even")[s % 2]),
                self.terms(self.sizes[0], low=s % 3, offset=True),
                self.terms(self.sizes[0], plain=("each", "even")[s % 2], offset=s % 3 == 1),
            ]
            parts = []
            for i, size in enumerate(self.sizes):
                kind = kinds[(s + i) % len(kinds)] if s % 4 else kinds[0]
                parts.append(None if kind is None else self.resized(kind, size))
            self.slots.append(tuple(parts))
        return self

    def resized(self, terms: SliceTerms, size: int) -> SliceTerms:
        """The terms with fresh output sides for a slice of `size`; the input side is shared."""
        plain_O = terms.plain_O
        return SliceTerms(
            plain_O if plain_O is None or len(plain_O) == 1 else self.vector(size),
            terms.a_RI,
            None if terms.b_RO is None else self.tensor(terms.b_RO.shape[0], size),
            terms.down_RI,
            None if terms.up_RO is None else self.tensor(terms.up_RO.shape[0], size),
            None if terms.offset_O is None else self.vector(size),
        )

    def make(self, implementation: str, path: PathChoice = "auto") -> LinearKernel:
        """The kernel object with all slots written; cheap constants, so that "auto" takes both ways in small cases."""
        rule = DispatchRule(path, constant=2.0, slope=0.25)
        if implementation == "torch":
            kernel = TorchLinear(self.weight_OI, self.base, self.sizes, rule, self.in_features)
        elif implementation == "opaque":
            kernel = OpaqueLinear(self.base, self.sizes, rule, self.in_features)
        else:
            kernel = NativeLinear(self.weight_OI, self.sizes, rule, implementation)
        for slot, terms in enumerate(self.slots[1:], 1):
            kernel.write_slot(slot, terms)
        return kernel

    def base(self, x_TI: torch.Tensor) -> torch.Tensor:
        return linear(x_TI, self.weight_OI)

    def reference(self, x_TI: torch.Tensor, segments: Segments) -> torch.Tensor:
        return reference_linear(x_TI, self.weight_OI, self.bias_O, self.sizes, self.slots, segments)

    def scale(self, x_TI: torch.Tensor, segments: Segments) -> torch.Tensor:
        """S of the bound."""
        bias = None if self.bias_O is None else self.bias_O.abs()
        slots = [None if terms is None else tuple(_absolute(part) for part in terms) for terms in self.slots]
        return reference_linear(x_TI.abs(), self.weight_OI.abs(), bias, self.sizes, slots, segments)

    def bound(self, implementation: str, x_TI: torch.Tensor, segments: Segments) -> torch.Tensor:
        terms = [part for layer in self.slots if layer for part in layer if part]
        ranks = [part.products + (0 if part.down_RI is None else part.down_RI.shape[0]) for part in terms]
        products = self.in_features + max(ranks, default=0) + 8
        relative = products * 2.0**-24
        if self.dtype == torch.bfloat16:
            # 1 % for products of roundings; bfloat16 rows of W and x are exact.
            relative += 1.01 * ROUNDINGS.get(implementation, 2) * 2.0**-8
        return relative * self.scale(x_TI, segments)


def _absolute(terms: SliceTerms | None) -> SliceTerms | None:
    if terms is None:
        return None
    fields = (terms.plain_O, terms.a_RI, terms.b_RO, terms.down_RI, terms.up_RO, terms.offset_O)
    return SliceTerms(*(None if tensor is None else tensor.abs() for tensor in fields))


def load(name: str, tokens: int, slots: int, random: torch.Generator) -> torch.Tensor:
    """Slot of each token; every load but "identical" mixes in tokens without an adapter."""
    if name == "identical":
        return torch.full((tokens,), slots)
    if name == "distinct":
        return torch.arange(tokens) % (slots + 1)
    if name == "uniform":
        return torch.randint(0, slots + 1, (tokens,), generator=random)
    if name == "zipf":
        weights = 1.0 / torch.arange(1, slots + 2)
        return torch.multinomial(weights, tokens, replacement=True, generator=random)
    assert name == "skewed", name
    slot_T = torch.randint(0, slots + 1, (tokens,), generator=random)
    return torch.where(torch.rand(tokens, generator=random) < 0.8, 1, slot_T)


def assert_close(y_TO: torch.Tensor, truth_TO: torch.Tensor, bound_TO: torch.Tensor) -> None:
    """Every number within its bound; NaN never is."""
    excess = ((y_TO.double() - truth_TO).abs() / bound_TO).nan_to_num(nan=torch.inf).max().item()
    assert excess <= 1, f"largest error is {excess:.3g} of what rounding allows"
