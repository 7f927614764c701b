"""What kernels do not know, in plain torch around any of them: the rare terms of slots.

The kernel serves the hot terms of all rows in one call. Before it, rows whose slot turns its input are turned: in
place of the row where all slices agree, as further rows of the same slot where they differ. After it, added terms come
in float32 from the row as it was, and output terms act on the sum with its bias. On a CPU the native library does what
RoAd and VeRA ask of rows, for the slots whose only rare term it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from flora_vllm.ops.cpu.rows import DTYPES, NativeRows
from flora_vllm.ops.rare import RareTerm, SharedLow, Swapped, placed, swap_
from flora_vllm.ops.table import LinearKernel
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms

# Rows from which a run's vectors are not worth copying row by row to be done with other runs'.
SHORT_RUN = 8

# Rare terms of one slot for one slice.
RareTerms = tuple[RareTerm, ...]


@dataclass(frozen=True, eq=False)
class _SlotRare:
    """One slot's rare terms, by slice.

    `turns`: the input terms of each different input; `turn_of_slice[i]`: which of them slice i sees. The first is
    what the token's own row becomes (nothing, if some slice sees x as it is); each other one is a further row.
    """

    turns: tuple[RareTerms, ...]
    turn_of_slice: tuple[int, ...]
    added: tuple[RareTerms, ...]
    output: tuple[RareTerms, ...]
    by_row: tuple[tuple | None, ...]  # equal where the native library does the slots' only terms together


@dataclass(slots=True, eq=False)  # frozen ones take thrice as long to make, one a segment and layer
class _Piece:
    """A segment with rare terms: its N rows of x and y (`run`: if neighbours), and where its further rows begin."""

    rare: _SlotRare
    rows_N: torch.Tensor
    run: slice | None
    count: int  # N
    further: int  # first of (turns - 1) runs of N rows


class Shell:
    """y of a kernel with the rare terms of all slots around it.

    sizes: out features of each slice. device: where x is, for terms that come from the host.
    hidden_bias: the bias of a layer whose caller adds it later; output terms act on the sum with it.
    """

    def __init__(
        self,
        kernel: LinearKernel,
        sizes: Sequence[int],
        hidden_bias: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._kernel = kernel
        self._parts = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        self._hidden_bias = hidden_bias
        self._device = device
        on_host = device is None or device.type == "cpu"
        self._native = NativeRows() if on_host and NativeRows.is_available() else None
        self._rare: dict[int, _SlotRare] = {}

    @property
    def rare_slots(self) -> frozenset[int]:
        """Slots with rare terms; steps without them need only the kernel."""
        return frozenset(self._rare)

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it."""
        self._rare.pop(slot, None)
        if terms is None or not any(part is not None and part.rare for part in terms):
            self._kernel.write_slot(slot, terms)
            return
        hot, rare = zip(*(_parted(part) for part in terms), strict=True)
        if all(part is None for part in terms):
            hot = None
        self._kernel.write_slot(slot, hot)
        self._rare[slot] = _slot_rare([tuple(placed(term, self._device) for term in terms) for terms in rare])

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter."""
        if segments is None or not any(slot in self._rare for slot in segments.slots):
            return self._kernel.forward(x_TI, bias_O, segments)
        tokens = x_TI.shape[0]
        pieces, copies = [], []
        further = tokens
        places = zip(segments.slots, _rows_on(segments, x_TI.device), segments.runs, strict=True)
        for slot, (rows_N, count), run in places:
            rare = self._rare.get(slot)
            copies.append(0 if rare is None else len(rare.turns) - 1)
            if rare is not None:
                pieces.append(_Piece(rare, rows_N, run, count, further))
                further += copies[-1] * count
        turned_VI = _turned(x_TI, pieces, further)
        y_VO = self._kernel.forward(turned_VI, bias_O, _extended(segments, tuple(copies)))
        y_TO = y_VO[:tokens]
        for i, part in enumerate(self._parts):
            for piece in pieces:
                if piece.rare.turn_of_slice[i]:
                    first = piece.further + (piece.rare.turn_of_slice[i] - 1) * len(piece.rows_N)
                    y_TO[piece.rows_N, part] = y_VO[first : first + len(piece.rows_N), part]
            self._finish(y_TO[:, part], x_TI, i, [p for p in pieces if p.rare.added[i] or p.rare.output[i]])
        return y_TO

    def _finish(self, y_TP: torch.Tensor, x_TI: torch.Tensor, i: int, pieces: list[_Piece]) -> None:
        """Added and output terms of slice i come to its outputs, in place."""
        if self._native is not None and y_TP.dtype in DTYPES and y_TP.stride(1) == 1:
            pieces = self._finish_natively(self._native, y_TP, x_TI, i, pieces)
        if not pieces:
            return
        rows = _joined(pieces)
        y_NP = y_TP[rows].float()
        _add(y_NP, x_TI, rows, [(piece.rare.added[i], len(piece.rows_N)) for piece in pieces])
        hidden_P = None if self._hidden_bias is None else self._hidden_bias[self._parts[i]].float()
        if hidden_P is not None:
            y_NP += hidden_P
        _map(y_NP, [(piece.rare.output[i], len(piece.rows_N)) for piece in pieces])
        if hidden_P is not None:
            y_NP -= hidden_P
        if not isinstance(rows, slice) or y_TP.dtype != torch.float32:  # else they are the same numbers
            y_TP[rows] = y_NP.to(y_TP.dtype)

    def _finish_natively(
        self, native: NativeRows, y_TP: torch.Tensor, x_TI: torch.Tensor, i: int, pieces: list[_Piece]
    ) -> list[_Piece]:
        """The same of the pieces whose terms the native library knows; the others are left. What is done with a row
        hangs on its own slot alone."""
        left: list[_Piece] = []
        alike: dict[tuple, list[_Piece]] = {}
        for piece in pieces:
            key = piece.rare.by_row[i]
            (left if key is None else alike.setdefault(key, [])).append(piece)
        for members in alike.values():
            terms: list[Any] = [(piece.rare.added[i] or piece.rare.output[i])[0] for piece in members]
            rows_N, counts = torch.cat([piece.rows_N for piece in members]), [piece.count for piece in members]
            first = terms[0]
            if isinstance(first, Swapped) and self._hidden_bias is None:
                vectors = [term.first_O for term in terms], [term.second_O for term in terms]
                native.swap_(y_TP, rows_N, counts, *vectors, first.group)
            elif isinstance(first, SharedLow) and first.down_LI.dtype == first.up_OL.dtype == x_TI.dtype == y_TP.dtype:
                middle_NL = x_TI.index_select(0, rows_N) @ first.down_LI.T
                native.scale_(middle_NL, counts, [term.mid for term in terms])
                native.add_(y_TP, rows_N, counts, middle_NL @ first.up_OL.T, [term.out_O for term in terms])
            else:
                left += members
        return left


def _joined(pieces: list[_Piece]) -> slice | torch.Tensor:
    """The rows of all pieces; a slice if they are neighbours in this order."""
    runs = [piece.run for piece in pieces if piece.run is not None]
    if len(runs) == len(pieces) and all(one.stop == other.start for one, other in pairwise(runs)):
        return slice(runs[0].start, runs[-1].stop)
    return torch.cat([piece.rows_N for piece in pieces])


def _some(x_TI: torch.Tensor, rows: slice | torch.Tensor, which: slice | torch.Tensor) -> torch.Tensor:
    """Those of `rows` that `which` names."""
    return x_TI[rows][which] if isinstance(rows, slice) else x_TI[rows[which]]


def _by_row(terms: RareTerms) -> tuple | None:
    """Equal for the terms of slots that the native library does together; None where it does not know them."""
    match terms:
        case (Swapped() as swapped,) if _is_vector(swapped.first_O) and _is_vector(swapped.second_O):
            return Swapped, swapped.group
        case (SharedLow() as low,) if all(v is None or _is_vector(v) for v in (low.mid, low.out_O)):
            return SharedLow, _identity(low.down_LI), _identity(low.up_OL)
    return None


def _is_vector(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype == torch.float32 and tensor.is_contiguous()


@lru_cache(maxsize=16)
def _rows_on(segments: Segments, device: torch.device) -> list[tuple[torch.Tensor, int]]:
    """The rows of each segment on `device`, and how many: one copy for all layers of a step."""
    counts = [stop - start for start, stop in pairwise(segments.starts)]
    return list(zip(segments.rows_T.to(device).split(counts), counts, strict=True))


def _map(y_NP: torch.Tensor, runs: list[tuple[RareTerms, int]]) -> None:
    """The output terms of runs of rows act on y, in place. Short runs of one kind are done together."""
    together: dict[int, list[tuple[Swapped, int, int]]] = {}
    start = 0
    for terms, count in runs:
        run = slice(start, start + count)
        start = run.stop
        if count < SHORT_RUN and len(terms) == 1 and isinstance(terms[0], Swapped):
            together.setdefault(terms[0].group, []).append((terms[0], run.start, count))
            continue
        for term in terms:
            y_NP[run] = term.apply(y_NP[run])
    for group, members in together.items():
        place_M = torch.cat([torch.arange(first, first + count, device=y_NP.device) for _, first, count in members])
        first_MP, second_MP = (
            _each_row([(vector, count) for vector, (_, _, count) in zip(vectors, members, strict=True)])
            for vectors in ([term.first_O for term, _, _ in members], [term.second_O for term, _, _ in members])
        )
        z_MP = y_NP[place_M]
        swap_(z_MP, first_MP, second_MP, group)
        y_NP[place_M] = z_MP


def _each_row(vectors: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """(M, P): each vector as often as its run has rows."""
    stacked = torch.stack([vector for vector, _ in vectors])
    if all(count == 1 for _, count in vectors):
        return stacked
    counts = torch.tensor([count for _, count in vectors], device=stacked.device)
    return stacked.repeat_interleave(counts, 0, output_size=sum(count for _, count in vectors))


def _parted(part: SliceTerms | None) -> tuple[SliceTerms | None, RareTerms]:
    """What the kernel serves and what stays here. A low-rank term beside a turn reads the row as it was: it stays."""
    if part is None:
        return None, ()
    hot, rare = replace(part, rare=()), part.rare
    if part.down_RI is not None and any(term.stage == "input" for term in rare):
        assert part.up_RO is not None, "a low-rank term has both sides"
        hot = replace(hot, down_RI=None, up_RO=None)
        rare = (*rare, SharedLow(part.down_RI, part.up_RO.T))
    return hot, rare


def _slot_rare(rare: list[RareTerms]) -> _SlotRare:
    def at(stage: str) -> tuple[RareTerms, ...]:
        return tuple(tuple(term for term in terms if term.stage == stage) for terms in rare)

    inputs = at("input")
    # A slice that sees x itself has no terms, and then comes first.
    different = {tuple(map(_contents, terms)): terms for terms in sorted(inputs, key=len)}
    places = {key: place for place, key in enumerate(different)}
    turn_of_slice = tuple(places[tuple(map(_contents, terms))] for terms in inputs)
    added, output = at("added"), at("output")
    by_row = tuple(_by_row(more + mapped) for more, mapped in zip(added, output, strict=True))
    return _SlotRare(tuple(different.values()), turn_of_slice, added, output, by_row)


def _contents(term: RareTerm) -> tuple:
    """Equal for two terms of one kind over the very same tensors."""
    return type(term), *(_identity(v) if isinstance(v, torch.Tensor) else v for v in vars(term).values())


def _turned(x_TI: torch.Tensor, pieces: list[_Piece], rows: int) -> torch.Tensor:
    """x with turned rows in their places and the further ones behind, `rows` in all; x itself if none is turned."""
    if not any(any(piece.rare.turns) for piece in pieces):
        return x_TI
    turned_VI = x_TI.new_empty(rows, x_TI.shape[1])
    turned_VI[: x_TI.shape[0]] = x_TI
    for piece in pieces:
        x_NI = x_TI[piece.rows_N]
        for place, terms in enumerate(piece.rare.turns):
            z_NI = x_NI
            for term in terms:
                z_NI = term.apply(z_NI)
            if place:
                first = piece.further + (place - 1) * len(x_NI)
                turned_VI[first : first + len(x_NI)] = z_NI
            elif terms:
                turned_VI[piece.rows_N] = z_NI
    return turned_VI


@lru_cache(maxsize=16)
def _extended(segments: Segments, copies: tuple[int, ...]) -> Segments:
    """The segments with `copies[i]` further rows for each row of segment i, numbered behind all others."""
    if not any(copies):
        return segments
    further = segments.tokens
    rows, starts = [], [0]
    for (_, rows_N), count in zip(segments, copies, strict=True):
        rows += [rows_N, torch.arange(further, further + count * len(rows_N))]
        further += count * len(rows_N)
        starts.append(starts[-1] + (1 + count) * len(rows_N))
    return Segments(segments.slots, tuple(starts), torch.cat(rows))


def _add(y_NP: torch.Tensor, x_TI: torch.Tensor, rows: slice | torch.Tensor, runs: list[tuple[RareTerms, int]]) -> None:
    """The added terms of runs of rows come to y, in place. Those over the same shared factors are two products."""
    shared: dict[tuple, list[tuple[SharedLow, int, int]]] = {}
    start = 0
    for terms, count in runs:
        for term in terms:
            if isinstance(term, SharedLow):
                key = (_identity(term.down_LI), _identity(term.up_OL))
                shared.setdefault(key, []).append((term, start, count))
            else:
                run = slice(start, start + count)
                y_NP[run] += term.apply(_some(x_TI, rows, run))
        start += count
    for group in shared.values():
        _add_shared(y_NP, x_TI, rows, group)


def _identity(tensor: torch.Tensor) -> tuple:
    """Equal for two views of the same numbers; both are alive, so that the address is no other's."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _add_shared(
    y_NP: torch.Tensor, x_TI: torch.Tensor, rows: slice | torch.Tensor, group: list[tuple[SharedLow, int, int]]
) -> None:
    """out ∘ up(mid · down x) of the group's rows come to y: one product with down, one with up, vectors by token."""
    place_M = torch.cat([torch.arange(start, start + count, device=x_TI.device) for _, start, count in group])
    first = group[0][0]
    middle_ML = (_some(x_TI, rows, place_M).to(first.down_LI.dtype) @ first.down_LI.T).float()
    done = 0
    for term, _, count in group:
        run = slice(done, done + count)
        done = run.stop
        if term.mid is not None:
            middle_ML[run] = middle_ML[run] * term.mid if term.mid.ndim == 1 else middle_ML[run] @ term.mid.T
    added_MP = (middle_ML.to(first.up_OL.dtype) @ first.up_OL.T).float()
    done = 0
    for term, _, count in group:
        if term.out_O is not None:
            added_MP[done : done + count] *= term.out_O
        done += count
    y_NP.index_add_(0, place_M, added_MP)
