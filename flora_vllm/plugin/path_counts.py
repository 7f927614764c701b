"""Which of two ways (ops/dispatch.py) products of multiplying adapters took, counted from the steps' segments."""

from collections.abc import Mapping

from flora_vllm.ops.terms import Segments


class PathCounts:
    """Segments times layers since the start, of layers whose weights the segment's adapter multiplies."""

    def __init__(self) -> None:
        self.stacked = self.modulated = 0
        self._from: dict[int, tuple[tuple[int, int], ...]] = {}  # slot -> (tokens, layers modulated from there on)

    def write_slot(self, slot: int, modulated_from: Mapping[int, int]) -> None:
        """What `Attached.write_slot` said of this slot."""
        self._from.pop(slot, None)
        if modulated_from:
            self._from[slot] = tuple(modulated_from.items())

    def count(self, segments: Segments | None) -> None:
        """A run of the model begins on these segments. Once a step: a few microseconds for each of its adapters."""
        if segments is None or not self._from:
            return
        for i, slot in enumerate(segments.slots):
            tokens = segments.starts[i + 1] - segments.starts[i]
            for at_least, layers in self._from.get(slot, ()):
                if tokens >= at_least:
                    self.modulated += layers
                else:
                    self.stacked += layers
