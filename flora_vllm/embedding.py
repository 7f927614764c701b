"""The adapted embedding: an adapter's low-rank term comes to the rows of its tokens, by their ids.

A linear layer multiplies its input with a factor; an embedding picks the factor's columns. As for linear layers, one
opaque torch op makes it reachable from compiled code, and what a step needs is read inside it. No CUDA graph holds the
term: steps with an adapter that has one run eagerly.
"""

from collections.abc import Callable

import torch

from flora_vllm.handles import Handles
from flora_vllm.ops.terms import LayerTerms
from flora_vllm.step import Step


class AdaptedEmbedding:
    """One embedding of the model with its slots.

    base: ids -> their rows of E, a new tensor. device: where ids are, for terms that come from the host.
    """

    def __init__(self, base: Callable[[torch.Tensor], torch.Tensor], step: Step, device: torch.device) -> None:
        self._base = base
        self._step = step
        self._device = device
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.handle = _embeddings.register(self)

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on, one slice's low-rank term (H in, V out); None clears it."""
        self._slots.pop(slot, None)
        part = None if terms is None else terms[0]
        if part is not None:
            assert part.down_RI is not None, "readers give an embedding nothing else"
            assert part.up_RO is not None, "a low-rank term has both sides"
            self._slots[slot] = (part.down_RI.to(self._device), part.up_RO.to(self._device))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (...) -> e (..., H): E[id] + up[:, id] down, added in float32 and rounded once."""
        e = self._base(ids)
        # Layers behind it say whether the step was served: one that a graph replays or bypasses is not served by this.
        segments = self._step.segments_for(ids.numel(), serves=False)
        if segments is None:
            return e
        e_TH, ids_T = e.view(-1, e.shape[-1]), ids.reshape(-1)
        for slot, rows in segments:
            if slot in self._slots:
                down_RH, up_RV = self._slots[slot]
                rows_N = rows.to(e.device)
                added_NH = up_RV[:, ids_T[rows_N]].T.float() @ down_RH.float()
                e_TH[rows_N] = (e_TH[rows_N].float() + added_NH).to(e.dtype)
        return e


_embeddings: Handles[AdaptedEmbedding] = Handles()


# The two share a signature: `weight` says width and dtype to the fake, which may not look the embedding up.
def _embed(ids: torch.Tensor, _weight: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return _embeddings[handle].forward(ids)


def _embed_fake(ids: torch.Tensor, weight: torch.Tensor, _handle: torch.Tensor) -> torch.Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _define_op() -> Callable[..., torch.Tensor]:
    _library.define("embedding(Tensor ids, Tensor weight, Tensor handle) -> Tensor")
    _library.impl("embedding", _embed, "CompositeExplicitAutograd")
    torch.library.register_fake("flora::embedding", _embed_fake, lib=_library)
    return torch.ops.flora.embedding


# Kept for the life of the process: the op disappears with the library that defines it.
_library = torch.library.Library("flora", "FRAGMENT")
embedding = _define_op()
