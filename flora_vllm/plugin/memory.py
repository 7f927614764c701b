"""`--adapter-memory`: adapters in host memory and in slots together keep within a number of bytes.

An adapter takes the bytes of its slot contents, which follow its rank: once in host memory, and once more while it has
a slot. Where there is no room those used least recently go, as they do beyond `--max-cpu-loras`, which then has no
effect; they come back from their copies on disk. Pinned ones stay, and so do those of the present step. That there is
room for these whatever the step needs is seen to when an adapter is loaded: the largest that could ever run together
must fit. Not counted are bases that many adapters share (VeRA's projections), which an engine holds once.
"""

import heapq
from collections.abc import Collection
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.plugin import probe

# In host memory, and in a slot.
_TWICE = 2


class MemoryBudget:
    """The bytes of one worker's adapters. `most_bytes` None: they are not counted. `slots`: of adapters that may run
    at once.

    `sizes`: adapter id -> bytes of its slot contents, of every adapter that may be asked for; alike on all ranks of a
    layer, which must evict alike.
    """

    def __init__(self, most_bytes: int | None, slots: int) -> None:
        self._most_bytes, self._slots = most_bytes, slots
        self.sizes: dict[int, int] = {}
        self._coming: dict[int, int] = {}  # the same of those that were found to fit and are not there yet

    def check(self, adapter_id: int, name: str, nbytes: int) -> None:
        """Raises AdapterError if an adapter of `nbytes` bytes could run beside others that it would not fit with."""
        if self._most_bytes is None:
            return
        nbytes = most_of_ranks(nbytes)
        others = [size for known, size in (self.sizes | self._coming).items() if known != adapter_id]
        largest = heapq.nlargest(self._slots - 1, others)
        needed = _TWICE * (nbytes + sum(largest))
        if needed <= self._most_bytes:
            self._coming[adapter_id] = nbytes
            return
        beside = f" and with the {len(largest)} largest that may run beside it {needed} bytes" if largest else ""
        ways = "use an adapter of lower rank" + (", unload others, start with fewer --max-loras" if largest else "")
        fault = (
            f"it takes {_TWICE * nbytes} bytes (its slot contents, in memory and once more in a slot){beside}, above "
            f"--adapter-memory {self._most_bytes}; {ways} or with --adapter-memory {needed}"
        )
        raise adapter_error(repr(name), [fault])

    def make_room(self, manager: Any, adapter_id: int, nbytes: int, needed: Collection[int] = ()) -> tuple[int, ...]:
        """Have `manager` (FloraModelManager) remove what must go before this adapter is in memory and in a slot.

        The ids of those; what is in `needed` does not go. Raises AdapterError if that is not enough.
        """
        if self._most_bytes is None or adapter_id in manager._active_adapters:
            return ()
        if adapter_id not in self.sizes:
            self.sizes[adapter_id] = most_of_ranks(nbytes)
        # Views in the order of use: `cache` would copy the table.
        registered, active = manager._registered_adapters.order, manager._active_adapters.order
        used = sum(map(self._size, registered)) + sum(map(self._size, active))
        over = used + (_TWICE - (adapter_id in registered)) * self._size(adapter_id) - self._most_bytes
        leaving: list[int] = []
        stays = {adapter_id, *needed, *manager._registered_adapters.pinned_items}
        for other in registered if over > 0 else ():
            if other not in stays:
                leaving.append(other)
                over -= self._size(other) * (1 + (other in active))
                if over <= 0:
                    break
        if over > 0:
            raise AdapterError(
                f"adapter {adapter_id} has no room beside the others of its step: {over} bytes more than "
                f"--adapter-memory {self._most_bytes}"
            )
        for other in leaving:
            manager.remove_adapter(other)
        return tuple(leaving)

    def forget(self, adapter_id: int) -> None:
        """The adapter was unloaded, or other content has its id."""
        self.sizes.pop(adapter_id, None)
        self.give_up(adapter_id)

    def arrive(self, adapter_id: int) -> None:
        """The adapter that was found to fit is loaded, on all ranks; other content may have had its id."""
        if (size := self._coming.get(adapter_id)) is not None:
            self.sizes[adapter_id] = size
            del self._coming[adapter_id]

    def give_up(self, adapter_id: int) -> None:
        """An adapter that was found to fit is not to be had for another reason."""
        self._coming.pop(adapter_id, None)

    def _size(self, adapter_id: int) -> int:
        return self.sizes.get(adapter_id, 0)


def most_of_ranks(number: int) -> int:
    """The largest `number` of the ranks that share layers; they must all ask. The rank that adds biases has more."""
    tensor_parallel, beside = get_tp_group(), probe.BESIDE.get()
    if tensor_parallel.world_size == 1:
        return number
    numbers = torch.tensor([number])
    group = tensor_parallel.cpu_group if beside is None else beside.group
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=group)
    return int(numbers.item())
