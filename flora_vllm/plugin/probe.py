"""What terms may ask of the base while it runs in an engine (`terms.Probe`): the layers' own base calls.

A layer is asked through the call that serves it, so any quantisation will do and no weight is kept for this. With
tensor parallelism every rank asks at the same time and gets the whole module's answer.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_world_size, get_tp_group

from flora_vllm.errors import adapter_error
from flora_vllm.pacing import NotBesideStepsError, Turns
from flora_vllm.plugin.attach import Attached
from flora_vllm.slots import SliceLayout

T = TypeVar("T")
ANOTHER_RANK = "another rank of this engine refused it; its log says why"
# Rows of one base call: enough for a product, little beside a step's.
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Beside:
    """Of a thread that runs beside the steps. `group`: of these threads of all ranks; None if there is one rank."""

    group: torch.distributed.ProcessGroup | None
    turns: Turns


BESIDE: ContextVar[Beside | None] = ContextVar("flora_beside", default=None)


def group_beside_steps() -> Any:
    """The group for `Beside`; every rank of this tensor-parallel group calls it at the same time."""
    group = get_tp_group()
    return (
        None
        if group.world_size == 1
        else torch.distributed.new_group(group.ranks, backend="gloo", use_local_synchronization=True)
    )


def all_agree(is_fine: bool, device: torch.device) -> bool:
    """Whether every rank says so; they must all ask."""
    if get_tensor_model_parallel_world_size() == 1:
        return is_fine
    if (beside := BESIDE.get()) is not None:
        bad = torch.tensor([0 if is_fine else 1])
        torch.distributed.all_reduce(bad, group=beside.group)
        return not bool(bad.item())
    bad = torch.tensor([0.0 if is_fine else 1.0], device=device)
    return not bool(tensor_model_parallel_all_reduce(bad).item())


def together(where: str, device: torch.device, make: Callable[[], T]) -> T:
    """What `make` gives, on every rank or on none; raises what kept this rank from it, or that another was.

    Whatever that was, out of memory or a fault of ours: the others wait for this rank's word. `make` asks no rank
    anything, or all ranks alike.
    """
    made, error = None, None
    try:
        made = make()
    except Exception as failure:  # noqa: BLE001 - raised below
        error = failure
    if not all_agree(error is None, device):
        raise error or adapter_error(where, [ANOTHER_RANK])
    return cast("T", made)


def stages_agree(is_fine: bool) -> bool:
    """The same of the pipeline's stages. Only outside of steps, in which a stage may wait for another."""
    group = get_pp_group()
    if group.world_size == 1:
        return is_fine
    bad = torch.tensor([0 if is_fine else 1])
    torch.distributed.all_reduce(bad, group=group.cpu_group)
    return not bool(bad.item())


class EngineBase:
    """The base under all adapted layers of this rank; keeps each module's row norms once they were asked for."""

    def __init__(
        self,
        attached: Attached,
        device: torch.device,
        modules: Callable[[], Mapping[str, tuple[int, int]]],
        stores_in_out: Callable[[str], bool],
    ) -> None:
        self._attached = attached
        self._device = device
        self._make_modules = modules
        self.stores_in_out = stores_in_out
        self._norms: dict[str, torch.Tensor] = {}
        self._places = {name: (layer, parts) for layer, name, parts in _places(attached)}

    def forget(self) -> None:
        """The base has other weights from now on."""
        self._norms = {}  # a thread that is measuring the old ones puts them into the old one

    def holds(self, place: str) -> bool:
        """Whether this rank has the module that the engine calls `place`, or a part of it."""
        return place in self._places

    def probe(self, module: str, place: str) -> "LayerProbe":
        """The probe of the checkpoint's `module`, which the engine calls `place`."""
        layer, parts = self._places[place]
        return LayerProbe(self, module, place, self._attached, layer, parts)

    @cached_property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        return self._make_modules()

    def norms(self, place: str, measure: Callable[[], torch.Tensor]) -> torch.Tensor:
        known = self._norms
        if place not in known:
            known[place] = measure()
        return known[place]

    @property
    def device(self) -> torch.device:
        return self._device


class LayerProbe:
    """One checkpoint module: some slices of one layer, whole, whatever this rank holds of them."""

    def __init__(
        self,
        base: EngineBase,
        module: str,
        place: str,
        attached: Attached,
        layer: str,
        parts: tuple[tuple[SliceLayout, int, int], ...],  # slice, its first local row, its first row in the module
    ) -> None:
        self.module = module
        self.dtype = attached.dtypes[layer]
        self._base, self._place, self._parts = base, place, parts
        self._layout, self._bias_O = attached.layouts[layer], attached.biases[layer]
        self._product = _product_of(attached, layer)
        fused = place == self._layout.module
        self._size = self._layout.full_out_features if fused else parts[0][0].full_size
        self.shape = (self._size, self._layout.full_in_features)

    @property
    def modules(self) -> Mapping[str, tuple[int, int]]:
        return self._base.modules

    @property
    def stores_in_out(self) -> bool:
        return self._base.stores_in_out(self.module)

    def product(self, x_NI: torch.Tensor) -> torch.Tensor:
        columns = slice(self._layout.in_start, self._layout.in_start + self._layout.in_features)
        x_NI = x_NI[:, columns].to(self._base.device, self.dtype)
        return self._whole(torch.cat([self._base_call(rows) for rows in x_NI.split(CHUNK)]).float())

    def _base_call(self, x_NI: torch.Tensor) -> torch.Tensor:
        beside = BESIDE.get()
        if beside is None:
            return self._product(x_NI)
        # A quantised layer's call may use memory of the layer's own. A device runs this thread's calls and the steps'
        # side by side, whenever they were made.
        with beside.turns.between_steps():
            self._wait_for_device()
            y_NO = self._product(x_NI)
            self._wait_for_device()
        return y_NO

    def _wait_for_device(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.synchronize(self._base.device)

    def squared_row_norms(self) -> torch.Tensor:
        def measure() -> torch.Tensor:
            norms_O = torch.zeros(self._size)
            for start in range(0, self._layout.full_in_features, CHUNK):
                norms_O += self.product(self._unit_rows(start)).square().sum(0)
            return norms_O

        return self._base.norms(self._place, measure)

    def weight(self) -> torch.Tensor:
        starts = range(0, self._layout.full_in_features, CHUNK)
        return torch.cat([self.product(self._unit_rows(start)) for start in starts]).T.contiguous()

    def bias(self) -> torch.Tensor | None:
        return None if self._bias_O is None else self._whole(self._bias_O.float()[None], sums=False)[0]

    def _unit_rows(self, start: int) -> torch.Tensor:
        """Rows `start` and on of the identity: their products are W's columns."""
        size = self._layout.full_in_features
        rows = torch.zeros(min(CHUNK, size - start), size)
        rows[torch.arange(len(rows)), start + torch.arange(len(rows))] = 1
        return rows

    def _whole(self, local_NO: torch.Tensor, *, sums: bool | None = None) -> torch.Tensor:
        """The module's outputs from this rank's: other ranks' rows, or other ranks' parts of a sum."""
        sums = self._layout.sums if sums is None else sums
        whole_NO = local_NO.new_zeros(local_NO.shape[0], self._size)
        held_O = local_NO.new_zeros(1, self._size)
        for part, begin, start in self._parts:
            whole_NO[:, start : start + part.size] = local_NO[:, begin : begin + part.size]
            held_O[:, start : start + part.size] = 1
        is_shared = get_tensor_model_parallel_world_size() > 1 and not self._layout.is_alone
        if is_shared and (sums or not self._layout.sums):
            if BESIDE.get() is not None:
                raise NotBesideStepsError
            whole_NO = tensor_model_parallel_all_reduce(whole_NO)
            if not sums:
                # Key-value heads may be held by several ranks.
                whole_NO = whole_NO / tensor_model_parallel_all_reduce(held_O)
        return whole_NO.cpu()


def _product_of(attached: Attached, layer: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (N, I) -> y (N, O): the base call of one adapted layer or embedding."""
    if layer in attached.embeddings:
        return attached.embeddings[layer].product
    kernel = attached.layers[layer].kernel
    return lambda x_NI: kernel.forward(x_NI, None, None)


def _places(attached: Attached) -> Any:
    """(layer, checkpoint module in the engine's words, its slices with their first rows) for all modules."""
    for layer, layout in attached.layouts.items():
        begins = [sum(layout.sizes[:i]) for i in range(len(layout.slices))]
        by_module: dict[str, list] = {}
        for part, begin in zip(layout.slices, begins, strict=True):
            by_module.setdefault(part.module, []).append((part, begin))
        for module, parts in by_module.items():
            fused = module == layout.module
            yield layer, module, tuple((p, b, p.fused_start if fused else p.start) for p, b in parts)
        if layout.module not in by_module:
            yield layer, layout.module, tuple((p, b, p.fused_start) for p, b in zip(layout.slices, begins, strict=True))
