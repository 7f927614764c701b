"""The adapted linear on a CPU in one pass over W (csrc/linear.cpp): W and every slot's terms in the op's own layout.

A tile of W, while in cache, serves the base rows, the stacked rows and every modulated segment; low-rank terms, bias
and offset are applied as a row's sum leaves the registers. bfloat16 products are summed in float32; x scaled by a, the
low-rank middle and a modulated W are each rounded once to bfloat16. A row's arithmetic depends only on its own token,
terms and path, so with a forced path a token gets the same bits in any step.
"""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flora_vllm.ops.cpu.build import build_name, load_library, why_unavailable
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms

__all__ = ["DTYPES", "DirectForm", "NativeLinear", "build_name", "scratch_bound", "scratch_bytes", "why_unavailable"]

DTYPES = (torch.bfloat16, torch.float32)


class _RawTerms(ctypes.Structure):
    """RawTerms of csrc/layer.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "down", "up", "plain", "offset")),
        ("modulate_from", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("rank", "low", "plain_size")),
    )


@dataclass(frozen=True)
class DirectForm:
    """A layer as compiled code calls it: address of a C function like flora_forward, of the layer it takes."""

    forward: int
    layer: int
    in_features: int
    out_features: int
    dtype: torch.dtype  # bfloat16 or float32


class NativeLinear:
    """y = W x + bias with every slot's terms; W and terms are copied in, so the caller may free its own.

    weight_OI: bfloat16 or float32 on the CPU. sizes: out features of each slice, in order, summing to O.
    Raises ConfigError if the op cannot be built, MemoryError where there is no room.
    """

    implementation = "native"

    def __init__(self, weight_OI: torch.Tensor, sizes: Sequence[int], rule: DispatchRule, arch: str = "native") -> None:
        assert weight_OI.device.type == "cpu", f"W is on {weight_OI.device}"
        assert weight_OI.dtype in DTYPES, f"W is {weight_OI.dtype}"
        assert sum(sizes) == weight_OI.shape[0], f"slices {tuple(sizes)} do not make {weight_OI.shape[0]} out features"
        self.rule = rule
        self.dtype = weight_OI.dtype
        self.out_features, self.in_features = weight_OI.shape
        self.sizes = tuple(sizes)
        self._library = _typed(load_library(arch))
        self._handle = self._library.flora_layer_new(
            self.dtype == torch.bfloat16,
            self.in_features,
            len(self.sizes),
            (ctypes.c_int64 * len(self.sizes))(*self.sizes),
        )
        if not self._handle:
            raise MemoryError(f"no memory for a packed W of {self.out_features} x {self.in_features}")
        weakref.finalize(self, self._library.flora_layer_free, self._handle)
        weight_OI = weight_OI.detach()
        weight_OI = weight_OI if weight_OI.stride(1) == 1 else weight_OI.contiguous()
        self._library.flora_layer_pack(self._handle, weight_OI.data_ptr(), weight_OI.stride(0))
        self._forward = self._library.flora_forward

    @property
    def nbytes(self) -> int:
        """Memory of the packed W and all slots' terms."""
        return self._library.flora_layer_bytes(self._handle)

    def write_slot(self, slot: int, terms: LayerTerms | None) -> None:
        """Slot `slot` (>= 1) has `terms` from now on; None clears it. The tensors are copied."""
        assert slot >= 1, "slot 0 is the permanent 'no adapter'"
        raw, present = None, None
        kept: list[torch.Tensor] = []
        if terms is not None and any(part is not None for part in terms):
            assert len(terms) == len(self.sizes), f"{len(terms)} slices of terms for {len(self.sizes)} slices"
            raw, present = (_RawTerms * len(terms))(), (ctypes.c_int * len(terms))()
            for i, part in enumerate(terms):
                if part is not None:
                    present[i] = 1
                    assert not part.rare, "rare terms are done around the op, see ops/shell.py"
                    raw[i] = self._raw(part, self.sizes[i], kept)
        if not self._library.flora_layer_write(self._handle, slot, raw, present):
            raise MemoryError(f"no memory for slot {slot}'s terms")

    def forward(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None, segments: Segments | None) -> torch.Tensor:
        """y_TO; `segments` None says that no token has an adapter. Every row of x must be in a segment."""
        tokens, in_features = x_TI.shape
        assert in_features == self.in_features, f"x has {in_features} features, W {self.in_features}"
        assert x_TI.dtype == self.dtype, f"x is {x_TI.dtype}, W {self.dtype}"
        row_stride, stride = x_TI.stride()
        if stride != 1:
            x_TI = x_TI.contiguous()
            row_stride = in_features
        y_TO = x_TI.new_empty((tokens, self.out_features))
        step = None
        if segments is not None:
            assert segments.starts[-1] == tokens, f"segments cover {segments.starts[-1]} of {tokens} tokens"
            step = segments.packed.data_ptr()
        bias = None
        if bias_O is not None:
            assert bias_O.dtype == self.dtype, f"bias is {bias_O.dtype}, W {self.dtype}"
            bias = bias_O.data_ptr()
        if not self._forward(self._handle, x_TI.data_ptr(), row_stride, tokens, bias, y_TO.data_ptr(), step):
            raise MemoryError("no memory for the op's scratch")
        return y_TO

    def direct_form(self) -> DirectForm:
        """How compiled code runs `forward` on whole, plain rows. Good while this layer lives."""
        address = ctypes.cast(self._forward, ctypes.c_void_p).value
        assert address is not None
        return DirectForm(address, self._handle, self.in_features, self.out_features, self.dtype)

    def _raw(self, terms: SliceTerms, size: int, kept: list[torch.Tensor]) -> _RawTerms:
        """Pointers to one slice's terms, checked; `kept` holds what they point to."""
        rank = 0 if terms.a_RI is None else terms.a_RI.shape[0]
        low = 0 if terms.down_RI is None else terms.down_RI.shape[0]
        plain_size = 0 if terms.plain_O is None else len(terms.plain_O)
        shapes = {
            "a_RI": (rank, self.in_features),
            "b_RO": (rank, size),
            "down_RI": (low, self.in_features),
            "up_RO": (low, size),
            "plain_O": (size,) if plain_size != 1 else (1,),
            "offset_O": (size,),
        }
        assert (terms.a_RI is None) == (terms.b_RO is None), "scaled products have both sides"
        assert (terms.down_RI is None) == (terms.up_RO is None), "a low-rank term has both sides"
        pointers = []
        for name, shape in shapes.items():
            tensor: torch.Tensor | None = getattr(terms, name)
            if tensor is None:
                pointers.append(None)
                continue
            assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)}, not {shape}"
            dtype = torch.float32 if name in ("plain_O", "offset_O") else self.dtype
            assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}"
            kept.append(tensor.cpu().contiguous())
            pointers.append(kept[-1].data_ptr())
        return _RawTerms(*pointers, self.rule.modulate_from(terms.products, rank), rank, low, plain_size)


def scratch_bound() -> int:
    """The most scratch a step keeps, in bytes, with torch's present thread count, however many tokens it has.

    16 MiB shared and about 1.3 MiB a thread (csrc/plan.h). The smallest unit is one token: only a token whose scaled
    copies alone are larger (rank x in features beyond 8 million in bfloat16) could exceed it.
    """
    library = _typed(load_library())
    return library.flora_shared_bound() + torch.get_num_threads() * library.flora_thread_bound()


def scratch_bytes(fill: int | None = None, arch: str = "native") -> int:
    """Scratch that the calling thread keeps, in bytes; `fill` overwrites it, which must change no later result."""
    library = _typed(load_library(arch))
    if fill is not None:
        library.flora_scratch_fill(fill)
    return library.flora_scratch_bytes()


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its C signatures declared."""
    if library.flora_layer_new.restype is ctypes.c_void_p:
        return library
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures = {
        "flora_layer_new": (pointer, number, size, size, pointer),
        "flora_layer_free": (None, pointer),
        "flora_layer_pack": (None, pointer, pointer, size),
        "flora_layer_bytes": (size, pointer),
        "flora_layer_write": (number, pointer, size, pointer, pointer),
        "flora_forward": (number, pointer, pointer, size, size, pointer, pointer, pointer),
        "flora_shared_bound": (size,),
        "flora_thread_bound": (size,),
        "flora_scratch_bytes": (size,),
        "flora_scratch_fill": (None, number),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
