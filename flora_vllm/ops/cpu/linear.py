"""The adapted linear on a CPU in one pass over W (csrc/linear.cpp): W and every slot's terms in the op's own layout.

A tile of W, while in cache, serves the base rows, the stacked rows and every modulated segment; low-rank terms, gains
and bias are applied as a row's sum leaves the registers. bfloat16 products are summed in float32; x scaled by a, the
low-rank middle and a modulated W are each rounded once to bfloat16. A row's arithmetic depends only on its own token,
terms and path, so with a forced path a token gets the same bits in any step.
"""

import ctypes
import weakref
from collections.abc import Sequence

import torch

from flora_vllm.ops.cpu.build import build_name, load_library, load_torch_op, why_unavailable
from flora_vllm.ops.dispatch import PATHS, DispatchRule
from flora_vllm.ops.terms import LayerTerms, Segments, SliceTerms

__all__ = ["DTYPES", "NativeLinear", "build_name", "scratch_bound", "scratch_bytes", "why_unavailable"]

DTYPES = (torch.bfloat16, torch.float32)


class _RawTerms(ctypes.Structure):
    """RawTerms of csrc/layer.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "down", "up", "gain")),
        *((name, ctypes.c_int) for name in ("rank", "low", "identity", "gain_bias")),
    )


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
            PATHS.index(rule.path),
            rule.constant,
            rule.slope,
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

    def unpacked_weight(self) -> torch.Tensor:
        """W (O, I) as it was given, bit for bit."""
        weight_OI = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        self._library.flora_layer_unpack(self._handle, weight_OI.data_ptr())
        return weight_OI

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

    def take_calls(self, owner: object, number: int, step: ctypes.Structure, *, only_base: bool) -> None:
        """torch's calls of `flora::linear` with handle `number` run this layer without Python while `owner` lives.

        Where that cannot be built they go on through Python. step: the StepWords that `owner` keeps alive, as it does
        this layer. only_base: calls in steps with adapters are Python's all the same.
        """
        library = load_torch_op()
        if library is None:
            return
        connect, size, pointer = library.flora_connect, ctypes.c_int64, ctypes.c_void_p
        connect.restype = None
        connect.argtypes = (size, pointer, pointer, pointer, size, size, ctypes.c_int, ctypes.c_int)
        forward, words = ctypes.cast(self._forward, pointer), ctypes.addressof(step)
        is_bfloat16 = self.dtype == torch.bfloat16
        connect(number, forward, self._handle, words, self.in_features, self.out_features, is_bfloat16, only_base)
        weakref.finalize(owner, library.flora_disconnect, ctypes.c_int64(number))

    def _raw(self, terms: SliceTerms, size: int, kept: list[torch.Tensor]) -> _RawTerms:
        """Pointers to one slice's terms, checked; `kept` holds what they point to."""
        rank = 0 if terms.a_RI is None else terms.a_RI.shape[0]
        low = 0 if terms.down_RI is None else terms.down_RI.shape[0]
        shapes = {
            "a_RI": (rank, self.in_features),
            "b_RO": (rank, size),
            "down_RI": (low, self.in_features),
            "up_RO": (low, size),
            "gain_O": (size,),
        }
        assert (terms.a_RI is None) == (terms.b_RO is None), "a Hadamard term has both sides"
        assert (terms.down_RI is None) == (terms.up_RO is None), "a low-rank term has both sides"
        pointers = []
        for name, shape in shapes.items():
            tensor: torch.Tensor | None = getattr(terms, name)
            if tensor is None:
                pointers.append(None)
                continue
            assert tensor.shape == shape, f"{name} is {tuple(tensor.shape)}, not {shape}"
            assert tensor.dtype == self.dtype, f"{name} is {tensor.dtype}, W {self.dtype}"
            kept.append(tensor.cpu().contiguous())
            pointers.append(kept[-1].data_ptr())
        return _RawTerms(*pointers, rank, low, terms.identity, terms.gain_bias)


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
        "flora_layer_new": (pointer, number, size, size, pointer, number, ctypes.c_double, ctypes.c_double),
        "flora_layer_free": (None, pointer),
        "flora_layer_pack": (None, pointer, pointer, size),
        "flora_layer_unpack": (None, pointer, pointer),
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
