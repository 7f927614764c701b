"""Slots of one layer as the Triton kernels read them: exactly sized factors, reached through a table of addresses.

The table stays where it is and is rewritten in place, so a captured CUDA graph replays with the new adapter. Chose
addresses over stacked buffers because those pad every slot to the largest rank, in memory and in work.
"""

from collections.abc import Sequence

import numpy as np
import torch

from flora_vllm.errors import ConfigError
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import LayerTerms, SliceTerms, SlotLimits

# What the kernels' wide loads ask of addresses (bytes) and of lengths (elements).
_ALIGNMENT = 16
# A segment of plain W x this long is worth whole row tiles of its own.
PLAIN_TOKENS = 64
_NEVER = 2**31 - 1  # tokens


class SlotTable:
    """Device tables of a layer's slots and the tensors behind them; layouts in `kernels`.

    Slot 0 and cleared slots are plain `W x`. `rule` says from how many tokens a slot's segment is modulated: for all
    slices of the layer, as soon as for one. `dtype` None: that of the first factor that comes. Raises ConfigError for
    terms that the kernels do not serve.
    On the host, for what launches are sized by: `rows` (S,) base products a token, of the slice with the most,
    `modulate_from` (S,) tokens, `low_ranks` (S,) and all three as `numbers`, equal for layers that count the same; as
    bits by slot `product_bits` (it changes more than low-rank terms do) and `low_bits` (it has such terms).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        in_features: int,
        limits: SlotLimits,
        rule: DispatchRule,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.sizes = tuple(sizes)
        self.in_features = in_features
        self.limits = limits
        self.device = device
        self.rule = rule
        self.dtype = dtype
        # Every address is a multiple of 16 or the kernels take element-wise loads.
        self.is_aligned = all(size % _ALIGNMENT == 0 for size in (*self.sizes, in_features))
        n, slots = len(self.sizes), limits.slots + 1
        self.table = torch.zeros(slots, n, 9, dtype=torch.int64, device=device)
        self.layout = torch.zeros(slots, n + 2, dtype=torch.int32, device=device)
        # What stands for a slice left alone and for one whose sum has no product at all.
        self._one, self._zero = (torch.full((1,), value, device=device) for value in (1.0, 0.0))
        self._terms: dict[int, LayerTerms] = {}
        self.rows = np.ones(slots, dtype=np.int64)
        self.modulate_from = np.full(slots, self._modulate_from((None,) * n), dtype=np.int64)
        self.low_ranks = np.zeros(slots, dtype=np.int64)
        self.product_bits = self.low_bits = 0
        self._write_rows(slice(None), (None,) * n)
        self._count()

    def write(self, slot: int, terms: LayerTerms | None) -> LayerTerms | None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. Tensors are kept, or copied if they must be.

        Returns what is kept, on the device.
        """
        if not 1 <= slot <= self.limits.slots:
            raise ConfigError(f"slot {slot} is out of range; slots are 1 to {self.limits.slots} (0 is 'no adapter')")
        parts: LayerTerms = (None,) * len(self.sizes) if terms is None else terms
        if len(parts) != len(self.sizes):
            raise ConfigError(f"{len(parts)} slices of terms for a layer of {len(self.sizes)} slices")
        moved: dict[int, torch.Tensor] = {}  # slices may share a factor: it is kept once
        kept = tuple(
            None if part is None else self._place(part, size, moved)
            for part, size in zip(parts, self.sizes, strict=True)
        )
        # On the same stream as the launches: a step in flight still reads the old addresses, whose memory the
        # allocator gives away only in stream order.
        self._terms.pop(slot, None)
        if any(part is not None for part in kept):
            self._terms[slot] = kept
        self._write_rows(slot, kept)
        self.rows[slot] = max(map(_rows, kept))
        self.modulate_from[slot] = self._modulate_from(kept)
        self.low_ranks[slot] = _most_low(kept)
        self._count()
        self.product_bits = _with_bit(self.product_bits, slot, any(map(changes_products, parts)))
        self.low_bits = _with_bit(self.low_bits, slot, _most_low(kept) > 0)
        return self._terms.get(slot)

    def _count(self) -> None:
        """What every call asks of all slots together."""
        self.most_rows = int(self.rows.max())  # that a token of any slot has
        self.most_low = int(self.low_ranks.max())
        self.numbers = (self.rows.tobytes(), self.modulate_from.tobytes(), self.low_ranks.tobytes())

    def _modulate_from(self, terms: LayerTerms) -> int:
        scaled = [(part.products, _rank(part.a_RI)) for part in terms if part is not None and part.a_RI is not None]
        if not scaled:
            return {"auto": PLAIN_TOKENS, "modulated": 0, "stacked": _NEVER}[self.rule.path]
        return min(_NEVER, *(self.rule.modulate_from(products, rank) for products, rank in scaled))

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
        layout = [*map(_rows, terms), self._modulate_from(terms), _most_low(terms)]
        self.layout[slot] = torch.tensor(layout, dtype=torch.int32).to(self.device)

    def _place(self, part: SliceTerms, size: int, moved: dict[int, torch.Tensor]) -> SliceTerms:
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
            if id(tensor) not in moved:
                is_vector = name in ("plain_O", "offset_O")
                self.dtype = self.dtype or (None if is_vector else tensor.dtype)
                moved[id(tensor)] = _aligned(tensor.to(self.device, torch.float32 if is_vector else self.dtype))
            placed[name] = moved[id(tensor)]
        return SliceTerms(**placed)


def _rows(part: SliceTerms | None) -> int:
    return 1 if part is None else part.products


def _most_low(terms: LayerTerms) -> int:
    return max(0 if part is None else _rank(part.down_RI) for part in terms)


def changes_products(part: SliceTerms | None) -> bool:
    """Whether a slice's y, low-rank terms aside, is anything but W x + bias. Waits for the GPU if `part` is there."""
    if part is None:
        return False
    is_plain = part.plain_O is not None and part.plain_O.numel() == 1 and float(part.plain_O) == 1.0
    return part.a_RI is not None or part.offset_O is not None or not is_plain


def _with_bit(bits: int, slot: int, is_set: bool) -> int:
    return bits | 1 << slot if is_set else bits & ~(1 << slot)


def _rank(factor: torch.Tensor | None) -> int:
    return 0 if factor is None else factor.shape[0]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
