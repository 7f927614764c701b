"""Worker side: vLLM's LoRA managers with our layers under them.

Requests, LRU caches, pins and slots stay vLLM's own; what is replaced is what an adapter is (`LoadedAdapter`), where it
is kept (a slot of each adapted layer instead of padded LoRA buffers) and what a step's mapping means (`Step`).
vLLM's slot index i is our slot i + 1: slot 0 is "no adapter" and is never written.
"""

import functools
import heapq
import logging
import sys
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from flora_vllm.errors import AdapterError
from flora_vllm.formats.model_order import modules_elsewhere, modules_of
from flora_vllm.formats.ranks import Limits
from flora_vllm.ops.terms import LayerTerms, SlotLimits
from flora_vllm.pacing import Turns
from flora_vllm.plugin import install
from flora_vllm.plugin.activation import BaseRows, follow_positions
from flora_vllm.plugin.attach import Attached, attach
from flora_vllm.plugin.beside import LoadsBeside
from flora_vllm.plugin.embeddings import attach_embeddings
from flora_vllm.plugin.encoder_order import run_encoder_in_batch_order
from flora_vllm.plugin.encoder_rows import row_spaces
from flora_vllm.plugin.graphs import graph_steps
from flora_vllm.plugin.handed import on_disk
from flora_vllm.plugin.head import AdaptedHead, attach_heads
from flora_vllm.plugin.identity import plain_name
from flora_vllm.plugin.loader import AdapterLoader, CutAdapter
from flora_vllm.plugin.loads import Loads
from flora_vllm.plugin.memory import MemoryBudget
from flora_vllm.plugin.norms import attach_norms
from flora_vllm.plugin.options import FloraOptions, options_of
from flora_vllm.plugin.pooled import attach_classifier
from flora_vllm.plugin.probe import EngineBase
from flora_vllm.plugin.step_faults import StepFault, note_on_outputs
from flora_vllm.plugin.trial import layers_elsewhere

logger = logging.getLogger(__name__)

_managers: "weakref.WeakSet[FloraModelManager]" = weakref.WeakSet()


def step_runs_eager() -> bool:
    """Whether the step whose mapping is set may not replay a CUDA graph, for its adapter tokens' sake."""
    return any(manager.rows.tokens.segments is not None and not manager.step_fits_graph() for manager in _managers)


def adapters_run_eager(num_adapters: int, num_tokens: int) -> bool:
    """The same of a step whose mapping is not set yet: judged by the most that its tokens could need."""
    return num_adapters > 0 and any(not manager.tokens_fit_graph(num_tokens) for manager in _managers)


def before_replay(num_adapters: int, num_tokens: int) -> None:
    """A CUDA graph of `num_tokens` rows replays next; with adapters, it was captured in a rehearsal."""
    if num_adapters > 0:
        for manager in _managers:
            manager.rows.tokens.replay(num_tokens)


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in host memory, cut to this rank: layer name -> slot contents. `id` and `rank` are vLLM's to read.

    `rows`: where graphs hold adapters, the most base products that one of its tokens needs in a layer; NEVER if a graph
    cannot serve its terms.
    `is_stand_in`: one of those that vLLM makes up to rehearse steps with adapters. `last_used`: Unix time of the last
    step with it.
    """

    id: int
    rank: int
    layers: Mapping[str, LayerTerms]
    rows: int = 1
    adapts_head: bool = False
    is_stand_in: bool = False
    family: str = ""
    nbytes: int = 0
    last_used: float | None = None


class FloraModelManager(LRUCacheLoRAModelManager):
    """Slots of the adapted layers. vLLM's base class keeps the LRU of registered and of active adapters."""

    # What the base class keeps there are our adapters and, for the type checker, any model.
    _registered_adapters: Any
    model: Any

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        options = options_of(vllm_config.additional_config)
        assert options is not None, "made only for engines that ask for FLoRA"
        self.options: FloraOptions = options
        self.attached = Attached()
        # Slot -> adapter, for what every step asks. vLLM's cache answers without a touch of its order only by copying
        # all it holds: 0.26 ms with 2,576 adapters.
        self._in_slots: dict[int, LoadedAdapter] = {}
        self._left_out: dict[int, str] = {}  # adapter id -> why this step does without it
        self.loads = Loads()
        self.turns = Turns()
        self._vllm_config = vllm_config
        self._max_graph_tokens = vllm_config.compilation_config.max_cudagraph_capture_size
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        assert self.rows.has_encoder == vllm_config.model_config.is_encoder_decoder, "others are refused at start"
        if self.rows.has_encoder:
            run_encoder_in_batch_order(2 if vllm_config.use_v2_model_runner else 1)
        note_on_outputs()
        follow_positions(2 if vllm_config.use_v2_model_runner else 1)
        _managers.add(self)

    @property
    def capacity(self) -> int:
        """Adapters in host memory; where their bytes are counted (memory.py) their number is not."""
        return super().capacity if self.options.adapter_memory is None else sys.maxsize

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        self.rows = row_spaces(self.model)
        self.supports_mm = hasattr(self.model, "get_mm_mapping")
        self.supports_tower_connector_lora = self.rows.has_encoder
        self.punica_wrapper_mapping = {}

    def _create_lora_modules(self) -> None:
        self.attached = attach(
            self.model,
            self.packed_modules_mapping,
            self.rows.step_of,
            self.options.path,
            self.device,
            SlotLimits(self.lora_slots, self.options.max_rank, self.lora_config.max_lora_rank),
            self._match_target_modules,
            self._elsewhere,
        )
        attach_embeddings(
            self.model,
            self.attached,
            self.rows.tokens,
            self._match_target_modules,
            self._vllm_config,
            self.device,
        )
        attach_norms(
            self.model,
            self.attached,
            self.rows.step_of,
            self._match_target_modules,
            self._vllm_config,
            self.device,
        )
        # A row space without adapted layers is never asked for.
        steps = [*map(self.rows.step_of, self.attached.layers)]
        self._verified_steps = [step for step in self.rows.steps.values() if step in steps]
        self.head_rows = attach_heads(
            self.model,
            self.attached,
            self.rows.step_of,
            self._match_target_modules,
            self._vllm_config,
            self.device,
        ) or attach_classifier(self.model, self.attached, self._match_target_modules, self.device)
        if self.head_rows is not None:
            self._verified_steps.append(self.head_rows.step)
        layers, largest, dtypes = self.attached.layers, self._max_graph_tokens, self.attached.dtypes
        self.rows.tokens.graphs = graph_steps(self.options, layers, dtypes, largest, self.lora_slots, self.device)
        if self.rows.tokens.graphs is not None:
            install.install_replays()
        logger.info("FLoRA serves %d linear layers of this model", len(self.attached.layers))

    def _elsewhere(self, layers: Mapping[str, Any]) -> Mapping[str, str]:
        """Those layers that do not run on a step's rows. An encoder runs on rows of its own, which a run of the model
        on tokens alone does not show."""
        if self.rows.has_encoder:
            return {}
        return layers_elsewhere(layers, self.model, self._vllm_config, self.device)

    def step_fits_graph(self) -> bool:
        """Whether a CUDA graph that holds the op may serve the present step."""
        graphs, segments = self.rows.tokens.graphs, self.rows.tokens.segments
        if graphs is None or segments is None or not graphs.serves(segments.tokens):
            return False
        rows = sum(len(tokens) * self._in_slots[slot].rows for slot, tokens in segments if slot > 0)
        return rows <= graphs.row_budget

    def tokens_fit_graph(self, num_tokens: int) -> bool:
        """The same of any step of so many tokens, whichever adapters it uses."""
        graphs = self.rows.tokens.graphs
        if graphs is None or not graphs.serves(num_tokens):
            return False  # before the table of all adapters is copied
        most = max((adapter.rows for adapter in self._registered_adapters.cache.values()), default=1)
        return num_tokens * most <= graphs.row_budget

    def leave_out(self, adapter_id: int, reason: str) -> None:
        """In the step that comes the adapter cannot be had: its tokens are base tokens, and its requests fail."""
        self._left_out[adapter_id] = reason

    def take_fault(self) -> StepFault | None:
        """Why the step that has just run did not serve its adapter tokens; None if it did."""
        faults = [fault for step in self._verified_steps if (fault := step.take_fault()) is not None]
        left_out, self._left_out = self._left_out, {}
        if faults:
            return StepFault("; ".join(faults))
        return StepFault("; ".join(left_out.values()), frozenset(left_out)) if left_out else None

    def activate_adapter(self, lora_id: int) -> bool:
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
            self.loads.evictions["gpu"] += 1
        adapter = self._registered_adapters[lora_id]
        index = self.lora_index_to_id.index(None)
        self.attached.write_slot(index + 1, adapter.layers)
        self.lora_index_to_id[index] = lora_id
        self._active_adapters[lora_id] = None
        self._in_slots[index + 1] = adapter
        return True

    def oldest_adapter(self, keep: Collection[int]) -> int | None:
        """The adapter to evict from host memory for another; None if all are pinned or among `keep`."""
        return _oldest(self._registered_adapters, keep)

    def has_slot(self, keep: Collection[int]) -> bool:
        """Whether one more adapter may have a slot without taking it from one of `keep`."""
        slots = self._active_adapters
        oldest = _oldest(slots, ())
        return len(slots) < self.lora_slots or (oldest is not None and oldest not in keep)

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            index = self.lora_index_to_id.index(lora_id)
            self.lora_index_to_id[index] = None
            del self._in_slots[index + 1]
            self.attached.write_slot(index + 1, {})

    def _add_adapter(self, lora: LoadedAdapter) -> None:
        self._registered_adapters[lora.id] = lora

    def set_adapter_mapping(self, mapping: Any) -> None:
        super().set_adapter_mapping(mapping)
        self.rows.begin(mapping.type.name)
        if self.head_rows is not None:
            self.head_rows.begin()

    def _set_adapter_mapping(self, mapping: Any) -> None:
        adapters = self._in_slots.values()
        if any(adapter.is_stand_in and adapter.id in mapping.index_mapping for adapter in adapters):
            self.rows.steps[mapping.type.name].rehearse(len(mapping.index_mapping))
            if self.head_rows is not None:
                self.head_rows.clear()
            return
        # An adapter without a layer on this rank changes nothing: its tokens are base tokens.
        slots = dict.fromkeys(self._left_out, 0)
        slots |= {adapter.id: slot if adapter.layers else 0 for slot, adapter in self._in_slots.items()}
        self.rows.steps[mapping.type.name].set_mapping(mapping.index_mapping, slots)
        if self.head_rows is not None:  # of models whose rows are all tokens
            slots |= {a.id: slot if a.adapts_head else 0 for slot, a in self._in_slots.items()}
            self.head_rows.set_mapping(mapping.prompt_mapping, mapping.index_mapping, slots)

    def report(self, most: int | None) -> dict[str, Any]:
        """What is loaded, and counts since the start, in plain values; of adapters at most `most`, used last first."""
        loaded = [adapter for adapter in self._registered_adapters.cache.values() if not adapter.is_stand_in]
        pinned, on_gpu = self._registered_adapters.pinned_items, {adapter.id for adapter in self._in_slots.values()}
        shown = loaded if most is None else heapq.nlargest(most, loaded, key=lambda adapter: adapter.last_used or 0.0)
        return self.loads.counts() | {
            "slots": self.lora_slots,
            "on_gpu": sum(adapter.id in on_gpu for adapter in loaded),
            "on_cpu": len(loaded),
            "bytes": {
                "gpu": sum(adapter.nbytes for adapter in loaded if adapter.id in on_gpu),
                "cpu": sum(adapter.nbytes for adapter in loaded),
            },
            "adapters": [
                {
                    "id": adapter.id,
                    "level": "gpu" if adapter.id in on_gpu else "cpu",
                    "pinned": adapter.id in pinned,
                    "family": adapter.family,
                    "rank": adapter.rank,
                    "bytes": adapter.nbytes,
                    "last_used": adapter.last_used,
                }
                for adapter in shown
            ],
        }

    def remove_all_adapters(self) -> None:
        for adapter_id in list(self._active_adapters.cache):
            self._deactivate_adapter(adapter_id)
        super().remove_all_adapters()
        self.rows.clear()
        if self.head_rows is not None:
            self.head_rows.clear()

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> LoadedAdapter:
        return LoadedAdapter(lora_id, rank, {}, is_stand_in=True)


def _oldest(cache: Any, keep: Collection[int]) -> int | None:
    """The least recently used of what a cache of vLLM's may evict and is not among `keep`."""
    return next((key for key in cache.order if key not in cache.pinned_items and key not in keep), None)


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
    _adapter_manager: Any

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: Any) -> Any:
        self.base_rows = BaseRows()
        model = super().create_lora_manager(model, vllm_config)
        manager = self._adapter_manager
        limits = Limits(manager.options.max_rank, self.lora_config.max_lora_rank, manager.options.max_dense_bytes)
        base = EngineBase(manager.attached, manager.device, _lister_of(model, vllm_config.model_config))
        self._loader = AdapterLoader(
            manager.attached,
            limits,
            model,
            base,
            has_encoder=manager.rows.has_encoder,
            adapter_root=manager.options.adapter_root,
        )
        self._memory = MemoryBudget(manager.options.adapter_memory, manager.lora_slots)
        self.beside = LoadsBeside(self, manager.turns, manager.device)
        return model

    def load(self, lora_request: Any, again: bool) -> LoadedAdapter:
        """The adapter as its host memory will have it; for `beside`, and changes nothing that a step sees.

        `again`: it had been evicted.
        """
        return self._load_adapter(lora_request, fresh=lora_request.load_inplace and not again, again=again)

    def let_in(self, adapter: LoadedAdapter, keep: Collection[int], *, again: bool) -> tuple[int, ...] | None:
        """Have steps find an adapter, in a slot if there is one: the ids of those that made room for it, none of
        `keep`. None: there is no room."""
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
        if not again:  # other content may have had its id
            self._memory.forget(adapter.id)
        try:
            evicted += self._make_room(adapter, keep)
        except AdapterError:
            return None
        manager.add_adapter(adapter)
        if manager.has_slot(keep):
            manager.activate_adapter(adapter.id)
        return evicted

    def _load_adapter(self, lora_request: Any, fresh: bool = True, again: bool = False) -> LoadedAdapter:
        """`again`: it had been evicted."""
        counted = self._adapter_manager.loads.counted(again=again)
        with counted, on_disk(lora_request) as request:  # trainers in this process hand tensors over
            number, name = request.lora_int_id, request.lora_name

            def check(found: CutAdapter) -> None:
                self._memory.check(number, plain_name(name), found.layers.nbytes)
                self.base_rows.learn(number, found.invocation_tokens, name, announced=not again)

            adapter = self._loader.load(
                number,
                name,
                request.lora_path,
                fresh=fresh,
                again=again,
                check=check,
            )
        manager, rows = self._adapter_manager, 1
        if manager.rows.tokens.graphs is not None:  # nobody else asks, and asking looks at every layer
            rows = max((manager.attached.graph_rows(name, terms) for name, terms in adapter.layers.items()), default=1)
        adapts_head = any(isinstance(manager.attached.layers.get(name), AdaptedHead) for name in adapter.layers)
        return LoadedAdapter(
            number,
            adapter.rank,
            adapter.layers,
            rows,
            adapts_head=adapts_head,
            family=adapter.family,
            nbytes=adapter.layers.nbytes,
        )

    def report(self, most: int | None) -> dict[str, Any]:
        """See FloraModelManager.report."""
        return self._adapter_manager.report(most)

    def note_batch(self, requests: Any, computed: Any, scheduled: Any, sampled: Any = None) -> None:
        """Of each request of the step that comes, in batch order: id, LoRARequest and prompt; then token counts."""
        named = [(name, 0 if lora is None else lora.lora_int_id, prompt) for name, lora, prompt in requests]
        self.base_rows.note(named, computed, scheduled, sampled)

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        loaded = (self._adapter_manager.get_adapter(request.lora_int_id) for request in requests)
        rehearses = any(adapter is not None and adapter.is_stand_in for adapter in loaded)
        if mapping is not None and mapping.type.name == "LANGUAGE" and not rehearses:
            mapping = self.base_rows.without_base_rows(mapping, {request.lora_int_id for request in requests})
        super().set_active_adapters(requests, mapping)

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        dummy = self._adapter_manager.create_dummy_lora(lora_request.lora_int_id, rank)
        return self._adapter_manager.add_adapter(dummy)

    def _apply_adapters(self, lora_requests: set[Any]) -> None:
        # In a step an adapter is only ever brought back, never replaced: `load_inplace` acts where it is asked for.
        if len({r.lora_int_id for r in lora_requests}) > self._adapter_manager.lora_slots:
            raise RuntimeError(f"{len(lora_requests)} adapters in one step, {self._adapter_manager.lora_slots} slots")
        needed = {request.lora_int_id for request in lora_requests}
        # Every rank in the same order: those that load may have to ask the base together.
        for request in sorted(lora_requests, key=lambda request: request.lora_int_id):
            adapter = self._adapter_manager.get_adapter(request.lora_int_id)
            try:
                if adapter is None:
                    adapter = self._load_adapter(request, fresh=False, again=True)
                    self._admit(adapter, needed)
                else:
                    self._make_room(adapter, needed)
            except (AdapterError, OSError) as error:  # its copy is gone: no reason to end the engine
                self._adapter_manager.leave_out(request.lora_int_id, str(error))
                continue
            adapter.last_used = time.time()
            self._adapter_manager.activate_adapter(request.lora_int_id)

    def _admit(self, adapter: LoadedAdapter, needed: Collection[int] = ()) -> None:
        if len(self._adapter_manager) + 1 > self._adapter_manager.capacity:
            self._adapter_manager.remove_oldest_adapter()
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
        if lora_request.load_inplace or self._adapter_manager.get_adapter(adapter_id) is None:
            # First, so that a faulty one leaves the old one in place.
            adapter = self._load_adapter(lora_request, fresh=lora_request.load_inplace)
            self._adapter_manager.remove_adapter(adapter_id)
            self._memory.forget(adapter_id)
            self._admit(adapter)
        else:
            self._make_room(self._adapter_manager.get_adapter(adapter_id))
        self._adapter_manager.activate_adapter(adapter_id)
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        self._loader.retire(adapter_id)
        self._memory.forget(adapter_id)
        return super().remove_adapter(adapter_id)

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank
