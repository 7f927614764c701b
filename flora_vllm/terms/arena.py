"""Where an adapter's slot contents are made: few large tensors, so that hundreds of factors cost one write each."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Write:
    """`target` became `scale · source`, multiplied in the source's dtype or float32 and rounded once."""

    target: torch.Tensor  # a whole tensor that an arena handed out
    source: torch.Tensor  # of the same shape, any strides
    scale: float = 1.0


class Arena:
    """Hands out contiguous tensors of one dtype as views of chunks, the first of `numbers` numbers.

    `writes`: what was written into those that came from one factor, for a `plans.Plan` to repeat.
    """

    def __init__(self, dtype: torch.dtype, numbers: int) -> None:
        self.dtype = dtype
        self._size = max(numbers, 1)
        self.chunks: list[torch.Tensor] = []
        self.writes: list[Write] = []
        self._used = 0

    def take(self, *shape: int) -> torch.Tensor:
        """A tensor to be written, (shape)."""
        count = math.prod(shape)
        if not self.chunks or self._used + count > len(self.chunks[-1]):
            if self.chunks:
                self._size = max(self._size // 4, 1024)  # an estimate that was too small
            self.chunks.append(torch.empty(max(self._size, count), dtype=self.dtype))
            self._used = 0
        view = self.chunks[-1][self._used : self._used + count].view(shape)
        self._used += count
        return view

    def finished(self) -> list[torch.Tensor]:
        """The chunks; what was not handed out of the last one is zero."""
        if self.chunks:
            self.chunks[-1][self._used :].zero_()
        return self.chunks
