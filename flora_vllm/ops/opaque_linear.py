"""The adapted linear over a base that shows no weight (quantised): everything is stacked, in one call of the base.

A call of such a base costs the same few launches, or one reading of W, for few rows and for many; so all slices and
segments share one: a row for each token that needs W x, and r rows for each token and each set of r input factors,
which slices with the very same tensor share. Only a step that would need more than `torch_linear.SCRATCH_BYTES` beside
x and y is split into several calls.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flora_vllm.errors import ConfigError
from flora_vllm.ops import torch_linear
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms
from flora_vllm.ops.torch_linear import finish, keep_terms


@dataclass(frozen=True, eq=False)
class _Need:
    """The base rows that a token of some slot needs."""

    terms: LayerTerms | None
    plain: bool  # a row of x itself
    factors: tuple[torch.Tensor, ...]  # each (R, I): R rows of x scaled by it

    @property
    def rows(self) -> int:
        return self.plain + sum(len(a_RI) for a_RI in self.factors)


# Some of a segment's tokens, with what each needs.
_Piece = tuple[_Need, torch.Tensor]
_UNADAPTED = _Need(None, True, ())


class OpaqueLinear:
    """y = base(x) + bias with every slot's terms, through `base` alone.

    base: x_TI -> y_TO, W x without bias. sizes: out features of each slice, in order.
    device: where x is, for terms that come from the host; None leaves terms where they are.
    Raises ConfigError if the rule forces the modulated path: there is no W to modulate.
    """

    implementation = "torch"

    def __init__(
        self,
        base: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        rule: DispatchRule,
        in_features: int,
        device: torch.device | None = None,
    ) -> None:
        if rule.path == "modulated":
            raise ConfigError("path 'modulated' needs the layer's weight, which this (quantised) layer does not show")
        self.base = base
        self.in_features = in_features
        self.device = device
        self.parts = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.out_features = sum(sizes)
        self._slots: dict[int, LayerTerms] = {}
        self._needs: dict[int, _Need] = {}

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. Tensors on `device` are kept, not copied."""
        keep_terms(self._slots, slot, terms, len(self.parts), self.device)
        self._needs.pop(slot, None)
        if slot in self._slots:
            self._needs[slot] = _need_of(self._slots[slot])

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter."""
        pieces = [] if segments is None else [(self._needs.get(s, _UNADAPTED), n.to(x_TI.device)) for s, n in segments]
        if all(need.plain and not need.factors for need, _ in pieces):
            y_TO = self.base(x_TI)
            self._finish_in_place(y_TO, x_TI, bias_O, pieces)
            return y_TO
        y_TO = x_TI.new_empty(x_TI.shape[0], self.out_features)
        for batch in self._batches(pieces, x_TI.element_size()):
            self._through_one_call(y_TO, x_TI, bias_O, batch)
        return y_TO

    def _finish_in_place(
        self, y_TO: torch.Tensor, x_TI: torch.Tensor, bias_O: torch.Tensor | None, pieces: list[_Piece]
    ) -> None:
        """y_TO, W x of every token, becomes the result: nothing is scaled in this step."""
        adapted = [(need, rows_N) for need, rows_N in pieces if need.terms is not None]
        if not adapted and bias_O is not None:
            y_TO.add_(bias_O)
        if not adapted:
            return
        for need, rows_N in pieces:
            row_bytes = x_TI.element_size() * (self.in_features + self.out_features) + 12 * self.out_features
            for rows_C in torch_linear.chunks([rows_N], row_bytes):
                y_TO[rows_C] = self._finished(y_TO[rows_C], {}, x_TI[rows_C], bias_O, need)

    def _batches(self, pieces: list[_Piece], element_bytes: int) -> Iterator[list[_Piece]]:
        """The step's tokens in batches whose scratch is bounded; a token's rows stay together."""
        # A row of scaled x, of what made it and of W's output; its float32 form and its product with b.
        row_bytes = element_bytes * (2 * self.in_features + self.out_features) + 12 * self.out_features
        # A finished token, whatever it needs.
        token_bytes = element_bytes * (self.in_features + self.out_features) + 8 * self.out_features
        batch: list[_Piece] = []
        room = torch_linear.SCRATCH_BYTES
        for need, rest_N in pieces:
            cost = need.rows * row_bytes + token_bytes
            while len(rest_N):
                fitting = max(room // cost, 0 if batch else 1)
                if fitting:
                    batch.append((need, rest_N[:fitting]))
                    room -= len(batch[-1][1]) * cost
                    rest_N = rest_N[fitting:]
                if len(rest_N):
                    yield batch
                    batch, room = [], torch_linear.SCRATCH_BYTES
        if batch:
            yield batch

    def _through_one_call(
        self, y_TO: torch.Tensor, x_TI: torch.Tensor, bias_O: torch.Tensor | None, batch: list[_Piece]
    ) -> None:
        """Write y of the batch's tokens."""
        plain = [rows_N for need, rows_N in batch if need.plain]
        count = sum(need.rows * len(rows_N) for need, rows_N in batch)
        base_VI = x_TI.new_empty(count, self.in_features)
        filled = sum(len(rows_N) for rows_N in plain)
        if plain:
            torch.index_select(x_TI, 0, torch.cat(plain), out=base_VI[:filled])
        starts = []  # of each piece's factors
        for need, rows_N in batch:
            starts.append({})
            x_NI = x_TI[rows_N] if need.factors else x_TI[:0]
            for a_RI in need.factors:
                n, r = len(rows_N), len(a_RI)
                torch.mul(x_NI[:, None], a_RI, out=base_VI[filled : filled + n * r].view(n, r, -1))
                starts[-1][id(a_RI)] = filled
                filled += n * r
        y_VO = self.base(base_VI) if count else base_VI.new_empty(0, self.out_features)
        done = 0
        for (need, rows_N), first in zip(batch, starts, strict=True):
            n = len(rows_N)
            y_NO = y_VO[done : done + n] if need.plain else None
            done += n if need.plain else 0
            scaled = {
                id(a_RI): y_VO[first[id(a_RI)] : first[id(a_RI)] + n * len(a_RI)].view(n, len(a_RI), -1)
                for a_RI in need.factors
            }
            y_TO[rows_N] = self._finished(y_NO, scaled, x_TI[rows_N], bias_O, need)

    def _finished(
        self,
        y_NO: torch.Tensor | None,
        scaled: dict[int, torch.Tensor],
        x_NI: torch.Tensor,
        bias_O: torch.Tensor | None,
        need: _Need,
    ) -> torch.Tensor:
        """y (N, O) of one segment's tokens from W x and, by the factors' identity, W(a ∘ x) as (N, R, O)."""
        if need.terms is None:
            assert y_NO is not None, "a token without adapter needs W x"
            return y_NO if bias_O is None else y_NO + bias_O
        out_NO = x_NI.new_empty(x_NI.shape[0], self.out_features)
        for part, terms in zip(self.parts, need.terms, strict=True):
            bias_P = None if bias_O is None else bias_O[part]
            y_NP = None if y_NO is None else y_NO[:, part]
            if terms is None:
                assert y_NP is not None, "a slice without terms needs W x"
                out_NO[:, part] = y_NP if bias_P is None else y_NP + bias_P
                continue
            sum_NP = _weighed(y_NP, scaled, terms, part)
            if sum_NP is None:
                sum_NP = x_NI.new_zeros(x_NI.shape[0], part.stop - part.start, dtype=torch.float32)
            out_NO[:, part] = finish(sum_NP, x_NI, bias_P, terms)
        return out_NO


def _weighed(
    y_NP: torch.Tensor | None, scaled: dict[int, torch.Tensor], terms: SliceTerms, part: slice
) -> torch.Tensor | None:
    """plain ∘ W x + Σ_j b[j] ∘ W(a[j] ∘ x), float32; None where the terms have neither."""
    sum_NP = None
    if terms.plain_O is not None:
        assert y_NP is not None, "plain is the weight of W x"
        sum_NP = y_NP.float() * terms.plain_O
    if terms.a_RI is not None:
        assert terms.b_RO is not None, "scaled products have both sides"
        scaled_NP = (scaled[id(terms.a_RI)][:, :, part].float() * terms.b_RO.float()).sum(1)
        sum_NP = scaled_NP if sum_NP is None else sum_NP + scaled_NP
    return sum_NP


def _need_of(terms: LayerTerms) -> _Need:
    """Factors in the order of the slices, each tensor once."""
    plain = any(part is None or part.plain_O is not None for part in terms)
    factors = {id(part.a_RI): part.a_RI for part in terms if part is not None and part.a_RI is not None}
    return _Need(terms, plain, tuple(factors.values()))
