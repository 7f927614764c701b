"""The plans that a worker has made, by structure: the second adapter of a training run loads in a fraction of the time.

Plans are of one model, one rank and one set of limits, as their loader is. No file is trusted for looking like another:
its structure is compared whole, by a digest, and its numbers are judged each time.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flora_vllm.adapter import Adapter
from flora_vllm.compact import CompactLayers
from flora_vllm.formats import FAMILIES
from flora_vllm.formats.files import WEIGHTS_NAME
from flora_vllm.formats.structure import structure_of
from flora_vllm.formats.tensor_file import LENGTH_BYTES, header_length
from flora_vllm.plans import Plan, plan_of
from flora_vllm.terms import Arena

# A plan of 210 modules takes about 100 KB.
MOST_PLANS = 32


@dataclass(frozen=True, eq=False)
class Known:
    """What all adapters of a structure are, and the plan that loads them."""

    family: str
    rank: int
    invocation_tokens: tuple[int, ...] | None
    plan: Plan


class Plans:
    """The structures met last."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._lock = threading.Lock()  # a step may load while the thread beside it does

    def load(self, files: Mapping[str, bytearray], task: str | None) -> tuple[Known, CompactLayers] | None:
        """What the files of a known structure hold; None if they have to be examined."""
        key = structure_of(files, task)
        with self._lock:
            if key is None or key not in self._known:
                return None
            self._known.move_to_end(key)
            known = self._known[key]
        layers = known.plan.load(files[WEIGHTS_NAME])
        return None if layers is None else (known, layers)

    def learn(
        self,
        files: Mapping[str, bytearray],
        task: str | None,
        adapter: Adapter,
        arenas: Sequence[Arena],
        layers: CompactLayers,
    ) -> None:
        """These files were examined, found without fault and cut to `layers` in `arenas`."""
        if not FAMILIES[adapter.family].by_structure or adapter.saved:
            return
        key = structure_of(files, task)
        if key is None or key in self._known:
            return
        data = files[WEIGHTS_NAME]
        begin = LENGTH_BYTES + header_length(data, len(data))
        tensors = {id(tensor): tensor for terms in adapter.modules.values() for tensor in terms.tensors()}.values()
        dtypes = {tensor.dtype for tensor in tensors}
        # Its modules' tensors are all that the file has.
        if len(dtypes) != 1 or sum(tensor.nbytes for tensor in tensors) != len(data) - begin:
            return
        plan = plan_of(adapter, data, begin, dtypes.pop(), arenas, layers)
        with self._lock:
            if plan is not None:
                self._known[key] = Known(adapter.family, adapter.rank, adapter.invocation_tokens, plan)
            while len(self._known) > MOST_PLANS:
                self._known.popitem(last=False)
