"""Worker side: vLLM's LoRA managers with our layers under them.

Requests, LRU caches, pins and slots stay vLLM's own; what is replaced is what an adapter is (`LoadedAdapter`), where it
is kept (a slot of each adapted layer instead of padded LoRA buffers) and what a step's mapping means (`Step`).
vLLM's slot index i is our slot i + 1: slot 0 is "no adapter" and is never written.
"""

import functools
import heapq
import logging
import sys
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.lora.model_manager import LRUCacheLoRAModelManager

from flora_vllm.ops.terms import LayerTerms, SlotLimits
from flora_vllm.pacing import Turns
from flora_vllm.plugin import install, towers
from flora_vllm.plugin.activation import follow_positions
from flora_vllm.plugin.attach import UNKNOWN_ROWS, Attached, attach
from flora_vllm.plugin.embeddings import attach_embeddings, embeddings_of
from flora_vllm.plugin.encoder_order import run_encoder_in_batch_order
from flora_vllm.plugin.encoder_rows import row_spaces
from flora_vllm.plugin.graphs import graph_steps
from flora_vllm.plugin.head import attach_heads
from flora_vllm.plugin.loads import Loads
from flora_vllm.plugin.norms import attach_norms, norms_of
from flora_vllm.plugin.options import FloraOptions, options_of
from flora_vllm.plugin.path_counts import PathCounts
from flora_vllm.plugin.pooled import attach_classifier
from flora_vllm.plugin.step_faults import StepFault, note_on_outputs
from flora_vllm.plugin.trial import Trial, layers_unused

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
    cannot serve its terms; 0 if it has no layer. Of all ranks of a layer, which must agree on what replays a graph.
    `is_stand_in`: one of those that vLLM makes up to rehearse steps with adapters. `last_used`: Unix time of the last
    step with it.
    """

    id: int
    rank: int
    layers: Mapping[str, LayerTerms]
    rows: int = 1
    adapts_head: bool = False
    adapts_towers: bool = False
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
        self._paths = PathCounts()
        self.gone: set[int] = set()  # ids of adapters that host memory has let go of and nobody has asked about since
        self._left_out: dict[int, str] = {}  # adapter id -> why this step does without it
        self.loads = Loads()
        self.turns = Turns()
        self._vllm_config = vllm_config
        self._max_graph_tokens = vllm_config.compilation_config.max_cudagraph_capture_size
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        assert self.rows.has_encoder == vllm_config.model_config.is_encoder_decoder, "others are refused at start"
        if self.rows.has_encoder:
            run_encoder_in_batch_order(2 if vllm_config.use_v2_model_runner else 1)
        if self.rows.items is not None:
            towers.follow_items()
        note_on_outputs()
        follow_positions(2 if vllm_config.use_v2_model_runner else 1)
        _managers.add(self)

    @property
    def capacity(self) -> int:
        """Adapters in host memory; where their bytes are counted (memory.py) their number is not."""
        return super().capacity if self.options.adapter_memory is None else sys.maxsize

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        self._why_no_towers = towers.why_not(self.model, vllm_config)
        self.rows = row_spaces(self.model, towers.ItemRows() if self._why_no_towers is None else None)
        self.supports_mm = hasattr(self.model, "get_mm_mapping")
        self.supports_tower_connector_lora = any(self.rows.others)
        self.punica_wrapper_mapping = {}

    def _create_lora_modules(self) -> None:
        trial = Trial(self.model, self._vllm_config, self.device, embeddings_of(self.model), norms_of(self.model))
        self.attached = attach(
            self.model,
            self.packed_modules_mapping,
            self.rows.step_of,
            self.options.path,
            self.device,
            SlotLimits(self.lora_slots, self.options.max_rank, self.lora_config.max_lora_rank),
            self._match_target_modules,
            functools.partial(self._elsewhere, trial),
        )
        attach_embeddings(
            trial,
            self.model,
            self.attached,
            self.rows.tokens,
            self._match_target_modules,
            self._vllm_config,
            self.device,
        )
        asked = self.model, self.attached, self.rows.step_of, self._match_target_modules, self._vllm_config, self.device
        attach_norms(trial, *asked[1:], compiled_too=self.options.norms)
        # A row space without adapted layers is never asked for.
        steps = [*map(self.rows.step_of, self.attached.layers)]
        self._verified_steps = [step for step in self.rows.steps.values() if step in steps]
        self.head_rows = attach_heads(*asked) or attach_classifier(
            self.model, self.attached, self._match_target_modules, self.device
        )
        if self.head_rows is not None:
            self._verified_steps.append(self.head_rows.step)
        if self.supports_mm and not self.rows.has_encoder:
            refused, adapted = self.attached.refused, self.attached.layouts
            towers.name_refused(self.model, refused, adapted, UNKNOWN_ROWS, self._why_no_towers)
        layers = {name: layer for name, layer in self.attached.layers.items() if self.rows.runs_on_tokens(name)}
        largest, dtypes = self._max_graph_tokens, self.attached.dtypes
        self.rows.tokens.graphs = graph_steps(self.options, layers, dtypes, largest, self.lora_slots, self.device)
        if self.rows.tokens.graphs is not None:
            install.install_replays()
        logger.info("FLoRA serves %d linear layers of this model", len(self.attached.layers))

    def _elsewhere(self, trial: Trial, layers: Mapping[str, Any]) -> Mapping[str, str]:
        """Layer name -> why it cannot be adapted, for those that do not run on the rows that are held for theirs."""
        of_tokens = {name: layer for name, layer in layers.items() if self.rows.runs_on_tokens(name)}
        of_items = {name: layer for name, layer in layers.items() if name not in of_tokens}
        found = trial.layers_elsewhere(of_tokens)
        if of_items and not self.rows.has_encoder:
            found |= layers_unused(of_items, self.model, self._vllm_config, self.device)
        return found

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

    def is_left_out(self, adapter_id: int) -> bool:
        return adapter_id in self._left_out

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
        oldest = None if self.has_empty_slot else _oldest(self._active_adapters, ())
        if oldest is None:
            index = self.lora_index_to_id.index(None)
        else:
            index = self.lora_index_to_id.index(oldest)
            self.lora_index_to_id[index] = None  # so that its slot is not cleared, which is written at once
            del self._in_slots[index + 1]
            self._active_adapters.pop(oldest)
            self.loads.evictions["gpu"] += 1
        adapter = self._registered_adapters[lora_id]
        with self.loads.phase("write"):
            try:
                self._paths.write_slot(index + 1, self.attached.write_slot(index + 1, adapter.layers))
            except Exception:  # no memory: a part of it would stay in the slot
                self._paths.write_slot(index + 1, self.attached.write_slot(index + 1, {}))
                raise
        self._last_mapping = None  # what a mapping means depends on what its slots hold
        self.lora_index_to_id[index] = lora_id
        self._active_adapters[lora_id] = None
        self._in_slots[index + 1] = adapter
        return True

    def oldest_adapter(self, keep: Collection[int]) -> int | None:
        """The adapter to evict from host memory for another; None if all are pinned or among `keep`."""
        return _oldest(self._registered_adapters, keep)

    def pin_fault(self, adapter_id: int) -> str | None:
        """Why pins leave this adapter no place; None if they leave one. vLLM's caches raise what would end a step."""
        for places, cache, option, what in (
            (self.lora_slots, self._active_adapters, "--max-loras", "slots"),
            (self.capacity, self._registered_adapters, "--max-cpu-loras", "places in host memory"),
        ):
            if adapter_id not in cache and len(cache.pinned_items) >= places:
                return f"pinned adapters have all {places} {what}; remove one of them, or start with a larger {option}"
        return None

    def has_slot(self, keep: Collection[int]) -> bool:
        """Whether one more adapter may have a slot without taking it from one of `keep`."""
        oldest = _oldest(self._active_adapters, ())
        return self.has_empty_slot or (oldest is not None and oldest not in keep)

    @property
    def has_empty_slot(self) -> bool:
        return len(self._active_adapters) < self.lora_slots

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            index = self.lora_index_to_id.index(lora_id)
            self.lora_index_to_id[index] = None
            del self._in_slots[index + 1]
            self._paths.write_slot(index + 1, self.attached.write_slot(index + 1, {}))

    def _add_adapter(self, lora: LoadedAdapter) -> None:
        self.gone.discard(lora.id)
        self._registered_adapters[lora.id] = lora

    def remove_adapter(self, adapter_id: int) -> bool:
        self.gone.add(adapter_id)
        return super().remove_adapter(adapter_id)

    def set_adapter_mapping(self, mapping: Any) -> None:
        if mapping.type.name != "LANGUAGE":
            self._last_mapping = None  # what was said of items is used up with their run
        super().set_adapter_mapping(mapping)
        self.rows.begin(mapping.type.name)
        self._paths.count(self.rows.steps[mapping.type.name].segments)
        if self.head_rows is not None and mapping.type.name == "LANGUAGE":
            self.head_rows.begin()

    def _set_adapter_mapping(self, mapping: Any) -> None:
        adapters = self._in_slots.values()
        if any(adapter.is_stand_in and adapter.id in mapping.index_mapping for adapter in adapters):
            self.rows.steps[mapping.type.name].rehearse(len(mapping.index_mapping))
            if self.head_rows is not None:
                self.head_rows.clear()
            return
        # An adapter without a layer changes nothing: its tokens are base tokens.
        slots = dict.fromkeys(self._left_out, 0)
        slots |= {adapter.id: slot if adapter.rows else 0 for slot, adapter in self._in_slots.items()}
        if mapping.type.name != "LANGUAGE" and self.rows.items is not None:
            # Images of others are encoded with those of no adapter.
            slots |= {a.id: 0 for a in self._in_slots.values() if not a.adapts_towers}
        self.rows.set_mapping(mapping, slots)
        if self.head_rows is not None and mapping.type.name == "LANGUAGE":  # images are no rows of the head's
            slots |= {a.id: slot if a.adapts_head else 0 for slot, a in self._in_slots.items()}
            self.head_rows.set_mapping(mapping.prompt_mapping, mapping.index_mapping, slots)

    def report(self, most: int | None) -> dict[str, Any]:
        """What is loaded, and counts since the start, in plain values; of adapters at most `most`, used last first."""
        loaded = [adapter for adapter in self._registered_adapters.cache.values() if not adapter.is_stand_in]
        pinned, on_gpu = self._registered_adapters.pinned_items, {adapter.id for adapter in self._in_slots.values()}
        shown = loaded if most is None else heapq.nlargest(most, loaded, key=lambda adapter: adapter.last_used or 0.0)
        return self.loads.counts() | {
            "paths": {"stacked": self._paths.stacked, "modulated": self._paths.modulated},
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
        self.gone.update(self._registered_adapters.cache)
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
