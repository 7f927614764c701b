"""The adapted linear in torch operations: complete on every device, used where no faster kernel is.

Nothing here is per rank-one loop: segments of equal rank are stacked together, long segments are modulated, and
scratch memory is bounded whatever the step (`SCRATCH_BYTES`), by splitting tokens or output features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear

from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms

# Live temporaries of one forward stay below this beside x, y and whatever `base` itself needs. One token of a
# layer is the smallest unit, so only rank * (in + out) beyond 5 million could exceed it.
SCRATCH_BYTES = 64 * 2**20

# One slot's terms for a slice, with the rows of the tokens that use them.
SegmentTerms = tuple[SliceTerms, torch.Tensor]


class TorchLinear:
    """y = base(x) + bias with every slot's terms, in torch, for a layer that shows its weight.

    base: x_TI -> y_TO, W x without bias. sizes: out features of each slice, in order.
    device: where x is, for terms that come from the host; None leaves terms where they are.
    """

    implementation = "torch"

    def __init__(
        self,
        weight_OI: torch.Tensor,
        base: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        rule: DispatchRule,
        in_features: int,
        device: torch.device | None = None,
    ) -> None:
        self.weight_OI = weight_OI
        self.base = base
        self.rule = rule
        self.in_features = in_features
        self.device = device
        self.parts = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self.out_features = sum(sizes)
        self._slots: dict[int, LayerTerms] = {}

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. Tensors on `device` are kept, not copied."""
        keep_terms(self._slots, slot, terms, len(self.parts), self.device)

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter."""
        if segments is None:
            y_TO = self.base(x_TI)
            return y_TO if bias_O is None else y_TO.add_(bias_O)
        rows = [(self._slots.get(slot), rows_N.to(x_TI.device)) for slot, rows_N in segments]
        y_TO = self._base_output(x_TI, bias_O, rows)
        for i, part in enumerate(self.parts):
            bias_P = None if bias_O is None else bias_O[part]
            mine = [(terms[i], rows_N) for terms, rows_N in rows if terms is not None]
            adapted = [(terms, rows_N) for terms, rows_N in mine if terms is not None]
            self._write_adapted(y_TO[:, part], x_TI, bias_P, i, adapted)
        return y_TO

    def _base_output(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, rows: list[tuple[LayerTerms | None, torch.Tensor]]
    ) -> torch.Tensor:
        """y_TO with the base output of every token that has a slice without terms; its adapted slices come after."""
        alone = [rows_N for terms, rows_N in rows if terms is None or any(part is None for part in terms)]
        if len(alone) == len(rows):
            return self.forward(x_TI, bias_O, None)
        y_TO = x_TI.new_empty(x_TI.shape[0], self.out_features)
        row_bytes = x_TI.element_size() * (self.in_features + 2 * self.out_features)
        for rows_N in chunks(alone, row_bytes):
            y_TO[rows_N] = self.forward(x_TI[rows_N], bias_O, None)
        return y_TO

    def _write_adapted(
        self,
        y_TP: torch.Tensor,
        x_TI: torch.Tensor,
        bias_P: torch.Tensor | None,
        i: int,
        adapted: list[SegmentTerms],
    ) -> None:
        """Write slice i of every token with terms in it, each product by its way."""
        stacked: dict[tuple[int, bool], list[SegmentTerms]] = {}
        for terms, rows_N in adapted:
            scaled = 0 if terms.a_RI is None else terms.a_RI.shape[0]
            if len(rows_N) >= self.rule.modulate_from(terms.products, scaled):
                for rows_C in chunks([rows_N], self._row_bytes(x_TI, 1, y_TP.shape[1])):
                    y_NP = self._modulated(x_TI[rows_C], i, terms)
                    y_TP[rows_C] = finish(y_NP, x_TI[rows_C], bias_P, terms).to(y_TP.dtype)
            else:
                stacked.setdefault((scaled, terms.plain_O is not None), []).append((terms, rows_N))
        for (scaled, has_plain), group in stacked.items():
            for chunk in batches(group, self._row_bytes(x_TI, scaled + has_plain, y_TP.shape[1])):
                y_NP = self._stacked(x_TI, i, chunk)
                start = 0
                for terms, rows_N in chunk:
                    y_MP = y_NP[start : start + len(rows_N)]
                    y_TP[rows_N] = finish(y_MP, x_TI[rows_N], bias_P, terms).to(y_TP.dtype)
                    start += len(rows_N)

    def _row_bytes(self, x_TI: torch.Tensor, products: int, size: int) -> int:
        """Upper bound of a token's scratch: the scaled x with its factors, W's output, its float32 forms and sums."""
        inputs = x_TI.element_size() * 3 * self.in_features
        outputs = x_TI.element_size() * size + 12 * size
        return (products + 1) * (inputs + outputs)

    def _product(self, x_NI: torch.Tensor, i: int) -> torch.Tensor:
        return self.base(x_NI) if len(self.parts) == 1 else linear(x_NI, self.weight_OI[self.parts[i]])

    def _stacked(self, x_TI: torch.Tensor, i: int, group: list[SegmentTerms]) -> torch.Tensor:
        """plain ∘ W x + Σ_j b[j] ∘ W(a[j] ∘ x) of the group's tokens, in its order, float32 (N, P).

        All of the group have plain or none has, and all have as many scaled products.
        """
        x_NI = torch.cat([x_TI[rows_N] for _, rows_N in group])
        size = self.parts[i].stop - self.parts[i].start
        r = first_sides(group[0][0], x_TI).shape[0]
        if r == 0:
            return x_TI.new_zeros(len(x_NI), size, dtype=torch.float32)
        counts = torch.tensor([len(rows_N) for _, rows_N in group], device=x_TI.device)
        # Without the size a GPU would be waited for.
        group_N = torch.repeat_interleave(
            torch.arange(len(group), device=x_TI.device), counts, output_size=x_NI.shape[0]
        )
        b_GRO = torch.stack([second_sides(terms, size) for terms, _ in group])
        if group[0][0].a_RI is None:
            return self._product(x_NI, i).float() * b_GRO[group_N, 0]
        a_GRI = torch.stack([first_sides(terms, x_TI) for terms, _ in group])
        n = len(group_N)
        stacked_VI = (a_GRI[group_N] * x_NI[:, None, :]).reshape(n * r, x_TI.shape[1])
        y_NRP = self._product(stacked_VI, i).reshape(n, r, size).float()
        return (y_NRP * b_GRO[group_N]).sum(1)

    def _modulated(self, x_NI: torch.Tensor, i: int, terms: SliceTerms) -> torch.Tensor:
        """The same sum for one segment through W ∘ (plain + Bᵀ A), formed for a bounded run of outputs at a time."""
        assert terms.a_RI is not None, "only scaled products are modulated"
        assert terms.b_RO is not None, "scaled products have both sides"
        weight_PI = self.weight_OI[self.parts[i]]
        y_NP = x_NI.new_empty(x_NI.shape[0], weight_PI.shape[0], dtype=torch.float32)
        step = max(1, SCRATCH_BYTES // 4 // ((8 + x_NI.element_size()) * self.in_features))
        a_RI, b_RO = terms.a_RI.float(), terms.b_RO.float()
        plain_O = None if terms.plain_O is None else terms.plain_O.expand(weight_PI.shape[0])
        for start in range(0, weight_PI.shape[0], step):
            run = slice(start, start + step)
            factor_CI = b_RO[:, run].T @ a_RI
            if plain_O is not None:
                factor_CI += plain_O[run, None]
            y_NP[:, run] = linear(x_NI, factor_CI.mul_(weight_PI[run]).to(x_NI.dtype))
        return y_NP


def keep_terms(
    slots: dict[int, LayerTerms], slot: int, terms: LayerTerms | None, slices: int, device: torch.device | None
) -> None:
    """`slots[slot]` becomes `terms`, on `device` if one is given; a tensor of several slices stays one tensor."""
    assert slot >= 1, "slot 0 is the permanent 'no adapter'"
    if terms is None or all(part is None for part in terms):
        slots.pop(slot, None)
        return
    assert len(terms) == slices, f"{len(terms)} slices of terms for {slices} slices"
    assert not any(part.rare for part in terms if part is not None), "rare terms are done around the op, see ops/shell"
    moved: dict[int, torch.Tensor] = {}

    def placed(part: SliceTerms) -> SliceTerms:
        fields: dict[str, Any] = {
            name: moved.setdefault(id(value), value.to(device))
            for name, value in vars(part).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(part, **fields)

    slots[slot] = terms if device is None else tuple(None if part is None else placed(part) for part in terms)


def finish(y_NP: torch.Tensor, x_NI: torch.Tensor, bias_P: torch.Tensor | None, terms: SliceTerms) -> torch.Tensor:
    """y + (down x) up + bias + offset, float32."""
    if terms.down_RI is not None:
        assert terms.up_RO is not None
        y_NP = y_NP + (x_NI @ terms.down_RI.T) @ terms.up_RO
    if bias_P is not None:
        y_NP = y_NP + bias_P
    return y_NP if terms.offset_O is None else y_NP + terms.offset_O


def first_sides(terms: SliceTerms, like: torch.Tensor) -> torch.Tensor:
    """a's rows, with a row of ones first where the sum includes plain W x; (0, I) for neither."""
    ones = like.new_ones(int(terms.plain_O is not None), like.shape[1])
    return ones if terms.a_RI is None else torch.cat([ones, terms.a_RI])


def second_sides(terms: SliceTerms, size: int) -> torch.Tensor:
    """What those rows' products are multiplied by, float32: plain first, then b's rows."""
    plain = [] if terms.plain_O is None else [terms.plain_O.expand(size)[None]]
    return torch.cat([*plain, *([] if terms.b_RO is None else [terms.b_RO.float()])])


def chunks(rows: list[torch.Tensor], row_bytes: int) -> Iterator[torch.Tensor]:
    """All the rows in runs whose scratch is bounded."""
    if rows:
        yield from torch.split(torch.cat(rows), max(1, SCRATCH_BYTES // 2 // row_bytes))


def batches(group: list[SegmentTerms], row_bytes: int) -> Iterator[list[SegmentTerms]]:
    """The group's segments in batches of a bounded number of tokens; a long segment is split."""
    limit = max(1, SCRATCH_BYTES // 2 // row_bytes)
    batch: list[SegmentTerms] = []
    room = limit
    for terms, rows_N in group:
        while len(rows_N):
            batch.append((terms, rows_N[:room]))
            rows_N, room = rows_N[room:], room - len(batch[-1][1])
            if not room:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch
