"""Encoder runs of one adapter each, without an engine: whose rows are whose, and what is refused at start."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm import ConfigError
from flora_vllm.plugin import towers
from flora_vllm.plugin.encoder_rows import row_spaces
from flora_vllm.plugin.path_counts import PathCounts
from flora_vllm.step import Step

# vLLM's hooks are looked up, which imports it.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

KEYS = SimpleNamespace(language_model=["language"], tower_model=["tower"], connector=["connector"])
SLOTS = {7: 1, 8: 2}


def _slots(step: Step, rows: int) -> list[int] | None:
    """The slot of each of `rows` rows; None if all are the base model's."""
    segments = step.segments_for(rows)
    if segments is None:
        return None
    slots = [-1] * rows
    for slot, places in segments:
        for place in places.tolist():
            slots[place] = slot
    return slots


def _pairs(items: Any) -> Iterator[list[Any]]:
    """As vLLM batches: neighbours, two at a time."""
    yield from (list(items[i : i + 2]) for i in range(0, len(items), 2))


def test_a_run_has_items_of_one_adapter_and_all_its_rows_are_that_adapters():
    rows = towers.ItemRows()
    rows.set([0, 7, 7, 7, 8, 0, 0], SLOTS)
    seen = [(run, _slots(rows.step, 3), _slots(rows.step, 2)) for run in rows.runs("abcdefg", _pairs)]
    assert seen == [
        (["a"], None, None),
        (["b", "c"], [1, 1, 1], [1, 1]),
        (["d"], [1, 1, 1], [1, 1]),
        (["e"], [2, 2, 2], [2, 2]),
        (["f", "g"], None, None),
    ]
    assert rows.step.take_fault() is None


def test_rows_outside_of_the_runs_are_nobodys():
    rows = towers.ItemRows()
    rows.set([7], SLOTS)
    _slots(rows.step, 3)
    assert "never said whose" in str(rows.step.take_fault())
    for _ in rows.runs("a", _pairs):
        assert _slots(rows.step, 3) == [1, 1, 1]
    _slots(rows.step, 3)
    assert "never said whose" in str(rows.step.take_fault())


def test_items_that_are_not_those_spoken_of_are_nobodys():
    rows = towers.ItemRows()
    rows.set([7, 8], SLOTS)
    for _ in rows.runs("abc", _pairs):
        _slots(rows.step, 3)
        assert "never said whose" in str(rows.step.take_fault())


def test_an_item_that_is_not_encoded_is_no_fault():
    """Embeddings in place of an image go past the tower."""
    rows = towers.ItemRows()
    rows.set([7], SLOTS)
    list(rows.runs("a", _pairs))
    assert rows.step.take_fault() is None


def test_the_next_step_forgets_the_items_of_one_that_did_not_run_them():
    items = towers.ItemRows()
    spaces = row_spaces(SimpleNamespace(get_mm_mapping=lambda: KEYS), items)
    items.set([7], SLOTS)
    spaces.begin("LANGUAGE")
    for _ in items.runs("a", _pairs):
        assert _slots(items.step, 2) is None


def test_layers_find_their_rows_by_their_prefix():
    items = towers.ItemRows()
    spaces = row_spaces(SimpleNamespace(get_mm_mapping=lambda: KEYS), items)
    assert spaces.step_of("tower.q_proj") is spaces.step_of("connector.proj") is items.step
    assert spaces.step_of("language.q_proj") is spaces.tokens
    assert not spaces.has_encoder
    assert [spaces.runs_on_tokens(name) for name in ("tower.q_proj", "language.q_proj", "lm_head")] == [
        False,
        True,
        True,
    ]
    assert row_spaces(SimpleNamespace(get_mm_mapping=lambda: KEYS)).step_of("tower.q_proj") is None


def _config(**settings: Any) -> Any:
    chosen = {"asked": True, "language_only": False, "tp": 1, "mode": "weights"} | settings
    return SimpleNamespace(
        lora_config=SimpleNamespace(enable_tower_connector_lora=chosen["asked"]),
        device_config=SimpleNamespace(device_type="cpu"),
        compilation_config=SimpleNamespace(
            cudagraph_mm_encoder=chosen.get("graphs", False), compile_mm_encoder=chosen.get("compiled", False)
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=chosen["tp"]),
        model_config=SimpleNamespace(
            multimodal_config=SimpleNamespace(
                language_model_only=chosen["language_only"], mm_encoder_tp_mode=chosen["mode"]
            )
        ),
    )


@pytest.mark.parametrize(
    ("settings", "is_supported", "reason"),
    [
        ({}, True, None),
        ({"tp": 2}, True, None),
        ({"asked": False}, True, "--enable-tower-connector-lora"),
        ({}, False, "vLLM serves no adapters of this model's towers"),
        ({"language_only": True}, True, "--language-model-only"),
        ({"tp": 2, "mode": "data"}, True, "--mm-encoder-tp-mode data"),
    ],
)
def test_what_is_not_served_is_refused_by_its_reason(settings, is_supported, reason):
    model = SimpleNamespace(supports_tower_connector_lora=is_supported, get_mm_mapping=lambda: KEYS)
    found = towers.why_not(model, _config(**settings))
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("reason", [None, "because"])
def test_every_module_of_a_tower_that_is_not_adapted_has_its_reason(reason):
    model: Any = torch.nn.Module()
    model.get_mm_mapping = lambda: KEYS
    model.tower = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(1, 1, 1), "q_proj": torch.nn.Linear(1, 1)})
    model.connector, model.lm_head = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    refused = {"tower.k_proj": "?", "lm_head": "?", "connector": "other"}
    towers.name_refused(model, refused, {"tower.q_proj"}, "?", reason)
    assert "Conv2d" in refused.pop("tower.conv") or reason is not None
    assert refused == {"tower.k_proj": reason or "?", "lm_head": "?", "connector": "other"}


def test_compiled_encoders_and_their_graphs_are_refused_at_start():
    towers.prepare_config(_config())
    for setting, option in (("graphs", "cudagraph_mm_encoder"), ("compiled", "compile_mm_encoder")):
        with pytest.raises(ConfigError, match=option):
            towers.prepare_config(_config(**{setting: True}))


def test_what_a_failed_request_had_encoded_is_not_kept_for_the_next():
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    from flora_vllm.plugin.step_faults import drop_encodings

    def request(name: str, *items: str) -> Any:
        features = [SimpleNamespace(identifier=item) for item in items]
        return SimpleNamespace(request_id=name, mm_features=features, get_num_encoder_embeds=lambda _: 4)

    cache = EncoderCacheManager(cache_size=20)
    failed, running, done = request("failed", "mine", "both"), request("running", "both"), request("done", "other")
    for place, asked in ((0, failed), (1, failed), (0, done)):
        cache.allocate(asked, place)
    assert cache.check_and_update_cache(running, 0)
    cache.free(failed)
    cache.free(done)
    drop_encodings(cache, [failed])
    assert (sorted(cache.cached), cache.num_free_slots, cache.get_freed_mm_hashes()) == (
        ["both", "other"],
        12,
        ["mine"],
    )
    assert not cache.check_and_update_cache(failed, 0)


def test_the_v2_runner_says_whose_the_items_are_that_it_runs():
    """Of what is scheduled it runs neither what it has nor what has no data."""
    from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem, MultiModalSharedField
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

    from flora_vllm.plugin.worker_manager import FloraWorkerManager

    towers.follow_items()
    rows, seen = towers.ItemRows(), []

    def item(name: str, *, has_data: bool = True) -> Any:
        field = MultiModalFieldElem(data=torch.zeros(1), field=MultiModalSharedField(batch_size=1))
        place = SimpleNamespace(get_num_embeds=lambda: 1)
        data = MultiModalKwargsItem({"pixels": field}) if has_data else None
        return SimpleNamespace(identifier=name, data=data, modality="image", mm_position=place)

    def embed(**_: Any) -> list[torch.Tensor]:
        seen.append(_slots(rows.step, 3))
        return [torch.zeros(1, 1)]

    def take(_: Any, mapping: Any) -> None:
        if mapping.type.name == "TOWER":
            rows.set(mapping.prompt_mapping, SLOTS)

    cache: Any = EncoderCache()
    cache.mm_features = {"a": [item("known"), item("new")], "b": [item("new")], "c": [item("gone", has_data=False)]}
    cache.encoder_outputs["known"] = torch.zeros(1, 1)
    manager: Any = object.__new__(FloraWorkerManager)
    manager.supports_tower_connector_lora = lambda: True
    manager.set_active_adapters = take
    model = SimpleNamespace(get_mm_lora_token_counts=lambda **_: (1, None), embed_multimodal=embed)
    runner: Any = object.__new__(EncoderRunner)
    runner.model, runner.encoder_cache, runner.device, runner.cudagraph_manager = model, cache, "cpu", None
    scheduled = {"a": [0, 1], "b": [0], "c": [0]}
    model_runner.set_active_mm_loras(
        model=model,
        lora_manager=manager,
        encoder_cache=cache,
        req_id_to_index={"a": 0, "b": 1, "c": 2},
        lora_state=SimpleNamespace(lora_ids=[8, 0, 7], lora_requests={}),
        scheduled_encoder_inputs=scheduled,
    )
    runner.execute_mm_encoder(runner.prepare_mm_inputs(scheduled)[1])
    assert seen == [[2, 2, 2], None]


def test_images_of_adapters_that_leave_towers_alone_are_encoded_with_those_of_none():
    from vllm.lora.layers import LoRAMapping, LoRAMappingType

    from flora_vllm.plugin.manager import FloraModelManager, LoadedAdapter

    manager: Any = object.__new__(FloraModelManager)
    manager.rows = row_spaces(SimpleNamespace(get_mm_mapping=lambda: KEYS), towers.ItemRows())
    manager.head_rows, manager._left_out = None, {}
    layers: Any = {"tower.q_proj": ()}
    manager._in_slots = {1: LoadedAdapter(7, 1, layers, adapts_towers=True), 2: LoadedAdapter(8, 1, layers)}
    manager._set_adapter_mapping(LoRAMapping((), (8, 0, 7), type=LoRAMappingType.TOWER))
    manager._set_adapter_mapping(LoRAMapping((), (8, 0, 7), type=LoRAMappingType.CONNECTOR))
    step = manager.rows.items.step
    assert [(run, _slots(step, 2)) for run in manager.rows.items.runs("abc", _pairs)] == [
        (["a", "b"], None),
        (["c"], [1, 1]),
    ]
    manager._set_adapter_mapping(LoRAMapping((8, 0), (8, 0)))
    assert _slots(manager.rows.tokens, 2) == [2, 0]


def test_items_are_no_rows_of_the_output_layer():
    """It would be base rows for the adapter whose tokens are sampled beside a base image."""
    from vllm.lora.layers import LoRAMapping, LoRAMappingType

    from flora_vllm.plugin.head import HeadRows
    from flora_vllm.plugin.manager import FloraModelManager, LoadedAdapter

    manager: Any = object.__new__(FloraModelManager)
    manager.rows = row_spaces(SimpleNamespace(get_mm_mapping=lambda: KEYS), towers.ItemRows())
    manager.head_rows, manager._left_out, manager._paths = HeadRows(), {}, PathCounts()
    manager._in_slots = {1: LoadedAdapter(7, 1, {"lm_head": ()}, adapts_head=True)}
    manager.lora_index_to_id, manager._last_mapping, manager._last_slot_layout = [7], None, None
    manager.set_adapter_mapping(LoRAMapping((7, 7, 0), (7, 0)))
    manager.set_adapter_mapping(LoRAMapping((), (0,), type=LoRAMappingType.TOWER))
    manager.set_adapter_mapping(LoRAMapping((), (0,), type=LoRAMappingType.CONNECTOR))
    seen: list[Any] = []
    manager.head_rows.logits(lambda x: seen.append(_slots(manager.head_rows.step, len(x))), torch.zeros(2, 1))
    assert seen == [[1, 0]]
    assert manager.head_rows.step.take_fault() is None


def test_a_run_of_the_same_adapters_as_the_last_is_spoken_of_anew():
    """Where only encoders run no mapping of tokens is set between two runs."""
    from vllm.lora.layers import LoRAMapping, LoRAMappingType

    from flora_vllm.plugin.manager import FloraModelManager, LoadedAdapter

    manager: Any = object.__new__(FloraModelManager)
    manager.rows = row_spaces(SimpleNamespace(get_mm_mapping=lambda: KEYS), towers.ItemRows())
    manager.head_rows, manager._left_out, manager._paths = None, {}, PathCounts()
    manager._in_slots = {1: LoadedAdapter(7, 1, {"tower.q_proj": ()}, adapts_towers=True)}
    manager.lora_index_to_id, manager._last_mapping, manager._last_slot_layout = [7], None, None
    for _ in range(2):
        manager.set_adapter_mapping(LoRAMapping((7,), (7,), type=LoRAMappingType.TOWER))
        runs = manager.rows.items.runs("a", _pairs)
        assert [_slots(manager.rows.items.step, 2) for _ in runs] == [[1, 1]]
