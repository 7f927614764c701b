"""Low-rank terms beside the products: LoRA and all that reduces to it; over shared factors VeRA and its kin."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import SharedLow
from flora_vllm.terms.kind import Draft, Kind, Merging, Pair
from flora_vllm.terms.shared import Factor, Shared, held, tensor_of


@dataclass(frozen=True, eq=False)
class Added:
    """`scale · out ∘ up(mid · down x)`. `down` and `up` are the adapter's own or both shared.

    `mid`: a vector (R,), a matrix (R of up, R of down), or None. A shared factor may be larger than the module.
    """

    down: Factor  # (R, I)
    up: Factor  # (O, R)
    scale: float = 1.0
    mid: torch.Tensor | None = None
    out: torch.Tensor | None = None  # (O,)

    def __post_init__(self) -> None:
        down, up = self.down, self.up
        inner = down.shape[0] if len(down.shape) == 2 else -1
        if self.mid is not None:
            fits = self.mid.ndim in (1, 2) and self.mid.shape[-1] == inner
            inner = self.mid.shape[0] if fits else -1
        if len(up.shape) != 2 or up.shape[1] != inner:
            raise AdapterError(
                f"low-rank factors must be (rank, in) and (out, rank), got {tuple(down.shape)} and {tuple(up.shape)}"
                + ("" if self.mid is None else f" with {tuple(self.mid.shape)} between them")
            )
        if isinstance(self.down, Shared) != isinstance(self.up, Shared):
            raise AdapterError("of two low-rank factors both are shared or neither is")

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def _shape(term: Added) -> tuple[int | None, int | None]:
    if isinstance(term.up, Shared):
        return (None if term.out is None else term.out.shape[0]), None
    return term.up.shape[0], term.down.shape[1]


def _tensors(term: Added) -> Iterator[torch.Tensor]:
    yield from (factor for factor in (term.down, term.up) if isinstance(factor, torch.Tensor))
    yield from (t for t in (term.mid, term.out) if t is not None)


def _fold(term: Added, draft: Draft) -> None:
    cut = draft.cut
    out_O = None if term.out is None else term.out[cut.rows].float()
    if isinstance(term.down, Shared) and isinstance(term.up, Shared):
        whole = slice(0, term.rank)
        # Kept in the layer's dtype: a base model's worth of float32 would be read for nothing.
        down_LI = held(term.down, whole, cut.columns, cut.dtype, cut.device)
        up_OL = held(term.up, cut.rows, slice(0, term.up.shape[1]), cut.dtype, cut.device)
        mid = None if term.mid is None else term.mid.float()
        if term.scale != 1.0:
            out_O = torch.full((cut.size,), term.scale) if out_O is None else out_O * term.scale
        draft.rare.append(SharedLow(down_LI, up_OL, mid, out_O))
        return
    assert isinstance(term.down, torch.Tensor)
    assert isinstance(term.up, torch.Tensor)
    up_OR = cut.output_side(term.up)
    if term.mid is not None:
        up_OR = up_OR.float() * term.mid.float() if term.mid.ndim == 1 else up_OR.float() @ term.mid.float()
    if out_O is not None:
        up_OR = out_O[:, None] * up_OR.float()
    draft.added.append(Pair(cut.input_side(term.down), up_OR, term.scale))


def factors(term: Added, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (R, I), up (O, R)) that alone say what the term does to a module of this size."""
    down = tensor_of(term.down)[:, :in_features].to(dtype)
    up = tensor_of(term.up)[:out_features].to(dtype)
    if term.mid is not None:
        up = up * term.mid.to(dtype) if term.mid.ndim == 1 else up @ term.mid.to(dtype)
    if term.out is not None:
        up = term.out.to(dtype)[:, None] * up
    return down, term.scale * up


def _merge(term: Added, merging: Merging) -> None:
    out_features, in_features = merging.base_OI.shape
    down, up = factors(term, out_features, in_features, merging.base_OI.dtype)
    merging.sum_OI = merging.sum_OI + up @ down


ADDED = Kind(
    order=2,
    shape=_shape,
    tensors=_tensors,
    fold=_fold,
    merge=_merge,
    ranks=lambda term: (0, 0 if isinstance(term.down, Shared) else term.rank),
)
