"""Row by row arithmetic of rare terms on a CPU, in the native library (csrc/rows.h): one call for runs of rows, each
run with vectors of its own. In float32, rounded once to the rows' dtype; each row's result is its own.
"""

import ctypes
from collections.abc import Sequence

import torch

from flora_vllm.ops.cpu.build import load_library, why_unavailable

DTYPES = (torch.bfloat16, torch.float32)


class _Runs(ctypes.Structure):
    """Runs of csrc/rows.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "counts")),
        *((name, ctypes.c_int64) for name in ("runs", "stride", "columns")),
    )


class NativeRows:
    """The library's functions. Raises ConfigError where it cannot be built; ask `is_available` first.

    Of every call: data (T, P), bfloat16 or float32, P contiguous; rows_N int64, or None for all of data's in order;
    counts: rows of each run, one behind the other; vectors: float32 (P,), contiguous, one a run.
    """

    @staticmethod
    def is_available() -> bool:
        return why_unavailable() is None

    def __init__(self) -> None:
        library = load_library()
        pointer, number = ctypes.c_void_p, ctypes.c_int
        runs = ctypes.POINTER(_Runs)
        for name, arguments in (
            ("flora_swap_runs", (number, pointer, runs, pointer, pointer, ctypes.c_int64)),
            ("flora_scale_runs", (number, pointer, runs, pointer)),
            ("flora_add_runs", (number, pointer, runs, pointer, pointer)),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = None, arguments
        self._library = library

    def swap_(
        self,
        y_TP: torch.Tensor,
        rows_N: torch.Tensor,
        counts: Sequence[int],
        first: Sequence[torch.Tensor],
        second: Sequence[torch.Tensor],
        group: int,
    ) -> None:
        """`rare.swap_` of these rows, in place."""
        runs, _kept = _runs(y_TP, rows_N, counts)
        is_half = y_TP.dtype == torch.bfloat16
        self._library.flora_swap_runs(is_half, y_TP.data_ptr(), runs, _pointers(first), _pointers(second), group)

    def scale_(self, data_NP: torch.Tensor, counts: Sequence[int], vectors: Sequence[torch.Tensor | None]) -> None:
        """Each run of rows times its vector, in place; None leaves it."""
        runs, _kept = _runs(data_NP, None, counts)
        self._library.flora_scale_runs(data_NP.dtype == torch.bfloat16, data_NP.data_ptr(), runs, _pointers(vectors))

    def add_(
        self,
        y_TP: torch.Tensor,
        rows_N: torch.Tensor,
        counts: Sequence[int],
        added_NP: torch.Tensor,
        vectors: Sequence[torch.Tensor | None],
    ) -> None:
        """y[rows] += added, each run's times its vector, in place; added has y's dtype."""
        assert added_NP.dtype == y_TP.dtype, f"{added_NP.dtype} into {y_TP.dtype}"
        assert added_NP.is_contiguous(), f"strides {added_NP.stride()}"
        runs, _kept = _runs(y_TP, rows_N, counts)
        is_half = y_TP.dtype == torch.bfloat16
        self._library.flora_add_runs(is_half, y_TP.data_ptr(), runs, added_NP.data_ptr(), _pointers(vectors))


def _runs(data_TP: torch.Tensor, rows_N: torch.Tensor | None, counts: Sequence[int]) -> tuple[_Runs, object]:
    """The runs, and what they point to."""
    assert data_TP.dtype in DTYPES, f"rows are {data_TP.dtype}"
    assert data_TP.stride(1) == 1, f"strides {data_TP.stride()}"
    counts_here = (ctypes.c_int64 * len(counts))(*counts)
    rows = None if rows_N is None else rows_N.data_ptr()
    runs = _Runs(rows, ctypes.addressof(counts_here), len(counts), data_TP.stride(0), data_TP.shape[1])
    return runs, (counts_here, rows_N)


def _pointers(vectors: Sequence[torch.Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(vectors))(*(None if vector is None else vector.data_ptr() for vector in vectors))
