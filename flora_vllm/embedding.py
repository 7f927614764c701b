"""The adapted embedding: an adapter's terms come to the rows of its tokens, by their ids.

A linear layer multiplies its input with a matrix; an embedding picks the matrix's rows. As for linear layers, one
opaque torch op makes it reachable from compiled code, and what a step needs is read inside it. No CUDA graph holds the
terms: steps with an adapter that has one run eagerly.
"""

from collections.abc import Callable

import torch

from flora_vllm.handles import Handles, define_op
from flora_vllm.ops.rare import DenseAdded, RowsAdded
from flora_vllm.ops.terms import LayerTerms, SliceTerms
from flora_vllm.step import Step


class AdaptedEmbedding:
    """One embedding of the model with its slots.

    base: ids -> their rows of E, a new tensor; a rank that has part of E counts ids from its first row. product:
    x (N, H) -> x Eᵀ (N, V), for who asks for E's numbers. device: where ids are, for terms that come from the host.
    """

    def __init__(
        self,
        base: Callable[[torch.Tensor], torch.Tensor],
        product: Callable[[torch.Tensor], torch.Tensor],
        step: Step,
        device: torch.device,
    ) -> None:
        self._base = base
        self.product = product
        self._step = step
        self._device = device
        self._slots: dict[int, SliceTerms] = {}
        self.handle = _embeddings.register(self)

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on, those of one slice (H in, V out); None clears it.

        Of rare terms only those that can be picked by row.
        """
        self._slots.pop(slot, None)
        part = None if terms is None else terms[0]
        if part is not None:
            assert part.offset_O is None, "readers give an embedding no bias"
            self._slots[slot] = part.to(self._device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) -> e (..., H), in float32, rounded once:

        plain[id] E[id] + (b[:, id] a) ∘ E[id] + up[:, id] down + rows of rare terms
        """
        e = self._base(ids)
        # Layers behind it say whether the step was served: one that a graph replays or bypasses is not served by this.
        segments = self._step.segments_for(ids.numel(), serves=False)
        if segments is None:
            return e
        e_TH, ids_T = e.view(-1, e.shape[-1]), ids.reshape(-1)
        for slot, rows in segments:
            if slot in self._slots:
                rows_N = rows.to(e.device)
                e_TH[rows_N] = _changed(e_TH[rows_N].float(), ids_T[rows_N], self._slots[slot]).to(e.dtype)
        return e


def _changed(e_NH: torch.Tensor, ids_N: torch.Tensor, terms: SliceTerms) -> torch.Tensor:
    """What the terms make of rows `ids_N` of the embedding."""
    own_NH = e_NH
    if terms.plain_O is None:
        e_NH = torch.zeros_like(own_NH)
    elif len(terms.plain_O) == 1:
        e_NH = own_NH * terms.plain_O
    else:
        e_NH = own_NH * terms.plain_O[ids_N, None]
    if terms.a_RI is not None:
        assert terms.b_RO is not None, "a product has both sides"
        e_NH = e_NH + own_NH * (terms.b_RO[:, ids_N].T.float() @ terms.a_RI.float())
    if terms.down_RI is not None:
        assert terms.up_RO is not None, "a low-rank term has both sides"
        e_NH = e_NH + terms.up_RO[:, ids_N].T.float() @ terms.down_RI.float()
    for term in terms.rare:
        assert isinstance(term, DenseAdded | RowsAdded), "readers give an embedding no other"
        e_NH = e_NH + term.picked(ids_N).float()
    return e_NH


_embeddings: Handles[AdaptedEmbedding] = Handles()


# The two share a signature: `weight` says width and dtype to the fake, which may not look the embedding up.
def _embed(ids: torch.Tensor, _weight: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return _embeddings[handle].forward(ids)


def _embed_fake(ids: torch.Tensor, weight: torch.Tensor, _handle: torch.Tensor) -> torch.Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


embedding = define_op("embedding", "(Tensor ids, Tensor weight, Tensor handle) -> Tensor", _embed, _embed_fake)
