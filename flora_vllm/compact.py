"""An adapter's slot contents as the host keeps them: one tensor a dtype, and numbers, however many layers there are.

An engine may keep thousands of adapters of hundreds of tensors each. As Python objects they make a full pass of the
cyclic garbage collector take a second (2,000 adapters of SmolLM2), in which no request gets a token. The collector
does not follow tuples of numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from flora_vllm.ops.terms import LayerTerms, SliceTerms
from flora_vllm.pacing import pace
from flora_vllm.slots import is_finite


class CompactLayers(Mapping[str, LayerTerms]):
    """Layer name -> slot contents, equal to those of `layers`, which it copies. What it returns are views.

    Tensors that adapters share (those of a rare term that are not its own) are kept as they are, not copied, and so are
    views of `chunks`, the memory in which the contents were made.
    """

    def __init__(self, layers: Mapping[str, LayerTerms], chunks: Sequence[torch.Tensor] = ()) -> None:
        self._memory = list(chunks)
        made_in = {chunk.untyped_storage().data_ptr(): number for number, chunk in enumerate(chunks)}
        further: dict[torch.dtype, tuple[int, int]] = {}  # number of the chunk for other tensors, its size so far
        places: dict[torch.Tensor, tuple] = {}  # slices may share a factor: it is kept once
        moved: list[torch.Tensor] = []
        for tensor in (t for terms in layers.values() for part in terms if part is not None for t in part.tensors()):
            if tensor in places:
                continue
            number = made_in.get(tensor.untyped_storage().data_ptr())
            if number is not None:
                places[tensor] = (number, tensor.storage_offset(), tuple(tensor.shape))
                continue
            number, start = further.get(tensor.dtype, (len(chunks) + len(further), 0))
            places[tensor] = (number, start, tuple(tensor.shape))
            further[tensor.dtype] = (number, start + tensor.numel())
            moved.append(tensor)
        self._memory += [torch.empty(size, dtype=dtype) for dtype, (_, size) in further.items()]
        for tensor in moved:
            self._view(places[tensor]).copy_(tensor)

        self._shared: list[torch.Tensor] = []

        def placed(value: Any) -> Any:
            """A tensor as numbers: where it lies, or which of the shared ones it is."""
            if not isinstance(value, torch.Tensor):
                return value
            if value not in places:
                self._shared.append(value)
                places[value] = (len(self._shared) - 1,)
            return places[value]

        def places_of(part: SliceTerms | None) -> tuple | None:
            if part is None:
                return None
            *hot, rare = (getattr(part, field.name) for field in fields(part))
            pace()
            return (*map(placed, hot), tuple(
                (_number_of(type(term)), *(placed(getattr(term, f.name)) for f in fields(term))) for term in rare
            ))  # fmt: skip

        self._layers: Mapping[str, tuple] = {name: tuple(map(places_of, terms)) for name, terms in layers.items()}

    @classmethod
    def placed(cls, places: Mapping[str, tuple], memory: Sequence[torch.Tensor]) -> "CompactLayers":
        """Contents that lie in `memory` as `places` says; both are kept, not copied."""
        layers = cls({}, memory)
        layers._layers = places
        return layers

    @property
    def places(self) -> Mapping[str, tuple]:
        """Layer name -> for each slice None or SliceTerms' fields in order, a tensor as (memory, start, shape)."""
        return self._layers

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """The tensors that hold the numbers, those of `chunks` first."""
        return self._memory

    def __getitem__(self, name: str) -> LayerTerms:
        views: dict[tuple, torch.Tensor] = {}  # slices that share a factor get the same tensor
        return tuple(None if part is None else self._slice(part, views) for part in self._layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the adapter's own tensors take."""
        return sum(memory.numel() * memory.element_size() for memory in self._memory)

    def is_finite(self) -> bool:
        """Whether every number is; one look at each chunk."""
        return all(is_finite(memory) for memory in self._memory if len(memory))

    def _slice(self, part: tuple, views: dict[tuple, torch.Tensor]) -> SliceTerms:
        def value_of(value: Any) -> Any:
            if not isinstance(value, tuple):
                return value
            if value not in views:
                views[value] = self._view(value)
            return views[value]

        *hot, rare = part
        terms = tuple(_rare_types[number](*map(value_of, values)) for number, *values in rare)
        return SliceTerms(*map(value_of, hot), rare=terms)

    def _view(self, place: tuple) -> torch.Tensor:
        if len(place) == 1:
            return self._shared[place[0]]
        number, start, shape = place
        return self._memory[number].as_strided(shape, _strides(shape), start)


# The classes of rare terms that were met; a number in place of one keeps the tuples free of objects.
_rare_types: list[type] = []


def _number_of(kind: type) -> int:
    if kind not in _rare_types:
        _rare_types.append(kind)
    return _rare_types.index(kind)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
