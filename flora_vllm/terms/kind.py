"""What every kind of term answers for, and what the answers are written into.

A kind is one dataclass in a file of its own and one `Kind` value beside it; `terms.KINDS` is the table. Shape letters:
R rank, I in features, O out features; a term speaks of the whole module, a `Cut` of this rank's part of one slice.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from flora_vllm.ops.rare import RareTerm
from flora_vllm.ops.terms import SliceTerms
from flora_vllm.terms.arena import Arena, Write


class Term(Protocol):
    """A frozen dataclass of one of the kinds in `terms.KINDS`: tensors as the file has them, on the host."""


class Probe(Protocol):
    """The base, as far as terms may ask for it: one module's, whole, whatever the tensor-parallel size."""

    module: str

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        """Every linear layer, in the Hugging Face model's order, with its (O, I)."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the module."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model's weights."""
        ...

    @property
    def stores_in_out(self) -> bool:
        """Whether the Hugging Face model keeps W as (I, O), as its Conv1D does; here it is (O, I) all the same."""
        ...

    def product(self, x_NI: torch.Tensor) -> torch.Tensor:
        """W x by rows, without bias: (N, O) float32."""
        ...

    def squared_row_norms(self) -> torch.Tensor:
        """‖W_o‖² of each output: (O,) float32."""
        ...

    def weight(self) -> torch.Tensor:
        """W (O, I) float32: as many products as there are inputs, so for what cannot do with fewer."""
        ...

    def bias(self) -> torch.Tensor | None:
        """(O,) float32."""
        ...


@dataclass(frozen=True, eq=False)
class Cut:
    """This rank's part of one slice of a layer, within the module that a term speaks of.

    `bias_O`: the base's bias of these outputs; None if it has none. `adds_bias`: whether this rank is the one that
    adds biases and offsets (of the ranks that share a sum, one is). `sums`: whether its outputs are a part of a sum.
    """

    rows: slice
    columns: slice
    dtype: torch.dtype
    device: torch.device
    bias_O: torch.Tensor | None = None
    adds_bias: bool = True
    sums: bool = False
    # Input sides that slices of one fused checkpoint module, or layers, share: one copy of each. The keys keep factors
    # apart as objects, so they must live as long as this.
    inputs: dict[tuple, torch.Tensor] = field(default_factory=dict)
    arena: Arena | None = None  # where factors are written; None: each in memory of its own

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    def input_side(self, factor_RI: torch.Tensor) -> torch.Tensor:
        """Rows of factors on the input side, in the layer's dtype."""
        key = (id(factor_RI), self.columns.start, self.columns.stop, self.dtype)
        known = self.inputs.get(key)
        if known is None:
            is_whole = factor_RI.shape[1] == self.columns.stop - self.columns.start
            part_RI = factor_RI if is_whole else factor_RI[:, self.columns]
            known = self.inputs[key] = self.empty(*part_RI.shape)
            known.copy_(part_RI)
            self.note(known, part_RI)
        return known

    def output_side(self, factor_OR: torch.Tensor) -> torch.Tensor:
        """Rows of factors on the output side, as they are."""
        return factor_OR if factor_OR.shape[0] == self.size else factor_OR[self.rows]

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype) if self.arena is None else self.arena.take(*shape)

    def note(self, target: torch.Tensor, source: torch.Tensor, scale: float = 1.0) -> None:
        """`target`, from `empty`, is `scale · source`."""
        if self.arena is not None:
            self.arena.writes.append(Write(target, source, scale))


@dataclass(frozen=True, eq=False)
class Pair:
    """Factors that belong together, the input side in the layer's dtype, the output side as the term has it."""

    input_RI: torch.Tensor
    output_OR: torch.Tensor
    scale: float = 1.0


@dataclass
class Draft:
    """A slice's slot contents while terms are folded into them; float32 until `finished`."""

    cut: Cut
    plain: torch.Tensor | None = None  # (1,) or (O,)
    products: list[Pair] = field(default_factory=list)
    added: list[Pair] = field(default_factory=list)
    offset_O: torch.Tensor | None = None
    gain_O: torch.Tensor | None = None
    rare: list[RareTerm] = field(default_factory=list)
    bias_O: torch.Tensor | None = None  # what the base's bias becomes; float32

    def __post_init__(self) -> None:
        self.bias_O = None if self.cut.bias_O is None else self.cut.bias_O.float()
        self._base_bias_O = self.bias_O

    def add_plain(self, weight: torch.Tensor) -> None:
        self.plain = weight if self.plain is None else self.plain + weight

    def add_offset(self, offset_O: torch.Tensor) -> None:
        """Ranks that do not add the bias have no offset either."""
        if self.cut.adds_bias:
            self.offset_O = offset_O if self.offset_O is None else self.offset_O + offset_O

    def finished(self) -> SliceTerms:
        if self.bias_O is not None and self.bias_O is not self._base_bias_O:
            assert self._base_bias_O is not None, "what changed was there"
            self.add_offset(self.bias_O - self._base_bias_O)
        a_RI, b_RO = _joined(self.products, self.gain_O, self.cut)
        down_RI, up_RO = _joined(self.added, self.gain_O, self.cut)
        plain = self.plain
        if plain is not None and self.gain_O is not None:
            plain = plain * self.gain_O
        rare = self.rare if self.gain_O is None else [term.gained(self.gain_O) for term in self.rare]
        return SliceTerms(plain, a_RI, b_RO, down_RI, up_RO, self.offset_O, tuple(rare))


def _joined(
    pairs: list[Pair], gain_O: torch.Tensor | None, cut: Cut
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """All pairs as one: (R, I) and (R, O), scales and gain folded in float32 and rounded once."""
    if not pairs:
        return None, None
    inputs = [pair.input_RI for pair in pairs]
    input_RI = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
    output_RO = cut.empty(input_RI.shape[0], cut.size)
    start = 0
    for pair in pairs:
        rank = pair.input_RI.shape[0]
        # Mixed half types would be multiplied, and rounded, in the file's.
        outer_OR = pair.output_OR if pair.output_OR.dtype in (torch.float32, cut.dtype) else pair.output_OR.float()
        if gain_O is not None:
            outer_OR = gain_O[:, None] * outer_OR
        torch.mul(outer_OR.T, pair.scale, out=output_RO[start : start + rank])
        start += rank
    if len(pairs) == 1 and gain_O is None:
        cut.note(output_RO, pairs[0].output_OR.T, pairs[0].scale)
    return input_RI, output_RO


@dataclass
class Merging:
    """A module's weight and bias while terms are merged into them; the dtype says how precisely.

    `sum_OI` grows from nothing: it is the weight of everything that is added up; `base_OI` stays the base's.
    """

    base_OI: torch.Tensor
    bias_O: torch.Tensor | None
    sum_OI: torch.Tensor
    # Of a bias that the terms make where the base has none.
    offset_O: torch.Tensor | None = None

    def add_offset(self, offset_O: torch.Tensor) -> None:
        self.offset_O = offset_O if self.offset_O is None else self.offset_O + offset_O


@dataclass(frozen=True)
class Kind:
    """All sides of a kind of term. `order`: kinds of lower order are folded and merged first.

    shape(term): (O, I) as the tensors tell it, None where they don't. tensors(term): its own ones.
    fold(term, draft): cut to `draft.cut` and written into the slot's contents; raises AdapterError where this rank
    cannot hold it. merge(term, merging): into weights. ranks(term): (scaled products, low-rank terms) it adds.
    resolve(term, probe): the terms it becomes once the base may be asked; None: it needs no base.
    dense_bytes(term): bytes that count as the adapter's dense ones; 0 for factors.
    """

    order: int
    shape: Callable[[Any], tuple[int | None, int | None]]
    tensors: Callable[[Any], Iterator[torch.Tensor]]
    fold: Callable[[Any, Draft], None]
    merge: Callable[[Any, Merging], None]
    ranks: Callable[[Any], tuple[int, int]] = lambda _term: (0, 0)
    resolve: Callable[[Any, Probe], tuple[Any, ...]] | None = None
    dense_bytes: Callable[[Any], int] = lambda _term: 0
