"""The LoRA manager of one worker: loads, checks and evicts adapters; FloraModelManager has them in slots and caches."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.base_model import is_conv1d
from flora_vllm.formats.model_order import modules_elsewhere, modules_of
from flora_vllm.formats.ranks import Limits
from flora_vllm.plugin.activation import BaseRows
from flora_vllm.plugin.beside import LoadsBeside
from flora_vllm.plugin.handed import on_disk
from flora_vllm.plugin.head import AdaptedHead
from flora_vllm.plugin.identity import plain_name
from flora_vllm.plugin.loader import AdapterLoader, CutAdapter
from flora_vllm.plugin.manager import FloraModelManager, LoadedAdapter
from flora_vllm.plugin.memory import MemoryBudget, most_of_ranks
from flora_vllm.plugin.pooled import PooledRows
from flora_vllm.plugin.probe import EngineBase, together

logger = logging.getLogger(__name__)


def _lister_of(model: torch.nn.Module, config: Any) -> Callable[[], Mapping[str, tuple[int, int]]]:
    """What lists the modules of the Hugging Face model. vLLM's Transformers backend has changed its classes."""
    if type(model).__module__.startswith("vllm.model_executor.models.transformers"):
        return functools.partial(modules_elsewhere, config.model)
    return functools.partial(modules_of, config.hf_config)


class FloraWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads adapters for one worker. A request's adapter is loaded before the request is queued (frontend), so a
    faulty one raises there; a reload after eviction reads the copy kept here and cannot fail on the original. Where the
    engine has a process of its own both happen beside the steps (prefetch.py)."""

    _manager_cls = FloraModelManager
    _is_idle = False
    _adapter_manager: Any

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: Any) -> Any:
        self.base_rows = BaseRows(self.list_adapters)
        model = super().create_lora_manager(model, vllm_config)
        manager = self._adapter_manager
        limits = Limits(manager.options.max_rank, self.lora_config.max_lora_rank, manager.options.max_dense_bytes)
        config = vllm_config.model_config
        in_out = functools.partial(is_conv1d, getattr(config.hf_config, "model_type", None))
        base = EngineBase(manager.attached, manager.device, _lister_of(model, config), in_out)
        self._loader = AdapterLoader(
            manager.attached,
            limits,
            model,
            base,
            has_encoder=manager.rows.has_encoder,
            adapter_root=manager.options.adapter_root,
            loads=manager.loads,
        )
        self._memory = MemoryBudget(manager.options.adapter_memory, manager.lora_slots)
        self._ran: set[int] = set()  # ids of the last step's adapters
        self.beside = LoadsBeside(self, manager.turns, manager.device)
        return model

    def load(self, lora_request: Any, again: bool) -> LoadedAdapter:
        """The adapter as its host memory will have it; for `beside`, and changes nothing that a step sees.

        `again`: it had been evicted.
        """
        return self._load_adapter(lora_request, fresh=lora_request.load_inplace and not again, again=again)

    def let_in(self, adapter: LoadedAdapter, keep: Collection[int], *, again: bool) -> tuple[int, ...] | None:
        """Have steps find an adapter, in a slot if there is one: the ids of those that made room for it, none of
        `keep`. None: there is no room yet. Raises AdapterError if pins leave none."""
        self._check_pins(adapter.id)
        manager, evicted = self._adapter_manager, ()
        is_there = manager.get_adapter(adapter.id) is not None
        if is_there and again:
            return ()  # a step needed it first
        if not is_there and len(manager) >= manager.capacity:
            oldest = manager.oldest_adapter(keep)
            if oldest is None:
                return None
            manager.remove_adapter(oldest)
            manager.loads.evictions["cpu"] += 1
            evicted = (oldest,)
        manager.remove_adapter(adapter.id)
        self._memory.arrive(adapter.id)
        try:
            evicted += self._make_room(adapter, keep)
        except AdapterError:
            return None
        manager.add_adapter(adapter)
        # Who only loads takes no adapter's slot: writing one costs all requests milliseconds, and perhaps for nothing.
        if manager.has_slot(keep) if again else manager.has_empty_slot:
            self._fill_slot(adapter.id)
        return evicted

    def give_up(self, adapter_id: int) -> None:
        """What `load` gave, or began, is not let in."""
        self._memory.give_up(adapter_id)

    def _load_adapter(self, lora_request: Any, fresh: bool = True, again: bool = False) -> LoadedAdapter:
        """`again`: it had been evicted."""
        counted = self._adapter_manager.loads.counted(again=again)
        with counted, on_disk(lora_request) as request:  # trainers in this process hand tensors over
            number, name, rows = request.lora_int_id, request.lora_name, 0

            def note(found: CutAdapter) -> None:
                nonlocal rows
                rows = self._rows_of(found)

            def check(found: CutAdapter) -> None:
                self._memory.check(number, plain_name(name), found.layers.nbytes)
                self._check_activated(name, found)
                self.base_rows.learn(number, found.invocation_tokens, name, announced=not again)

            try:
                adapter = self._loader.load(
                    number,
                    name,
                    request.lora_path,
                    fresh=fresh,
                    again=again,
                    note=note,
                    check=check,
                )
            except BaseException:
                self.give_up(number)
                raise
        manager = self._adapter_manager
        adapts_head = any(isinstance(manager.attached.layers.get(name), AdaptedHead) for name in adapter.layers)
        return LoadedAdapter(
            number,
            adapter.rank,
            adapter.layers,
            rows,
            adapts_head=adapts_head,
            adapts_towers=not all(map(manager.rows.runs_on_tokens, adapter.layers)),
            family=adapter.family,
            nbytes=adapter.layers.nbytes,
        )

    def _rows_of(self, found: CutAdapter) -> int:
        """`LoadedAdapter.rows`: of experts or rows of a vocabulary one rank may have terms where another has none."""
        manager = self._adapter_manager
        if get_pp_group().world_size > 1:
            return 1  # a stage that replayed a graph would not fit one that runs eager: it pads its rows
        rows = int(bool(found.layers))
        if manager.rows.tokens.graphs is not None:  # nobody else asks, and asking looks at every layer
            rows = max((manager.attached.graph_rows(name, terms) for name, terms in found.layers.items()), default=0)
        return most_of_ranks(rows)

    def _check_activated(self, name: str, found: CutAdapter) -> None:
        manager = self._adapter_manager
        # A classifier's head is called with one row a request, or with all rows of one.
        heads = AdaptedHead if isinstance(manager.head_rows, PooledRows) else ()
        elsewhere = [
            layer
            for layer in found.layers
            if not manager.rows.runs_on_tokens(layer) or isinstance(manager.attached.layers.get(layer), heads)
        ]
        if found.invocation_tokens is not None and elsewhere:
            reason = (
                "alora_invocation_tokens: rows of a tower, connector or classifier's head have no place before or "
                "after them"
            )
            raise adapter_error(plain_name(name), [f"{elsewhere[0]}: {reason}; leave them or this layer out"])

    def take_gone(self) -> list[int]:
        """Adapters that are in host memory no more, since this was asked last."""
        gone, self._adapter_manager.gone = self._adapter_manager.gone, set()
        return [*gone]

    def report(self, most: int | None) -> dict[str, Any]:
        """See FloraModelManager.report."""
        return self._adapter_manager.report(most)

    def note_batch(self, requests: Any, computed: Any, scheduled: Any, sampled: Any = None) -> None:
        """Of each request of the step that comes, in batch order: id, LoRARequest and prompt; then token counts."""
        named = [(name, 0 if lora is None else lora.lora_int_id, prompt) for name, lora, prompt in requests]
        self.base_rows.note(named, computed, scheduled, sampled)

    @contextlib.contextmanager
    def idle_step(self) -> Iterator[None]:
        """Around a step without requests, for which vLLM makes adapters up, and lets go of all there are after it."""
        with self._adapter_manager.turns.step():
            self._is_idle = True
            try:
                yield
            finally:
                self._is_idle = False

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        if self._is_idle and mapping is not None:
            nobody, sampled = (0,) * len(mapping.index_mapping), (0,) * len(mapping.prompt_mapping)
            super().set_active_adapters(set(), replace(mapping, index_mapping=nobody, prompt_mapping=sampled))
            return
        loaded = (self._adapter_manager.get_adapter(request.lora_int_id) for request in requests)
        rehearses = any(adapter is not None and adapter.is_stand_in for adapter in loaded)
        if mapping is not None and mapping.type.name == "LANGUAGE" and not rehearses:
            mapping = self.base_rows.without_base_rows(mapping, {request.lora_int_id for request in requests})
        if mapping is None or mapping.type.name == "LANGUAGE":
            super().set_active_adapters(requests, mapping)
            return
        # An encoder's adapters are the step's. To try one again that it leaves out could take another's slot.
        of_step = self._ran
        requests = {request for request in requests if not self._adapter_manager.is_left_out(request.lora_int_id)}
        super().set_active_adapters(requests, mapping)
        self._ran = of_step

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        if self._is_idle:
            return True
        dummy = self._adapter_manager.create_dummy_lora(lora_request.lora_int_id, rank)
        return self._adapter_manager.add_adapter(dummy)

    def _apply_adapters(self, lora_requests: set[Any]) -> None:
        # In a step an adapter is only ever brought back, never replaced: `load_inplace` acts where it is asked for.
        if len({r.lora_int_id for r in lora_requests}) > self._adapter_manager.lora_slots:
            raise RuntimeError(f"{len(lora_requests)} adapters in one step, {self._adapter_manager.lora_slots} slots")
        needed = {request.lora_int_id for request in lora_requests}
        manager, done, begin = self._adapter_manager, set[int](), needed - self._ran
        self._ran = needed
        # Every rank in the same order: those that load may have to ask the base together.
        for request in sorted(lora_requests, key=lambda request: request.lora_int_id):
            adapter = manager.get_adapter(request.lora_int_id)
            if request.lora_int_id in begin and not (adapter is not None and adapter.is_stand_in):
                manager.loads.look_up("cpu", adapter is not None)
                manager.loads.look_up("gpu", request.lora_int_id in manager._active_adapters)
            try:
                self._check_pins(request.lora_int_id)
                if adapter is None:
                    # A rank that leaves it out alone would not be heard.
                    load = functools.partial(self._load_adapter, request, fresh=False, again=True)
                    adapter = together(repr(request.lora_name), manager.device, load)
                    self._admit(adapter, needed, done)
                else:
                    self._make_room(adapter, needed)
                if request.lora_int_id not in manager._active_adapters and not manager.has_slot(done):
                    raise adapter_error(str(request.lora_int_id), ["pinned adapters leave its step too few slots"])
                self._give_slot(request.lora_int_id)
            except Exception as error:  # its copy is gone, memory is: no reason to end the engine
                if not isinstance(error, AdapterError):
                    logger.exception("adapter %r cannot be had again", request.lora_name)
                manager.leave_out(request.lora_int_id, str(error) or type(error).__name__)
                continue
            adapter.last_used = time.time()
            done.add(request.lora_int_id)

    def _give_slot(self, adapter_id: int) -> None:
        """Raises on every rank, and leaves none with it, if there is no memory for its slot on one."""
        manager = self._adapter_manager
        if adapter_id in manager._active_adapters:
            manager.activate_adapter(adapter_id)  # the one used last
            return
        try:
            together(str(adapter_id), manager.device, lambda: manager.activate_adapter(adapter_id))
        except Exception:
            manager.deactivate_adapter(adapter_id)
            raise

    def _fill_slot(self, adapter_id: int) -> None:
        """For an adapter that is loaded, whether a slot can be written or not: the step that needs it tries again."""
        try:
            self._give_slot(adapter_id)
        except Exception:
            logger.exception("adapter %d is loaded, and has no slot yet", adapter_id)

    def _check_pins(self, adapter_id: int) -> None:
        if (fault := self._adapter_manager.pin_fault(adapter_id)) is not None:
            raise adapter_error(str(adapter_id), [fault])

    def _admit(self, adapter: LoadedAdapter, needed: Collection[int] = (), done: Collection[int] = ()) -> None:
        if len(self._adapter_manager) + 1 > self._adapter_manager.capacity:
            oldest = self._adapter_manager.oldest_adapter(done)
            if oldest is None:
                raise adapter_error(str(adapter.id), ["pinned adapters leave its step too few places in host memory"])
            self._adapter_manager.remove_adapter(oldest)
            self._adapter_manager.loads.evictions["cpu"] += 1
        self._make_room(adapter, needed)
        self._adapter_manager.add_adapter(adapter)

    def _make_room(self, adapter: LoadedAdapter, needed: Collection[int] = ()) -> tuple[int, ...]:
        """For an adapter that gets a slot next: the ids of those that went, none of `needed`. Raises AdapterError."""
        evicted = self._memory.make_room(self._adapter_manager, adapter.id, adapter.nbytes, needed)
        self._adapter_manager.loads.evictions["cpu"] += len(evicted)
        return evicted

    def add_adapter(self, lora_request: Any) -> bool:
        adapter_id = lora_request.lora_int_id
        self._check_pins(adapter_id)
        is_held = self._adapter_manager.get_adapter(adapter_id) is not None
        if lora_request.load_inplace or not is_held or not self._loader.is_of(adapter_id, lora_request.lora_name):
            # First, so that a faulty one leaves the old one in place.
            adapter = self._load_adapter(lora_request, fresh=lora_request.load_inplace)
            self._adapter_manager.remove_adapter(adapter_id)
            self._memory.forget(adapter_id)
            self._admit(adapter)
        else:
            self._make_room(self._adapter_manager.get_adapter(adapter_id))
        self._fill_slot(adapter_id)
        return True

    def remove_all_adapters(self) -> None:
        """Asked for where the base gets other weights, too."""
        if self._is_idle:
            return
        super().remove_all_adapters()
        self._loader.forget_base()
        self.beside.forget_base()

    def remove_adapter(self, adapter_id: int) -> bool:
        self._loader.retire(adapter_id)
        self._memory.forget(adapter_id)
        return super().remove_adapter(adapter_id)

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank
