"""The adapted linear in torch operations: complete on every device, used where no faster kernel is, and by training.

Nothing here is per rank-one loop: segments of equal rank are stacked together, long segments are modulated, and
scratch memory is bounded whatever the step (`SCRATCH_BYTES`), by splitting tokens or output features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear

from flora_vllm.errors import ConfigError
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms

# Live temporaries of one forward stay below this beside x, y and whatever `base` itself needs. One token of a
# layer is the smallest unit, so only rank * (in + out) beyond 5 million could exceed it.
SCRATCH_BYTES = 64 * 2**20

# One slot's terms for a slice, with the rows of the tokens that use them.
SegmentTerms = tuple[SliceTerms, torch.Tensor]


class TorchLinear:
    """y = base(x) + bias with every slot's terms, in torch.

    weight_OI: W, or None if the base is opaque (quantised): then everything is stacked through `base`.
    base: x_TI -> y_TO, W x without bias. sizes: out features of each slice, in order.
    device: where x is, for terms that come from the host; None leaves terms where they are.
    Raises ConfigError if the rule forces the modulated path and there is no W to modulate.
    """

    implementation = "torch"

    def __init__(
        self,
        weight_OI: torch.Tensor | None,
        base: Callable[[torch.Tensor], torch.Tensor],
        sizes: Sequence[int],
        rule: DispatchRule,
        in_features: int,
        device: torch.device | None = None,
    ) -> None:
        if weight_OI is None and rule.path == "modulated":
            raise ConfigError("path 'modulated' needs the layer's weight, which this (quantised) layer does not show")
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
        assert slot >= 1, "slot 0 is the permanent 'no adapter'"
        if terms is None or all(part is None for part in terms):
            self._slots.pop(slot, None)
        else:
            assert len(terms) == len(self.parts), f"{len(terms)} slices of terms for {len(self.parts)} slices"
            self._slots[slot] = terms if self.device is None else tuple(self._placed(part) for part in terms)

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter."""
        if segments is None:
            y_TO = self.base(x_TI)
            return y_TO if bias_O is None else y_TO.add_(bias_O)
        rows = [(self._slots.get(slot), rows_N.to(x_TI.device)) for slot, rows_N in segments]
        y_TO = self._plain(x_TI, bias_O, rows)
        for i, part in enumerate(self.parts):
            bias_P = None if bias_O is None else bias_O[part]
            mine = [(terms[i], rows_N) for terms, rows_N in rows if terms is not None]
            adapted = [(terms, rows_N) for terms, rows_N in mine if terms is not None]
            self._write_adapted(y_TO[:, part], x_TI, bias_P, i, adapted)
        return y_TO

    def _plain(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, rows: list[tuple[LayerTerms | None, torch.Tensor]]
    ) -> torch.Tensor:
        """y_TO with the base output of every token that has a slice without terms; its adapted slices come after."""
        plain = [rows_N for terms, rows_N in rows if terms is None or any(part is None for part in terms)]
        if len(plain) == len(rows):
            return self.forward(x_TI, bias_O, None)
        y_TO = x_TI.new_empty(x_TI.shape[0], self.out_features)
        row_bytes = x_TI.element_size() * (self.in_features + 2 * self.out_features)
        for rows_N in _chunks(plain, row_bytes):
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
        stacked: dict[int, list[SegmentTerms]] = {}
        for terms, rows_N in adapted:
            if terms.a_RI is not None and self._modulates(len(rows_N), terms.rank):
                for rows_C in _chunks([rows_N], self._row_bytes(x_TI, 1, y_TP.shape[1])):
                    y_NP = self._modulated(x_TI[rows_C], i, terms)
                    y_TP[rows_C] = _finish(y_NP, x_TI[rows_C], bias_P, terms).to(y_TP.dtype)
            else:
                stacked.setdefault(terms.rank, []).append((terms, rows_N))
        for rank, group in stacked.items():
            for chunk in _batches(group, self._row_bytes(x_TI, rank, y_TP.shape[1])):
                y_NP = self._stacked(x_TI, i, rank, chunk)
                start = 0
                for terms, rows_N in chunk:
                    y_MP = y_NP[start : start + len(rows_N)]
                    y_TP[rows_N] = _finish(y_MP, x_TI[rows_N], bias_P, terms).to(y_TP.dtype)
                    start += len(rows_N)

    def _placed(self, part: SliceTerms | None) -> SliceTerms | None:
        if part is None:
            return None
        moved: dict[str, Any] = {
            name: value.to(self.device) for name, value in vars(part).items() if isinstance(value, torch.Tensor)
        }
        return replace(part, **moved)

    def _modulates(self, tokens: int, rank: int) -> bool:
        return self.weight_OI is not None and self.rule.modulates(tokens, rank)

    def _row_bytes(self, x_TI: torch.Tensor, rank: int, size: int) -> int:
        """Upper bound of a token's scratch: the scaled x with its factors, W's output, its float32 forms and sums."""
        product_size = size if self._splits else self.out_features
        inputs = x_TI.element_size() * 3 * self.in_features
        outputs = x_TI.element_size() * (product_size + 2 * size) + 8 * size
        return (rank + 1) * (inputs + outputs)

    @property
    def _splits(self) -> bool:
        """Whether a slice's rows can go through that slice of W alone."""
        return self.weight_OI is not None and len(self.parts) > 1

    def _product(self, x_NI: torch.Tensor, i: int) -> torch.Tensor:
        if self._splits:
            assert self.weight_OI is not None
            return linear(x_NI, self.weight_OI[self.parts[i]])
        return self.base(x_NI)[:, self.parts[i]]

    def _stacked(self, x_TI: torch.Tensor, i: int, rank: int, group: list[SegmentTerms]) -> torch.Tensor:
        """Σ_j b[j] ∘ W(a[j] ∘ x) of the group's tokens, in its order, float32 (N, P)."""
        x_NI = torch.cat([x_TI[rows_N] for _, rows_N in group])
        if all(terms.a_RI is None for terms, _ in group):
            return self._product(x_NI, i).float()
        counts = torch.tensor([len(rows_N) for _, rows_N in group], device=x_TI.device)
        # Without the size a GPU would be waited for.
        group_N = torch.repeat_interleave(
            torch.arange(len(group), device=x_TI.device), counts, output_size=x_NI.shape[0]
        )
        a_GRI = torch.stack([_with_identity(terms, terms.a_RI, x_TI.shape[1], x_TI) for terms, _ in group])
        size = self.parts[i].stop - self.parts[i].start
        b_GRO = torch.stack([_with_identity(terms, terms.b_RO, size, x_TI) for terms, _ in group])
        n, r = len(group_N), rank
        stacked_VI = (a_GRI[group_N] * x_NI[:, None, :]).reshape(n * r, x_TI.shape[1])
        y_NRP = self._product(stacked_VI, i).reshape(n, r, size).float()
        return (y_NRP * b_GRO[group_N]).sum(1)

    def _modulated(self, x_NI: torch.Tensor, i: int, terms: SliceTerms) -> torch.Tensor:
        """The same sum for one segment through W ∘ (Bᵀ A), formed for a bounded run of output features at a time."""
        assert self.weight_OI is not None, "an opaque base is always stacked"
        assert terms.a_RI is not None, "only Hadamard terms are modulated"
        assert terms.b_RO is not None, "Hadamard terms come in pairs"
        weight_PI = self.weight_OI[self.parts[i]]
        y_NP = x_NI.new_empty(x_NI.shape[0], weight_PI.shape[0], dtype=torch.float32)
        step = max(1, SCRATCH_BYTES // 4 // ((8 + x_NI.element_size()) * self.in_features))
        a_RI, b_RO = terms.a_RI.float(), terms.b_RO.float()
        for start in range(0, weight_PI.shape[0], step):
            run = slice(start, start + step)
            factor_CI = b_RO[:, run].T @ a_RI
            if terms.identity:
                factor_CI += 1
            y_NP[:, run] = linear(x_NI, factor_CI.mul_(weight_PI[run]).to(x_NI.dtype))
        return y_NP


def _finish(y_NP: torch.Tensor, x_NI: torch.Tensor, bias_P: torch.Tensor | None, terms: SliceTerms) -> torch.Tensor:
    """g ∘ [y + (down x) up] + h ∘ bias, float32."""
    if terms.down_RI is not None:
        assert terms.up_RO is not None
        y_NP = y_NP + (x_NI @ terms.down_RI.T) @ terms.up_RO
    if terms.gain_bias and bias_P is not None:
        y_NP = y_NP + bias_P
    if terms.gain_O is not None:
        y_NP = y_NP * terms.gain_O
    if not terms.gain_bias and bias_P is not None:
        y_NP = y_NP + bias_P
    return y_NP


def _with_identity(terms: SliceTerms, factor: torch.Tensor | None, size: int, like: torch.Tensor) -> torch.Tensor:
    """The factor's rows, with a row of ones first where the sum includes plain W x."""
    ones = torch.ones(1, size, dtype=like.dtype, device=like.device)
    if factor is None:
        return ones
    return torch.cat([ones, factor]) if terms.identity else factor


def _chunks(rows: list[torch.Tensor], row_bytes: int) -> Iterator[torch.Tensor]:
    if rows:
        yield from torch.split(torch.cat(rows), max(1, SCRATCH_BYTES // 2 // row_bytes))


def _batches(group: list[SegmentTerms], row_bytes: int) -> Iterator[list[SegmentTerms]]:
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
