"""Slot contents that no kernel knows: plain tensors and their torch form, done around the kernels by `ops.shell`.

Each is cut to this rank's part of one slice and in the dtype it is computed in. T tokens, I in, O out features.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch


class RareTerm(Protocol):
    """A kind of rare term; `stage` says when the shell calls `apply`.

    "input": x_TI -> the rows that the products see, for one slice. "added": x_TI -> what is added to y (T, O), float32.
    "output": y_TO with its bias -> y_TO. "block": never, for `feed_forward` does it.
    """

    stage: str

    def apply(self, rows: torch.Tensor) -> torch.Tensor: ...

    def gained(self, gain_O: torch.Tensor) -> "RareTerm":
        """The term of a sum whose outputs are multiplied by `gain_O`: itself, but for what is added to the sum."""
        ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """The adapter's own tensors; not those that adapters share."""
        ...


def placed(term: RareTerm, device: torch.device | None) -> RareTerm:
    """The term with its tensors on `device`; None leaves them where they are."""
    moved: dict[str, Any] = {}
    for field in fields(term):  # pyright: ignore[reportArgumentType] - every rare term is a dataclass
        value = getattr(term, field.name)
        if device is not None and isinstance(value, torch.Tensor) and value.device != device:
            moved[field.name] = value.to(device)
    return replace(term, **moved) if moved else term  # pyright: ignore[reportArgumentType, reportReturnType]


def _both(out_O: torch.Tensor | None, gain_O: torch.Tensor) -> torch.Tensor:
    return gain_O if out_O is None else out_O * gain_O


@dataclass(frozen=True, eq=False)
class Turned:
    """x' = x with blocks of features turned: row vector x[order] times blockdiag(blocks), put back in place."""

    blocks_DBB: torch.Tensor  # (D, B, B)
    order_I: torch.Tensor | None = None  # int64; None: as they are
    stage = "input"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        blocks, size, _ = self.blocks_DBB.shape
        x_TI = rows if self.order_I is None else rows[:, self.order_I]
        turned = torch.einsum("tdb,dbc->tdc", x_TI.reshape(-1, blocks, size).to(self.blocks_DBB.dtype), self.blocks_DBB)
        turned_TI = turned.reshape(rows.shape).to(rows.dtype)
        if self.order_I is None:
            return turned_TI
        placed_TI = torch.empty_like(turned_TI)
        placed_TI[:, self.order_I] = turned_TI
        return placed_TI

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        del gain_O
        return self

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.blocks_DBB
        if self.order_I is not None:
            yield self.order_I


@dataclass(frozen=True, eq=False)
class Swapped:
    """z -> first ∘ z + second ∘ (-v, u) for the halves (u, v) of each group of outputs (RoAd, arXiv 2409.00119)."""

    first_O: torch.Tensor
    second_O: torch.Tensor
    group: int
    stage = "output"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        z_TO = rows.clone() if rows.dtype in (torch.float32, torch.float64) else rows.float()
        swap_(z_TO, self.first_O, self.second_O, self.group)
        return z_TO.to(rows.dtype)

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        del gain_O
        return self

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.first_O, self.second_O)


def swap_(z_TO: torch.Tensor, first: torch.Tensor, second: torch.Tensor, group: int) -> None:
    """`Swapped` in place, z contiguous; `first` and `second` (O,), or (T, O) where rows have vectors of their own."""
    halves = z_TO.view(z_TO.shape[0], -1, 2, group // 2)
    u, v = halves[:, :, 0], halves[:, :, 1]
    first_u, first_v = first.view(*first.shape[:-1], -1, 2, group // 2).unbind(-2)
    second_u, second_v = second.view(*second.shape[:-1], -1, 2, group // 2).unbind(-2)
    before_u = u.clone()
    u.mul_(first_u).addcmul_(second_u, v, value=-1)
    v.mul_(first_v).addcmul_(second_v, before_u)


@dataclass(frozen=True, eq=False)
class SharedLow:
    """out ∘ up(mid · down x) over factors that adapters share (VeRA, FourierFT, TinyLoRA).

    down (L, I) and up (O, L), in the layer's dtype: one copy an engine; float32 mid (L,), (L, L) or None, and out (O,)
    or None. In a float32 layer nothing is rounded. In bfloat16 the factors (exact where PEFT drew them in the base's
    dtype), x, the middle and what up gives are; the vectors and their products are not.
    """

    down_LI: torch.Tensor
    up_OL: torch.Tensor
    mid: torch.Tensor | None = None
    out_O: torch.Tensor | None = None
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        middle = (rows.to(self.down_LI.dtype) @ self.down_LI.T).float()
        if self.mid is not None:
            middle = middle * self.mid if self.mid.ndim == 1 else middle @ self.mid.T
        added = (middle.to(self.up_OL.dtype) @ self.up_OL.T).float()
        return added if self.out_O is None else added * self.out_O

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        return replace(self, out_O=_both(self.out_O, gain_O))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (t for t in (self.mid, self.out_O) if t is not None)


@dataclass(frozen=True, eq=False)
class GatedAdded:
    """Σ_e c_e up_e down_e x, c chosen by each row for itself (Arrow, MeteoRA).

    c: softmax(s / temperature) over the `top` largest of the row's scores s = gate x, or |gate x|; 0 elsewhere.
    gate (E, I) float32; down (E·R, I) and up (O, E·R) in the layer's dtype, expert e's part from e·R on.
    """

    gate_EI: torch.Tensor
    down_LI: torch.Tensor
    up_OL: torch.Tensor
    top: int
    temperature: float
    is_absolute: bool
    out_O: torch.Tensor | None = None
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        scores_TE = rows.float() @ self.gate_EI.T
        largest_TK, chosen_TK = (scores_TE.abs() if self.is_absolute else scores_TE).topk(self.top, 1)
        shares_TE = torch.zeros_like(scores_TE).scatter_(1, chosen_TK, torch.softmax(largest_TK / self.temperature, 1))
        middle_TL = rows.to(self.down_LI.dtype) @ self.down_LI.T
        middle_TER = middle_TL.view(*shares_TE.shape, middle_TL.shape[1] // shares_TE.shape[1]) * shares_TE[..., None]
        added = (middle_TER.flatten(1).to(self.up_OL.dtype) @ self.up_OL.T).float()
        return added if self.out_O is None else added * self.out_O

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        return replace(self, out_O=_both(self.out_O, gain_O))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (t for t in (self.gate_EI, self.down_LI, self.up_OL, self.out_O) if t is not None)


@dataclass(frozen=True, eq=False)
class RoutedAdded:
    """up_e down_e x for each row's own expert e: what experts add to one layer of a feed-forward block (MixLoRA).

    router (E, H) float32, H the block's input; down (E·R, I) and up (O, E·R) in the layer's dtype, expert e's part from
    e·R on. `activation`: what the block must have between its layers; None: whatever it has.
    """

    router_EH: torch.Tensor
    down_LI: torch.Tensor
    up_OL: torch.Tensor
    top: int
    activation: str | None = None
    stage = "block"

    def choose(self, x_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(shares, experts) of the rows of the block's input, (N, K) float32 and int64; a row's shares sum to 1."""
        largest_NK, expert_NK = (x_NH.float() @ self.router_EH.T).topk(self.top, 1)
        return torch.softmax(largest_NK, 1), expert_NK

    def of_experts(self, x_PI: torch.Tensor, expert_P: torch.Tensor) -> torch.Tensor:
        """(P, O) float32: what the expert of each row adds."""
        experts = len(self.router_EH)
        is_mine_PE = torch.nn.functional.one_hot(expert_P, experts)
        # All experts' small side in one product: E·R rows are little beside a base product.
        middle_PL = (x_PI.to(self.down_LI.dtype) @ self.down_LI.T).float()
        middle_PL = middle_PL * is_mine_PE.repeat_interleave(self.down_LI.shape[0] // experts, 1)
        return (middle_PL.to(self.up_OL.dtype) @ self.up_OL.T).float()

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("rows have an expert only within their block")

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        return replace(self, up_OL=(gain_O[:, None] * self.up_OL).to(self.up_OL.dtype))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.router_EH, self.down_LI, self.up_OL)


@dataclass(frozen=True, eq=False)
class DenseAdded:
    """matrix x, a whole matrix of the adapter's own."""

    matrix_OI: torch.Tensor
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows.to(self.matrix_OI.dtype) @ self.matrix_OI.T).float()

    def picked(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (T,) of the matrix: (T, I)."""
        return self.matrix_OI[ids]

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        return replace(self, matrix_OI=(gain_O[:, None] * self.matrix_OI).to(self.matrix_OI.dtype))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.matrix_OI


@dataclass(frozen=True, eq=False)
class RowsAdded:
    """A matrix of which some rows are the adapter's own, and the others zero: y[rows[n]] = matrix[n] x."""

    matrix_NI: torch.Tensor
    rows_N: torch.Tensor  # int64, each once
    size: int  # O
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        added = torch.zeros(len(rows), self.size, device=rows.device)
        return added.index_copy_(1, self.rows_N, (rows.to(self.matrix_NI.dtype) @ self.matrix_NI.T).float())

    def picked(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (T,) of the whole matrix: (T, I)."""
        # By search: a table of all tokens by all rows would be gigabytes.
        rows_N, order_N = self.rows_N.sort()
        place_T = torch.searchsorted(rows_N, ids.to(rows_N.dtype)).clamp(max=len(rows_N) - 1)
        return self.matrix_NI[order_N[place_T]] * (rows_N[place_T] == ids)[:, None]

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        gain_N = gain_O[self.rows_N]
        return replace(self, matrix_NI=(gain_N[:, None] * self.matrix_NI).to(self.matrix_NI.dtype))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.matrix_NI, self.rows_N)


@dataclass(frozen=True, eq=False)
class BasesAdded:
    """RandLoRA over bases that adapters share: a product of as many terms P = R · N as the layer's smaller side has.

    small (R, m) meets the smaller side m of the layer, large the other one; mix (R, N) and gains (N, m) are float32.
    meets_input: h[k, n] = mix[k, n] · small[k]·(gains[n] ∘ x), y = large (O, P) flat(h).
    Else: h = mix ∘ (largeᵀ (P, I) x as (R, N)), y = Σ_n gains[n] ∘ Σ_k h[k, n] small[k].
    """

    small_RM: torch.Tensor
    large: torch.Tensor  # (O, P), or (I, P)
    mix_RN: torch.Tensor
    gains_NM: torch.Tensor
    meets_input: bool
    out_O: torch.Tensor | None = None
    stage = "added"
    # Numbers of the largest tensor in between.
    chunk = 1 << 24

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        tokens = max(self.chunk // self.small_RM.numel(), 1)
        return torch.cat([self._some(part) for part in rows.split(tokens)])

    def _some(self, rows: torch.Tensor) -> torch.Tensor:
        small_RM, dtype = self.small_RM.float(), self.large.dtype
        if self.meets_input:
            middle_TRN = (rows.float()[:, None] * small_RM) @ self.gains_NM.T * self.mix_RN
            added = (middle_TRN.flatten(1).to(dtype) @ self.large.T).float()
        else:
            middle_TRN = (rows.to(dtype) @ self.large).float().reshape(-1, *self.mix_RN.shape) * self.mix_RN
            added = ((middle_TRN @ self.gains_NM) * small_RM).sum(1)
        return added if self.out_O is None else added * self.out_O

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        return replace(self, out_O=_both(self.out_O, gain_O))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (t for t in (self.mix_RN, self.gains_NM, self.out_O) if t is not None)


@dataclass(frozen=True, eq=False)
class KronAdded:
    """(left ⊗ right) x: x as (M, N), its rows through `right`, its columns through `left`; all float32.

    right is (K, N), or (K, R) of a product with down (R, N). Of L · K outputs the `size` from `first_O` on are this
    rank's, of M · N inputs those from `first_I` on.
    """

    left_LM: torch.Tensor
    right: torch.Tensor
    down_RN: torch.Tensor | None
    first_I: int
    first_O: int
    size: int
    out_O: torch.Tensor | None = None
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        inner = self.right.shape[1] if self.down_RN is None else self.down_RN.shape[1]
        x_TMN = _whole(rows, self.first_I, self.left_LM.shape[1] * inner).reshape(len(rows), -1, inner)
        if self.down_RN is not None:
            x_TMN = x_TMN @ self.down_RN.T
        y_TLK = self.left_LM @ (x_TMN @ self.right.T)
        added = y_TLK.flatten(1)[:, self.first_O : self.first_O + self.size]
        return added if self.out_O is None else added * self.out_O

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        return replace(self, out_O=_both(self.out_O, gain_O))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (t for t in (self.left_LM, self.right, self.down_RN, self.out_O) if t is not None)


@dataclass(frozen=True, eq=False)
class CirculantAdded:
    """Blocks of circulant matrices: y[m, i] = Σ_n Σ_j kernel[m, n, (j - i) mod B] x[n, j]; float32.

    Of L · B outputs the `size` from `first_O` on are this rank's, of M · B inputs those from `first_I` on.
    """

    kernel_LMB: torch.Tensor
    first_I: int
    first_O: int
    size: int
    out_O: torch.Tensor | None = None
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        _, inner, block = self.kernel_LMB.shape
        x_TMB = _whole(rows, self.first_I, inner * block).reshape(len(rows), inner, block)
        # A correlation is a product of spectra.
        spectrum = torch.einsum("tmf,lmf->tlf", torch.fft.rfft(x_TMB), torch.fft.rfft(self.kernel_LMB).conj())
        added = torch.fft.irfft(spectrum, n=block).flatten(1)[:, self.first_O : self.first_O + self.size]
        return added if self.out_O is None else added * self.out_O

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        return replace(self, out_O=_both(self.out_O, gain_O))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (t for t in (self.kernel_LMB, self.out_O) if t is not None)


def _whole(rows: torch.Tensor, first: int, size: int) -> torch.Tensor:
    """The rows in float32, zeros before and after them: (T, size)."""
    return torch.nn.functional.pad(rows.float(), (first, size - first - rows.shape[1]))


@dataclass(frozen=True, eq=False)
class SparseAdded:
    """A matrix of few entries: y[rows[e]] += values[e] x[columns[e]]; float32."""

    values_E: torch.Tensor
    rows_E: torch.Tensor  # int32
    columns_E: torch.Tensor  # int32
    size: int  # O
    stage = "added"

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        added = torch.zeros(len(rows), self.size, device=rows.device)
        return added.index_add_(1, self.rows_E, rows.index_select(1, self.columns_E).float() * self.values_E)

    def gained(self, gain_O: torch.Tensor) -> RareTerm:
        return replace(self, values_E=self.values_E * gain_O[self.rows_E.long()])

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.values_E, self.rows_E, self.columns_E)
