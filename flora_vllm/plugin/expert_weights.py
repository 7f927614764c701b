"""Products with the weights of one expert, as vLLM's kernels have them.

The Triton kernel has them in the checkpoint's order. The CPU kernel packs them in a way that is not said anywhere, so a
known matrix is packed at start and compared; a packing that is not recognised is refused.
"""

import functools
from typing import Any

import torch
from torch.nn.functional import linear, pad

# Ways to pack W (O, I): tiles of so many outputs, in each the inputs in groups of so many.
_TILES = ((16, 1), (32, 1), (16, 2), (32, 2))
# Rows up to which products run on the packed tiles, without unpacking W first; measured. Sums are float32's either way,
# but bfloat16 is fast only where the CPU multiplies it, and float16 nowhere.
_FEW_ROWS = {torch.float32: 32, torch.bfloat16: 16 if torch.cpu._is_avx512_bf16_supported() else 0}


class Weights:
    """Products with one expert's weights, read where the kernel has them at the time of the call.

    The kernel pads an expert's inner size with zeros; `inner` is the size without. Gate and up, which it may have
    interleaved, are told apart here. Numbers are places in this rank's weights. tile: None where they are not packed.
    """

    def __init__(self, experts: Any, inner: int, tile: tuple[int, int] | None, is_interleaved: bool) -> None:
        self._experts, self._inner, self._tile, self._is_interleaved = experts, inner, tile, is_interleaved

    def gate_up(self, number: int, x_NH: torch.Tensor) -> torch.Tensor:
        return self._gate_then_up(product(x_NH, self._experts.w13_weight[number], self._tile))

    def down(self, number: int, x_NM: torch.Tensor) -> torch.Tensor:
        weight = self._experts.w2_weight[number]
        return product(pad(x_NM, (0, weight.shape[1] - self._inner)), weight, self._tile)

    def gate_up_bias(self, number: int) -> torch.Tensor | None:
        bias = getattr(self._experts, "w13_bias", None)
        return None if bias is None else self._gate_then_up(bias[number])

    def down_bias(self, number: int) -> torch.Tensor | None:
        bias = getattr(self._experts, "w2_bias", None)
        return None if bias is None else bias[number]

    def _gate_then_up(self, both: torch.Tensor) -> torch.Tensor:
        half = both.shape[-1] // 2
        gate, up = (both[..., ::2], both[..., 1::2]) if self._is_interleaved else both.split(half, -1)
        return torch.cat([gate[..., : self._inner], up[..., : self._inner]], -1)


@functools.cache
def packing(isa: str, dtype: torch.dtype) -> tuple[int, int] | None:
    """Which of _TILES the kernel's `isa` packs weights of `dtype` in; None if none."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    known = torch.arange(64 * 128).view(1, 64, 128)
    # Two matrices of numbers that every dtype has exactly tell all places apart.
    parts = [part.to(dtype) for part in (known % 128, known // 128)]
    packed = [cpu_prepack_moe_weight(part, isa)[0] for part in parts]
    for tile in _TILES:
        if all(torch.equal(unpacked(p, tile), part[0]) for p, part in zip(packed, parts, strict=True)):
            return tile
    return None


def unpacked(packed_OI: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """W (O, I) of a packed matrix."""
    outputs, inputs = packed_OI.shape
    rows, group = tile
    tiles = packed_OI.reshape(outputs // rows, inputs // group, rows, group)
    return tiles.permute(0, 2, 1, 3).reshape(outputs, inputs)


def product(x_NI: torch.Tensor, packed_OI: torch.Tensor, tile: tuple[int, int] | None) -> torch.Tensor:
    """y_NO = W x of a packed W (None: not packed), without bias."""
    if tile is None:
        return linear(x_NI, packed_OI)
    outputs, inputs = packed_OI.shape
    rows, group = tile
    if group > 1 or len(x_NI) > _FEW_ROWS.get(packed_OI.dtype, 0):
        return linear(x_NI, unpacked(packed_OI, tile))
    y_BNR = x_NI @ packed_OI.view(outputs // rows, inputs, rows)
    return y_BNR.permute(1, 0, 2).reshape(len(x_NI), outputs)
