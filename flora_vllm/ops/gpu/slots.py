"""Slots of one layer as the Triton kernels read them: exactly sized factors, reached through a table of addresses.

The table stays where it is and is rewritten in place, so a captured CUDA graph replays with the new adapter. Chose
addresses over stacked buffers because those pad every slot to the largest rank, in memory and in work.
"""

from collections.abc import Sequence

import torch

from flora_vllm.errors import ConfigError
from flora_vllm.ops.terms import LayerTerms, SliceTerms, SlotLimits

# What the kernels' wide loads ask of addresses (bytes) and of lengths (elements).
_ALIGNMENT = 16


class SlotTable:
    """Device tables of a layer's slots and the tensors behind them; layouts in `kernels`.

    Slot 0 and cleared slots are plain `W x`. Raises ConfigError for terms that the kernels do not serve.
    """

    def __init__(self, sizes: Sequence[int], in_features: int, limits: SlotLimits, device: torch.device) -> None:
        self.sizes = tuple(sizes)
        self.in_features = in_features
        self.limits = limits
        self.device = device
        # Of the terms; set by the first write.
        self.dtype: torch.dtype | None = None
        # Every address is a multiple of 16 or the kernels take element-wise loads.
        self.is_aligned = all(size % _ALIGNMENT == 0 for size in (*self.sizes, in_features))
        n, slots = len(self.sizes), limits.slots + 1
        self.table = torch.zeros(slots, n, 9, dtype=torch.int64, device=device)
        self.layout = torch.zeros(slots, n, dtype=torch.int32, device=device)
        # What stands for a slice left alone and for one whose sum has no product at all.
        self._one, self._zero = (torch.full((1,), value, device=device) for value in (1.0, 0.0))
        self._terms: dict[int, LayerTerms] = {}
        self._most_rows = 1
        self._write_rows(slice(None), (None,) * n)

    def write(self, slot: int, terms: LayerTerms | None, dtype: torch.dtype) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. Tensors are kept, or copied if they must be."""
        if not 1 <= slot <= self.limits.slots:
            raise ConfigError(f"slot {slot} is out of range; slots are 1 to {self.limits.slots} (0 is 'no adapter')")
        parts: LayerTerms = (None,) * len(self.sizes) if terms is None else terms
        if len(parts) != len(self.sizes):
            raise ConfigError(f"{len(parts)} slices of terms for a layer of {len(self.sizes)} slices")
        kept = tuple(
            None if part is None else self._place(part, size, dtype)
            for part, size in zip(parts, self.sizes, strict=True)
        )
        if self.dtype not in (None, dtype) and self._terms:
            raise ConfigError(f"slot {slot}'s terms are {dtype}, those of other slots {self.dtype}")
        self.dtype = dtype
        # On the same stream as the launches: a step in flight still reads the old addresses, whose memory the
        # allocator gives away only in stream order.
        self._terms.pop(slot, None)
        if any(part is not None for part in kept):
            self._terms[slot] = kept
        self._write_rows(slot, kept)
        self._most_rows = max((max(self.rows(used)) for used in self._terms), default=1)

    def terms(self, slot: int) -> LayerTerms | None:
        return self._terms.get(slot)

    def rows(self, slot: int) -> tuple[int, ...]:
        """Rows per token, slice by slice, where W is ours."""
        terms = self._terms.get(slot)
        return (
            (1,) * len(self.sizes) if terms is None else tuple(1 if part is None else part.products for part in terms)
        )

    def most_rows(self) -> int:
        """The most rows that a token of any slot has in a slice."""
        return self._most_rows

    def _write_rows(self, slot: int | slice, terms: LayerTerms) -> None:
        entries = []
        for part in terms:
            part = SliceTerms(self._one) if part is None else part
            plain = part.plain_O if part.plain_O is not None else self._zero
            entries.append([
                _address(part.a_RI), _address(part.b_RO), _rank(part.a_RI), plain.data_ptr(), int(plain.numel() > 1),
                _address(part.offset_O), _address(part.down_RI), _address(part.up_RO), _rank(part.down_RI),
            ])  # fmt: skip
        self.table[slot] = torch.tensor(entries, dtype=torch.int64).to(self.device)
        self.layout[slot] = torch.tensor([_rows(part) for part in terms], dtype=torch.int32).to(self.device)

    def _place(self, part: SliceTerms, size: int, dtype: torch.dtype) -> SliceTerms:
        if (part.a_RI is None) != (part.b_RO is None) or (part.down_RI is None) != (part.up_RO is None):
            raise ConfigError("factors come in pairs: a with b, down with up")
        rank, low = _rank(part.a_RI), _rank(part.down_RI)
        for kind, given, most in (("Hadamard", rank, self.limits.rank), ("low", low, self.limits.low_rank)):
            if given > most:
                raise ConfigError(f"{kind} rank {given} is above this layer's maximum of {most}")
        shapes = {
            "plain_O": (size,), "a_RI": (rank, self.in_features), "b_RO": (rank, size),
            "down_RI": (low, self.in_features), "up_RO": (low, size), "offset_O": (size,),
        }  # fmt: skip
        if part.plain_O is not None and part.plain_O.numel() == 1:
            shapes["plain_O"] = (1,)
        placed = {}
        for name, shape in shapes.items():
            tensor = getattr(part, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape or 0 in shape:
                raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, this slice needs {shape}")
            kept_dtype = torch.float32 if name in ("plain_O", "offset_O") else dtype
            placed[name] = _aligned(tensor.to(self.device, kept_dtype))
        return SliceTerms(**placed)


def _rows(part: SliceTerms | None) -> int:
    return 1 if part is None else part.products


def _rank(factor: torch.Tensor | None) -> int:
    return 0 if factor is None else factor.shape[0]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
