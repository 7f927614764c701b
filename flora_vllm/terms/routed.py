"""Low-rank terms of a whole feed-forward block, through which a token goes once for each expert it is routed to."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import RoutedAdded
from flora_vllm.terms.kind import Draft, Kind, Merging

NO_WEIGHT = "its router chooses by token, which no weight can say; serve the adapter as it is"


@dataclass(frozen=True, eq=False)
class Routed:
    """What expert e adds to one layer of its block, `up_e down_e x`; all layers of the block have the same router.

    A token's experts are the `top` largest of router h, h the block's input, weighted with the softmax of these scores:
    the block's output is the weighted sum of what it gives with each. Expert e has rows e·R to (e+1)·R of `down` and
    these columns of `up`. `activation`: what the block must have between its layers, by transformers' name (ACT2FN).
    """

    router: torch.Tensor  # (E, H), H the features of the block's input
    down: torch.Tensor  # (E·R, I)
    up: torch.Tensor  # (O, E·R)
    top: int
    activation: str | None = None  # the model's, whatever it is

    def __post_init__(self) -> None:
        shapes = [tuple(tensor.shape) for tensor in _tensors(self)]
        fits = all(len(shape) == 2 for shape in shapes) and shapes[2][1] == shapes[1][0]
        if not fits or shapes[1][0] % shapes[0][0]:
            raise AdapterError(
                f"a router must be (experts, in) and its factors (experts * rank, in) and (out, experts * rank), "
                f"got {shapes}"
            )
        if not 0 < self.top <= len(self.router):
            raise AdapterError(f"of {len(self.router)} experts a token takes 1 to {len(self.router)}, got {self.top}")


def _tensors(term: Routed) -> Iterator[torch.Tensor]:
    yield from (term.router, term.down, term.up)


def _fold(term: Routed, draft: Draft) -> None:
    cut = draft.cut
    # Every rank of a block sees the block's whole input, so the router is no rank's part.
    router_EH = cut.inputs.setdefault((id(term.router), "router"), term.router.float().contiguous())
    down_LI, up_OL = (t.to(cut.dtype).contiguous() for t in (term.down[:, cut.columns], term.up[cut.rows]))
    draft.rare.append(RoutedAdded(router_EH, down_LI, up_OL, term.top, term.activation))


def _merge(term: Routed, merging: Merging) -> None:
    del term, merging
    raise AdapterError(NO_WEIGHT)


ROUTED = Kind(
    order=2,
    shape=lambda term: (term.up.shape[0], term.down.shape[1]),
    tensors=_tensors,
    fold=_fold,
    merge=_merge,
    dense_bytes=lambda term: sum(4 * tensor.numel() for tensor in _tensors(term)),
)
