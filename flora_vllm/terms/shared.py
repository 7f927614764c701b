"""Factors that many adapters share (VeRA's, FourierFT's bases): one copy an engine, however many adapters use it."""

import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from flora_vllm.errors import AdapterError

# All live as long as some slot's contents or some term holds them.
_known: "weakref.WeakValueDictionary[str, torch.Tensor]" = weakref.WeakValueDictionary()
_wholes: "weakref.WeakValueDictionary[tuple, torch.Tensor]" = weakref.WeakValueDictionary()
# A part of a factor is a view; it keeps the whole findable for the next who asks.
_whole_of = WeakIdKeyDictionary()
_by_content = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class Shared:
    """What `make` gives, a matrix of `shape`, under a `key` that stands for its content: equal keys are equal tensors.

    It is made when somebody needs it and nobody has it.
    """

    key: str
    shape: tuple[int, int]
    make: Callable[[], torch.Tensor]

    @property
    def tensor(self) -> torch.Tensor:
        found = _known.get(self.key)
        if found is None:
            found = _known[self.key] = self.make()
        return found


Factor = torch.Tensor | Shared


def tensor_of(factor: Factor) -> torch.Tensor:
    return factor.tensor if isinstance(factor, Shared) else factor


def by_content(tensor: torch.Tensor) -> Shared:
    """A tensor (rows, …) of a file as a matrix; another adapter's file may have the same one.

    It is a copy, so that it does not keep the file alive.
    """
    found = _by_content.get(tensor)
    if found is None:
        data = tensor.contiguous().view(torch.uint8).numpy().data
        key = f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data).hexdigest()}"
        copy = _known.get(key)
        if copy is None:
            copy = _known[key] = tensor.flatten(1).clone()
        found = _by_content[tensor] = Shared(key, (copy.shape[0], copy.shape[1]), lambda: copy)
    return found


def held(factor: Shared, rows: slice, columns: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A view of these rows and columns of the one copy of a factor in this dtype.

    Raises AdapterError for a factor that leaves its range: what looks at an adapter's own numbers never sees this one.
    """
    key = (factor.key, dtype, device)
    whole = _wholes.get(key)
    if whole is None:
        whole = factor.tensor.to(device, dtype)
        if whole.numel() and not torch.isfinite(torch.stack(whole.aminmax())).all():
            raise AdapterError(
                f"values of a shared factor leave the range of {dtype}, the model's dtype; serve the model "
                "in bfloat16 or float32, or retrain with smaller factors"
            )
        _wholes[key] = whole
    part = whole[rows, columns]
    _whole_of[part] = whole
    return part


def held_bytes() -> int:
    """Bytes of the factors that slot contents hold."""
    return sum(whole.untyped_storage().nbytes() for whole in list(_wholes.values()))
