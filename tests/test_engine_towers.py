"""A multimodal model with adapters: of its language model, and where vLLM's option says so of tower and connector."""

import json
import shutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import engine_support as support
import pytest
import torch
from engine_support import Answer, Engine
from tiny_models import IMAGE_SIDE, WIDTH, tiny_idefics3
from tower_support import Seen, World

import flora_vllm
from flora_vllm.plugin import towers

pytestmark = support.ENGINE_MARKS

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "max_model_len": 256,
    "max_num_batched_tokens": 512,
    "limit_mm_per_prompt": {"image": 2},
}
LORAS: dict[str, Any] = {"max_loras": 17, "max_lora_rank": 64, "max_flora_rank": 8}
BASE = [Seen((0,)), Seen((1,)), Seen((2, 3))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny_idefics3(tmp_path_factory.mktemp("idefics3")), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def plain(world: World) -> list[Answer]:
    """What plain vLLM answers."""
    with support.running(world.model, flora=False, **OPTIONS) as engine:
        return world.ask(engine, BASE)


def _refusal(world: World, engine: Engine, label: str) -> str:
    with pytest.raises(flora_vllm.AdapterError) as refused:
        engine.llm.llm_engine.add_lora(engine.request_for(world.paths[label]))
    return str(refused.value)


@pytest.fixture(scope="module")
def without_option(world: World) -> tuple[list[Seen], list[Answer], dict[str, str]]:
    """Requests and answers of an engine without vLLM's option, and why it refuses which adapters."""
    asks = [BASE[0], Seen((0,), "language"), BASE[1], Seen((1, 2), "language"), BASE[2]]
    with support.running(world.model, **OPTIONS, **LORAS) as engine:
        answers = world.ask(engine, asks)
        return asks, answers, {label: _refusal(world, engine, label) for label in ("tower", "connector", "flora")}


@pytest.fixture(scope="module")
def engine(world: World, plain: list[Answer]) -> Iterator[Engine]:
    # Only one engine can be there at a time: the tests of the others come first.
    with support.running(world.model, **OPTIONS, **LORAS, enable_tower_connector_lora=True) as engine:
        yield engine


def test_the_language_models_adapters_see_images_and_base_requests_are_plain_vllms(world, plain, without_option):
    asks, answers, _ = without_option
    assert world.errors(asks, answers) == {}
    for place, wanted in zip((0, 2, 4), plain, strict=True):
        assert support.difference(answers[place], wanted) < support.LOGPROB_TOLERANCE


def test_without_the_option_towers_are_refused_by_a_line_that_names_it(without_option):
    for label, module in (("tower", "model.vision_model"), ("connector", "model.connector"), ("flora", "connector")):
        reason = without_option[2][label]
        assert module in reason
        assert "--enable-tower-connector-lora" in reason


def test_each_adapter_alone_is_its_merged_weights(world, engine):
    asks = [Seen((0,), label) for label in world.states]
    assert world.errors(asks, [world.ask(engine, [ask])[0] for ask in asks]) == {}


def test_a_mixed_batch_is_the_merged_weights_of_each_and_base_images_are_plain_vllms(world, plain, engine):
    runner = engine._runner()
    asks = [*BASE, *(Seen((seed, seed + 5), label) for label in world.states for seed in (1, 2)), *BASE]
    with mock.patch.object(engine.model(), "embed_multimodal", wraps=engine.model().embed_multimodal) as encoded:
        answers = world.ask(engine, asks)
    assert world.errors(asks, answers) == {}
    for place, wanted in zip((0, 1, 2, -3, -2, -1), [*plain, *plain], strict=True):
        assert support.difference(answers[place], wanted) < support.LOGPROB_TOLERANCE
    # Neighbours with one adapter are encoded together, and with those whose adapter leaves the tower alone.
    assert encoded.call_count < sum(len(set(ask.images)) for ask in asks)
    with mock.patch.object(engine.model(), "embed_multimodal", wraps=engine.model().embed_multimodal) as encoded:
        world.ask(engine, [Seen((80,)), Seen((82,), "language"), Seen((84,))])
    assert encoded.call_count == 1
    assert runner.lora_manager.supports_tower_connector_lora()


def test_one_image_with_two_adapters_and_none_is_encoded_three_times(world, engine):
    runner = engine._runner()
    asks = [Seen((40,), label) for label in ("tower", None, "all", "tower")]
    with mock.patch.object(runner, "_cache_encoder_output", wraps=runner._cache_encoder_output) as cached:
        answers = world.ask(engine, asks)
    assert len({call.args[0] for call in cached.call_args_list}) == 3
    assert world.errors(asks, answers) == {}


def test_the_adapters_are_told_apart(world, engine):
    """Were two of them alike, a mix-up of rows would go unseen."""
    asks = [Seen((0,), label) for label in world.states]
    answers = world.ask(engine, asks)
    for i, ask in enumerate(asks):
        other = asks[(i + 1) % len(asks)]
        assert world.error(Seen((0,), other.adapter), answers[i]) > 100 * support.LOGPROB_TOLERANCE, ask


def test_every_layer_of_the_tower_and_the_connector_is_adapted(engine):
    layers = engine.manager().attached.layers
    assert sum("vision_model" in name for name in layers) == 2 * 4
    assert "model.connector.modality_projection.proj" in layers


def test_a_layer_that_no_image_is_run_through_is_found_at_start(engine):
    from flora_vllm.plugin.trial import layers_unused

    names = ("model.vision_model.encoder.layers.1.mlp.fc1", "model.text_model.layers.1.mlp.down_proj")
    layers = {name: engine.model().get_submodule(name) for name in names}
    config = engine.llm.llm_engine.vllm_config
    assert [*layers_unused(layers, engine.model(), config, torch.device("cpu"))] == [names[1]]


def test_a_mix_up_of_items_would_be_seen(world, engine):
    asks = [Seen((60,), "tower"), Seen((61,), "connector"), Seen((62,))]
    original = towers.ItemRows.set

    def reversed_items(self, adapter_of_item, slot_of_adapter):
        original(self, adapter_of_item[::-1], slot_of_adapter)

    with mock.patch.object(towers.ItemRows, "set", reversed_items):
        answers = world.ask(engine, asks)
    assert {*world.errors(asks, answers)} == {asks[0], asks[2]}


def test_new_files_of_an_adapter_are_new_encodings(world, engine, tmp_path):
    """Read anew, the adapter of one name is another to whatever keeps an image's encoding, or its keys and values."""
    path = tmp_path / "mine"
    for label in ("tower", "all", "tower"):
        shutil.copytree(world.paths[label], path, dirs_exist_ok=True)
        request = engine.request_for(path)
        request.load_inplace = True
        sampling = {"tokens": 6, "adapters": [path]}
        with mock.patch.object(engine, "request_for", lambda _, request=request: request):
            answer = engine.generate([world.prompt(Seen((70,)))], **sampling)[0]
        assert world.error(Seen((70,), label), answer) < support.LOGPROB_TOLERANCE


def test_what_cannot_be_adapted_is_refused_by_name(world, engine, tmp_path):
    conv = "model.vision_model.embeddings.patch_embedding"
    pixels = 3 * (IMAGE_SIDE // 4) ** 2
    support.write_unchecked(tmp_path / "conv", {conv: (torch.ones(2, pixels), torch.ones(WIDTH, 2))})
    with pytest.raises(flora_vllm.AdapterError, match=f"{conv}.*take adapters, and it is a"):
        engine.llm.llm_engine.add_lora(engine.request_for(tmp_path / "conv"))


def test_an_activated_adapter_of_a_tower_is_refused_and_one_of_the_language_model_is_not(world, engine, tmp_path):
    for label in ("tower", "language"):
        shutil.copytree(world.paths[label], tmp_path / label)
        config = tmp_path / label / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"alora_invocation_tokens": [70, 71]}))
    with pytest.raises(flora_vllm.AdapterError, match=r"vision_model.*alora_invocation_tokens"):
        engine.llm.llm_engine.add_lora(engine.request_for(tmp_path / "tower"))
    engine.llm.llm_engine.add_lora(engine.request_for(tmp_path / "language"))
