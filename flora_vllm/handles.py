"""Objects that torch ops reach by number: an op takes tensors, and a tensor is all that compiled code keeps of one."""

import itertools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Handles(Generic[T]):
    """The objects of one kind of op. None is kept alive by its number."""

    def __init__(self) -> None:
        self._objects: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    def register(self, thing: T) -> torch.Tensor:
        """The handle, an int64 scalar."""
        number = next(self._numbers)
        self._objects[number] = thing
        return torch.tensor(number, dtype=torch.int64)

    def __getitem__(self, handle: torch.Tensor) -> T:
        return self._objects[int(handle)]


def define_op(name: str, signature: str, op: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """torch.ops.flora.<name>, which whatever traces a model sees as one call. `fake`: what it gives, by shape alone."""
    _library.define(f"{name}{signature}")
    _library.impl(name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flora::{name}", fake, lib=_library)
    return getattr(torch.ops.flora, name)


# Kept for the life of the process: the ops disappear with the library that defines them.
_library = torch.library.Library("flora", "FRAGMENT")
