"""Terms that cannot be stated before the base has been asked: DoRA's norms, PiSSA's start, HRA's reflections.

`terms.resolve` replaces them, between reader and slots; nothing later meets one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flora_vllm.terms.kind import Kind, Probe


@dataclass(frozen=True, eq=False)
class FromBase:
    """Becomes `build(probe)`. `tensors`: what `build` holds; `rank`: of the low-rank terms it will give.

    `shape`: (O, I) as far as the tensors tell. `dense_bytes`: of the dense terms it will give.
    """

    build: Callable[[Probe], tuple[Any, ...]]
    tensors: tuple[torch.Tensor, ...]
    rank: int = 0
    shape: tuple[int | None, int | None] = (None, None)
    dense_bytes: int = 0


def _never(*_: object) -> None:
    raise AssertionError("terms that need the base are resolved before they are folded or merged")


FROM_BASE = Kind(
    order=0,
    shape=lambda term: term.shape,
    tensors=lambda term: iter(term.tensors),
    fold=_never,
    merge=_never,
    ranks=lambda term: (0, term.rank),
    resolve=lambda term, probe: term.build(probe),
    dense_bytes=lambda term: term.dense_bytes,
)
