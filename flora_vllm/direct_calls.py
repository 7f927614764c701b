"""Calls of `flora::linear` that C++ takes: from torch's dispatcher to a kernel's compiled form, no Python between.

A small library (ops/cpu/csrc/torch_op.cpp) overrides the op on the CPU for the layers connected here. It serves the
plain case only and hands everything else to the Python op, which is all there is where the library cannot be built.
"""

import ctypes
import logging
import weakref
from functools import cache

import torch

from flora_vllm.errors import ConfigError
from flora_vllm.ops.cpu.build import load_torch_op
from flora_vllm.ops.cpu.linear import DirectForm

logger = logging.getLogger(__name__)


def connect(owner: object, number: int, form: DirectForm, step: ctypes.Structure, has_rare: ctypes.c_int64) -> None:
    """Calls with handle `number` run `form` without Python while `owner` lives.

    `owner` keeps alive what the addresses mean: the form's layer, the StepWords `step`, and `has_rare`: while it is
    not 0 some slot holds what the kernel does not know, and steps with adapters are Python's.
    """
    library = _library()
    if library is None:
        return
    flora_connect, size, pointer = library.flora_connect, ctypes.c_int64, ctypes.c_void_p
    flora_connect.restype = None
    flora_connect.argtypes = (size, pointer, pointer, pointer, pointer, size, size, ctypes.c_int)
    words, rare = ctypes.addressof(step), ctypes.addressof(has_rare)
    is_bfloat16 = form.dtype == torch.bfloat16
    flora_connect(number, form.forward, form.layer, words, rare, form.in_features, form.out_features, is_bfloat16)
    weakref.finalize(owner, library.flora_disconnect, ctypes.c_int64(number))


@cache
def _library() -> ctypes.CDLL | None:
    """None if it cannot be built; says so once."""
    try:
        return load_torch_op()
    except (OSError, ConfigError) as error:
        logger.warning("torch's calls to the native op go through Python, which is slower: %s", error)
        return None
