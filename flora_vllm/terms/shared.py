"""Factors that many adapters share (VeRA's, FourierFT's bases): one copy an engine, however many adapters use it."""

import weakref
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Shared:
    """`tensor` under a `key` that stands for its content: equal keys are equal tensors."""

    key: str
    tensor: torch.Tensor


Factor = torch.Tensor | Shared

# Lives as long as some slot's contents or some term holds it.
_held: "weakref.WeakValueDictionary[tuple, torch.Tensor]" = weakref.WeakValueDictionary()


def tensor_of(factor: Factor) -> torch.Tensor:
    return factor.tensor if isinstance(factor, Shared) else factor


def held(factor: Shared, rows: slice, columns: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """This part of a shared factor in this dtype, the same tensor for everyone who asks for it."""
    key = (factor.key, rows.start, rows.stop, columns.start, columns.stop, dtype, device)
    part = _held.get(key)
    if part is None:
        part = factor.tensor[rows, columns].to(device, dtype).contiguous()
        _held[key] = part
    return part
