"""Low-rank terms among which every token chooses by a gate on the layer's input: Arrow, MeteoRA."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import GatedAdded
from flora_vllm.terms.kind import Draft, Kind, Merging

NO_WEIGHT = "its gate chooses by token, which no weight can say; serve the adapter as it is"


@dataclass(frozen=True, eq=False)
class Gated:
    """`Σ_e c_e(x) · up_e down_e x`; c: softmax(s / temperature) over the `top` largest s = gate x, or |gate x|.

    Expert e has rows e·R to (e+1)·R of `down` and these columns of `up`.
    """

    gate: torch.Tensor  # (E, I)
    down: torch.Tensor  # (E·R, I)
    up: torch.Tensor  # (O, E·R)
    top: int
    temperature: float = 1.0
    is_absolute: bool = False

    def __post_init__(self) -> None:
        shapes = [tuple(tensor.shape) for tensor in _tensors(self)]
        fits = all(len(shape) == 2 for shape in shapes) and shapes[0][1] == shapes[1][1]
        if not fits or shapes[2][1] != shapes[1][0] or shapes[1][0] % shapes[0][0]:
            raise AdapterError(
                f"a gate must be (experts, in) and its factors (experts * rank, in) and (out, experts * rank), "
                f"got {shapes}"
            )
        if not 0 < self.top <= len(self.gate) or not self.temperature > 0:
            raise AdapterError(
                f"of {len(self.gate)} experts a gate takes 1 to {len(self.gate)}, at a temperature above 0; got "
                f"{self.top} and {self.temperature}"
            )


def _tensors(term: Gated) -> Iterator[torch.Tensor]:
    yield from (term.gate, term.down, term.up)


def _fold(term: Gated, draft: Draft) -> None:
    cut = draft.cut
    if cut.sums:
        raise AdapterError(
            "its gate needs the whole input of a layer whose inputs several ranks share; "
            "serve it with --tensor-parallel-size 1"
        )
    gate_EI = term.gate.float().contiguous()
    down_LI, up_OL = (t.to(cut.dtype).contiguous() for t in (term.down, term.up[cut.rows]))
    draft.rare.append(GatedAdded(gate_EI, down_LI, up_OL, term.top, float(term.temperature), term.is_absolute))


def _merge(term: Gated, merging: Merging) -> None:
    del term, merging
    raise AdapterError(NO_WEIGHT)


GATED = Kind(
    order=2,
    shape=lambda term: (term.up.shape[0], term.down.shape[1]),
    tensors=_tensors,
    fold=_fold,
    merge=_merge,
    dense_bytes=lambda term: sum(4 * tensor.numel() for tensor in _tensors(term)),
)
