"""How adapters of one structure are loaded: what the first one's load wrote, again, in a few copies over all modules.

Adapters with the same config and the same tensors (names, shapes, dtype) differ in their numbers only. A `Plan` is made
from what a load did (`Arena.writes`), not from what it should have done, so it has no rules of its own, and it is made
only where each number of a slot is one of the file's times a number of the config. An adapter with a fault, or with
tensors that repeat and are to be kept once, is none of its business: the long way finds out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flora_vllm.adapter import Adapter
from flora_vllm.compact import CompactLayers
from flora_vllm.pacing import pace
from flora_vllm.slots import is_finite
from flora_vllm.terms import Added, Arena, Product, Term

# How far a run's second tensor may be from its first, in tensors of the same shape; a layer has fewer of a kind.
_NEIGHBOURS = 16
# Numbers by which tensors are told apart.
_TOLD_APART = 8

_Source = tuple[int, tuple[int, ...], tuple[int, ...], float]  # offset, shape, strides, scale


@dataclass(frozen=True)
class Move:
    """`count` tensors (R, X) that lie at equal distances in the file, written one after another. In numbers.

    memory[target:].view(count, R, X)[i] = scale · file[first + i · step:] with `strides`
    """

    target: int
    first: int
    step: int
    count: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    scale: float

    def run(self, file: torch.Tensor, memory: torch.Tensor) -> None:
        shape = (self.count, *self.shape)
        source = file.as_strided(shape, (self.step, *self.strides), self.first)
        if self.scale != 1.0:
            # As a fold multiplies: two half types are not mixed.
            source = (source if source.dtype in (torch.float32, memory.dtype) else source.float()) * self.scale
        target = memory[self.target : self.target + math.prod(shape)].view(shape)
        # Rounded first, turned then: together they cost three times as much.
        target.copy_(source.to(memory.dtype))


@dataclass(frozen=True, eq=False)
class Plan:
    """How one structure's numbers, all of `dtype` and from byte `begin` on, become slot contents of `memory_dtype`."""

    begin: int
    dtype: torch.dtype
    numbers: int
    memory_dtype: torch.dtype
    memory_numbers: int
    moves: tuple[Move, ...]
    inputs_NK: torch.Tensor  # where the first numbers of each input side lie, (N, 8) int64
    places: Mapping[str, tuple]
    constants: tuple[torch.Tensor, ...]  # slot contents that are no adapter's own

    def load(self, data: bytearray) -> CompactLayers | None:
        """The slot contents of a file of this structure; None if a number is not finite or input sides may be equal."""
        file = torch.frombuffer(data, dtype=self.dtype, count=self.numbers, offset=self.begin)
        if not is_finite(file) or self._repeats(file):
            return None
        memory = torch.empty(self.memory_numbers, dtype=self.memory_dtype)
        for move in self.moves:
            pace()
            move.run(file, memory)
        kept = CompactLayers.placed(self.places, [memory, *self.constants])
        return kept if kept.is_finite() else None

    def _repeats(self, file: torch.Tensor) -> bool:
        first = file[self.inputs_NK].view(torch.uint8).numpy().tobytes()
        size = _TOLD_APART * self.dtype.itemsize
        return len({first[i : i + size] for i in range(0, len(first), size)}) < len(self.inputs_NK)


def plan_of(
    adapter: Adapter, data: bytearray, begin: int, dtype: torch.dtype, arenas: Sequence[Arena], kept: CompactLayers
) -> Plan | None:
    """The plan of the load that made `kept` of `adapter` in `arenas`; None if there can be none.

    `data`: the file, whose numbers are all `dtype` and begin at byte `begin`. The family must be `by_structure`.
    """
    terms = [term for module in adapter.modules.values() for term in module.terms]
    tensors = [tensor for module in adapter.modules.values() for tensor in module.tensors()]
    # Tensors that were found equal are one object, which says nothing of the next file's.
    if not all(map(_is_linear, terms)) or len({*map(id, tensors)}) < len(tensors):
        return None
    used = [arena for arena in arenas if arena.chunks]
    if len(used) != 1 or len(used[0].chunks) != 1 or begin % dtype.itemsize:
        return None
    tensor_places = _tensor_places(kept.places)
    if tensor_places is None:
        return None
    sources = _sources(used[0], data, begin, dtype)
    if sources is None or {start: shape for start, (shape, _) in tensor_places.items()} != {
        start: shape for start, (_, shape, _, _) in sources.items()
    }:
        return None
    moves, moved_to, size = _moves(sources)
    numbers = (len(data) - begin) // dtype.itemsize
    inputs = [sources[start][0] for start, (_, is_input) in tensor_places.items() if is_input]
    inputs_NK = torch.tensor(inputs, dtype=torch.int64)[:, None] + torch.arange(_TOLD_APART)
    return Plan(
        begin,
        dtype,
        numbers,
        used[0].dtype,
        size,
        tuple(moves),
        inputs_NK.clamp(max=numbers - 1),
        {name: tuple(_moved(part, moved_to) for part in parts) for name, parts in kept.places.items()},
        tuple(kept.memory[1:]),
    )


def _is_linear(term: Term) -> bool:
    """Whether a slot has the term's own factors, scaled, or nothing of the adapter."""
    if isinstance(term, Product):
        return (term.input is None) == (term.output is None)
    return isinstance(term, Added) and term.mid is None and term.out is None and isinstance(term.down, torch.Tensor)


def _tensor_places(places: Mapping[str, tuple]) -> dict[int, tuple[tuple[int, ...], bool]] | None:
    """Start in the arena -> shape, and whether it is an input side; None if other contents are the adapter's own."""
    found: dict[int, tuple[tuple[int, ...], bool]] = {}
    for part in (part for parts in places.values() for part in parts if part is not None):
        plain, *factors, offset, rare = part
        if offset is not None or rare or (plain is not None and (plain[0] == 0 or plain[2] != (1,))):
            return None
        for number, factor in enumerate(factors):
            if factor is None:
                continue
            memory, start, shape = factor
            if memory != 0:
                return None
            found[start] = (shape, number % 2 == 0)
    return found


def _sources(arena: Arena, data: bytearray, begin: int, dtype: torch.dtype) -> dict[int, _Source] | None:
    """Start in the arena -> what of the file was written there; None if anything else was."""
    base = torch.frombuffer(data, dtype=torch.uint8).data_ptr() + begin
    found: dict[int, _Source] = {}
    for write in arena.writes:
        pace()
        offset, odd = divmod(write.source.data_ptr() - base, dtype.itemsize)
        if write.source.dtype != dtype or odd or not 0 <= offset < (len(data) - begin) // dtype.itemsize:
            return None
        shape, strides = tuple(write.target.shape), write.source.stride()
        found[int(write.target.storage_offset())] = (offset, shape, strides, write.scale)
    return found


def _moves(sources: Mapping[int, _Source]) -> tuple[list[Move], dict[int, int], int]:
    """The writes as few moves, where each tensor goes (old start -> new), and how many numbers they are."""
    kinds: dict[tuple, dict[int, int]] = {}
    for start, (offset, *kind) in sources.items():
        kinds.setdefault((*kind, 0), {})
        level = 0  # one part of the file may be written twice (replicated heads)
        while offset in kinds.setdefault((*kind, level), {}):
            level += 1
        kinds[(*kind, level)][offset] = start
    moves: list[Move] = []
    moved_to: dict[int, int] = {}
    size = 0
    for (shape, strides, scale, _), starts in kinds.items():
        for run in _runs(sorted(starts)):
            step = run[1] - run[0] if len(run) > 1 else 0
            moves.append(Move(size, run[0], step, len(run), shape, strides, scale))
            for offset in run:
                moved_to[starts[offset]] = size
                size += math.prod(shape)
    return moves, moved_to, size


def _runs(offsets: list[int]) -> Iterator[list[int]]:
    """Ascending numbers as progressions, each the longest that begins with the first one left."""
    left = dict.fromkeys(offsets)
    while left:
        first, *others = (offset for offset, _ in zip(left, range(_NEIGHBOURS + 1), strict=False))
        longest = [first]
        for second in others:
            run = [first]
            while (following := run[-1] + second - first) in left:
                run.append(following)
            longest = max(longest, run, key=len)
        for offset in longest:
            del left[offset]
        yield longest


def _moved(part: Any, moved_to: Mapping[int, int]) -> Any:
    """A slice's places with the arena's starts replaced."""
    if part is None:
        return None
    plain, *factors, offset, rare = part
    return (plain, *(f if f is None else (0, moved_to[f[1]], f[2]) for f in factors), offset, rare)
