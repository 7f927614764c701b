"""An adapter's slot contents as the host keeps them: one tensor a dtype, and numbers, however many layers there are.

An engine may keep thousands of adapters of hundreds of tensors each. As Python objects they make a full pass of the
cyclic garbage collector take a second (2,000 adapters of SmolLM2), in which no request gets a token. The collector
does not follow tuples of numbers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flora_vllm.ops.terms import LayerTerms, SliceTerms


class CompactLayers(Mapping[str, LayerTerms]):
    """Layer name -> slot contents, equal to those of `layers`, which it copies. What it returns are views."""

    def __init__(self, layers: Mapping[str, LayerTerms]) -> None:
        sizes: dict[torch.dtype, int] = {}
        places: dict[torch.Tensor, tuple] = {}  # slices may share a factor: it is kept once
        for tensor in (t for terms in layers.values() for part in terms if part is not None for t in part.tensors()):
            if tensor not in places:
                start = sizes.get(tensor.dtype, 0)
                places[tensor] = (tensor.dtype, start, tuple(tensor.shape))
                sizes[tensor.dtype] = start + tensor.numel()
        self._memory = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
        for tensor, place in places.items():
            self._view(place).copy_(tensor)

        def places_of(part: SliceTerms | None) -> tuple | None:
            if part is None:
                return None
            return tuple(places[x] if isinstance(x, torch.Tensor) else x for x in vars(part).values())

        self._layers = {name: tuple(map(places_of, terms)) for name, terms in layers.items()}

    def __getitem__(self, name: str) -> LayerTerms:
        return tuple(None if part is None else self._slice(part) for part in self._layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def _slice(self, part: tuple) -> SliceTerms:
        values: list[Any] = [self._view(x) if isinstance(x, tuple) else x for x in part]
        return SliceTerms(*values)

    def _view(self, place: tuple) -> torch.Tensor:
        dtype, start, shape = place
        return self._memory[dtype].as_strided(shape, (*shape[1:], 1), start)
