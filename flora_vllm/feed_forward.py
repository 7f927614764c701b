"""A feed-forward block some of whose rows go through it once for each of several experts (MixLoRA).

The block is down(activation(gate_up(x))), of which gate_up and down are adapted layers and the rest is the model's own.
A row that is routed stays the row of its first expert. Those of its further experts are made where gate_up has made
the row, wait there, and go through activation and down where down has made the row; then they are one sum. So the
model's code sees as many rows as ever, and steps without such a slot cost nothing.
Shape letters: T tokens, N rows of one slot, K experts of a row, F rows of further experts, H and O in and out features
of the block, G of gate_up's outputs, M of down's inputs.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from flora_vllm.layers import AdaptedLinear
from flora_vllm.ops.rare import RoutedAdded, placed
from flora_vllm.ops.terms import LayerTerms, Segments

# What experts add to one layer, by slice.
RoutedTerms = tuple[RoutedAdded | None, ...]


@dataclass(frozen=True, eq=False)
class _Waiting:
    """The rows of one slot between the block's two layers. `further_FG`: of row 0 its experts from the second on, …"""

    slot: int
    rows_N: torch.Tensor
    share_NK: torch.Tensor
    expert_NK: torch.Tensor
    further_FG: torch.Tensor


class FeedForward:
    """One block with its routed slots. device: where x is; None where that is the host."""

    def __init__(
        self,
        gate_up: AdaptedLinear,
        activation: Callable[[torch.Tensor], torch.Tensor],
        down: AdaptedLinear,
        device: torch.device | None = None,
    ) -> None:
        self._layers = (gate_up, down)
        self._activation, self._device = activation, device
        self._terms: tuple[dict[int, RoutedTerms], dict[int, RoutedTerms]] = ({}, {})
        self._slots: frozenset[int] = frozenset()
        self._waiting: list[_Waiting] = []
        for layer in self._layers:
            layer.join(self)

    @property
    def slots(self) -> Collection[int]:
        return self._slots

    def write_slot(self, layer: AdaptedLinear, slot: int, terms: LayerTerms | None) -> None:
        mine = self._terms[self._layers.index(layer)]
        mine.pop(slot, None)
        routed = routed_terms(terms)
        if any(term is not None for term in routed):
            there = (None if term is None else placed(term, self._device) for term in routed)
            mine[slot] = tuple(there)  # pyright: ignore[reportArgumentType] - placing keeps the kind
        self._slots = frozenset(self._terms[0].keys() | self._terms[1].keys())
        for each in self._layers:
            each.note_rare()

    def finish(
        self,
        layer: AdaptedLinear,
        x_TI: torch.Tensor,
        y_TO: torch.Tensor,
        bias_O: torch.Tensor | None,
        segments: Segments,
    ) -> None:
        """See `layers.Block`."""
        pieces = [(slot, rows.to(x_TI.device)) for slot, rows in segments if slot in self._slots]
        if not pieces:
            return
        if layer is self._layers[0]:
            self._waiting = [self._enter(slot, rows, x_TI, y_TO) for slot, rows in pieces]
        else:
            waiting, self._waiting = self._waiting, []
            assert [piece.slot for piece in waiting] == [slot for slot, _ in pieces], "a block runs its layers in order"
            self._leave(waiting, x_TI, y_TO, bias_O)

    def _enter(self, slot: int, rows_N: torch.Tensor, x_TH: torch.Tensor, y_TG: torch.Tensor) -> _Waiting:
        x_NH = x_TH[rows_N]
        share_NK, expert_NK = self._router(slot).choose(x_NH)
        each = expert_NK.shape[1]
        y_PG = y_TG[rows_N].float().repeat_interleave(each, 0)
        _add(
            y_PG,
            x_NH.repeat_interleave(each, 0),
            expert_NK.flatten(),
            self._terms[0].get(slot, ()),
            self._layers[0].sizes,
        )
        y_NKG = y_PG.to(y_TG.dtype).view(len(rows_N), each, -1)
        y_TG[rows_N] = y_NKG[:, 0]
        return _Waiting(slot, rows_N, share_NK, expert_NK, y_NKG[:, 1:].flatten(0, 1))

    def _leave(
        self, waiting: list[_Waiting], x_TM: torch.Tensor, y_TO: torch.Tensor, bias_O: torch.Tensor | None
    ) -> None:
        counts = [len(piece.further_FG) for piece in waiting]
        inner_FM = x_TM[:0]
        made_FO = y_TO[:0]
        if sum(counts):  # not of slots of one expert a token
            inner_FM = self._activation(torch.cat([piece.further_FG for piece in waiting]))
            made_FO = self._layers[1].kernel.forward(inner_FM, bias_O, None)
        for piece, x_FM, y_FO in zip(waiting, inner_FM.split(counts), made_FO.split(counts), strict=True):
            rows, each = len(piece.rows_N), piece.expert_NK.shape[1]
            x_PM, y_PO = (
                torch.cat([first[piece.rows_N, None], further.view(rows, each - 1, first.shape[1])], 1).flatten(0, 1)
                for first, further in ((x_TM, x_FM), (y_TO, y_FO))
            )
            y_PO = y_PO.float()
            _add(y_PO, x_PM, piece.expert_NK.flatten(), self._terms[1].get(piece.slot, ()), self._layers[1].sizes)
            y_NO = (y_PO.view(rows, each, -1) * piece.share_NK[..., None]).sum(1)
            y_TO[piece.rows_N] = y_NO.to(y_TO.dtype)

    def _router(self, slot: int) -> RoutedAdded:
        """Any of the slot's terms: all have the same router."""
        return next(term for terms in self._terms for term in terms.get(slot, ()) if term is not None)


def _add(
    y_PO: torch.Tensor, x_PI: torch.Tensor, expert_P: torch.Tensor, terms: RoutedTerms, sizes: tuple[int, ...]
) -> None:
    """What each row's expert adds comes to y, in place."""
    for y_PS, term in zip(y_PO.split(sizes, 1), terms, strict=False):
        if term is not None:
            y_PS += term.of_experts(x_PI, expert_P)


def routed_terms(terms: LayerTerms | None) -> RoutedTerms:
    """Of each slice the term of a block's experts, if it has one."""
    return tuple(
        next((term for term in part.rare if isinstance(term, RoutedAdded)), None) if part is not None else None
        for part in terms or ()
    )
