"""Launching a Triton kernel again without Triton's own look at its forty arguments.

That look is two thirds of a layer call's host time. What it finds is which compiled kernel to launch, and that hangs on
each number's and address's divisibility only: so it is kept by those. Triton still compiles, and launches first.
"""

from typing import Any

import triton

_LARGEST_INT32 = 2**31 - 1
_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    """`kernel[grid](*args, **constants, num_warps=warps)`; args: tensors and integers, the first a tensor; `constants`:
    the parameters after them, in order."""
    if type(kernel) is not triton.JITFunction:  # interpreted, or a stand-in that watches launches
        kernel[grid](*args, **constants, num_warps=warps)
        return
    values = constants.values()
    # Equal where what Triton compiles for is: its rules, or finer. Spelled out, for a call each costs as much again.
    kinds = [
        (-1 if a == 1 else (a % 16 == 0) + 2 * (a > _LARGEST_INT32)) if type(a) is int else (a.dtype, a.data_ptr() % 16)
        for a in args
    ]
    key = (id(kernel), warps, args[0].device, *values, *kinds)
    found = _compiled.get(key)
    if found is not None:
        found[grid](*args, *values)
        return
    assert [*constants] == kernel.arg_names[len(args) :], f"{[*constants]} are not the last of {kernel.arg_names}"
    _compiled[key] = kernel[grid](*args, **constants, num_warps=warps)
