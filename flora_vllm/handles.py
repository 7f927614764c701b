"""Objects that torch ops reach by number: an op takes tensors, and a tensor is all that compiled code keeps of one."""

import itertools
import weakref
from typing import Generic, TypeVar

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
