"""Tensors that say they are on another device and lie on the host: torch code that mixes the two fails, as on a GPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # a name that a build without CUDA knows
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnDevice(torch.Tensor):
    """`host`'s numbers. An operation with a tensor of the host among its arguments raises, unless it copies."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), dtype=host.dtype, device=DEVICE
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func not in _MOVES and not all(isinstance(tensor, cls) for tensor in tensors):
            raise RuntimeError(f"{func} of tensors on the host and on the device")
        place = kwargs.pop("device", None)
        found = func(*tree_map(on_host, args), **tree_map(on_host, kwargs))
        if "out" in kwargs:
            return kwargs["out"]
        if func._schema.name.endswith("_"):  # in place
            return args[0]
        return found if place is not None and place.type == "cpu" else tree_map(on_device, found)


class Device(TorchDispatchMode):
    """While it is on, what is made on the stand-in or copied to it is its own."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") != DEVICE or any(isinstance(leaf, OnDevice) for leaf in args):
            return func(*args, **kwargs)
        return OnDevice(func(*args, **{**kwargs, "device": torch.device("cpu")}))


def on_host(value: Any) -> Any:
    return value.host if isinstance(value, OnDevice) else value


def on_device(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice) else value
