"""Whisper with adapters: encoder rows, decoder tokens and cross-attention each follow their own request's adapter."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any
from unittest import mock

import engine_support as support
import pytest
import torch
from engine_support import Answer, Engine
from tiny_models import LAYERS, WIDTH, tiny_whisper
from whisper_support import ENCODER_ROWS, Heard, World

import flora_vllm

pytestmark = support.ENGINE_MARKS

# Cross-attention takes 4 blocks of keys and values a request, the decoder one, and a second for long answers. With 25
# blocks (one more is vLLM's own) five requests run at a time until their answers grow long.
BLOCK_TOKENS, BLOCKS = 32, 26
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "max_model_len": 64,
    "max_num_batched_tokens": 5 * ENCODER_ROWS,
    "block_size": BLOCK_TOKENS,
    "kv_cache_memory_bytes": BLOCKS * LAYERS * 2 * WIDTH * BLOCK_TOKENS * 4,  # keys and values, float32
}
LONG = BLOCK_TOKENS + 4
SHARED = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny_whisper(tmp_path_factory.mktemp("whisper")), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def plain(world: World) -> list[Answer]:
    """What plain vLLM answers to three audios."""
    with support.running(world.model, flora=False, **OPTIONS) as engine:
        return engine.generate(world.prompts([Heard(audio) for audio in (SHARED, 1, 2)]), [None] * 3, 8)


@pytest.fixture(scope="module")
def engine(world: World, plain: list[Answer]) -> Iterator[Engine]:
    # Only one engine can be there at a time: the plain one comes first.
    options: dict[str, Any] = OPTIONS | {"max_loras": len(world.states) - 1, "max_lora_rank": 64, "max_flora_rank": 8}
    with support.running(world.model, **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(world: World, engine: Engine) -> dict[str | None, Answer]:
    """Every adapter's answer, and the base model's, to the audio that all share: one request at a time."""
    return {label: world.ask(engine, [Heard(SHARED, label)])[0] for label in world.states}


def test_each_adapter_alone_is_its_merged_weights(world, alone, record_property):
    errors = {label: world.error(Heard(SHARED, label), answer) for label, answer in alone.items()}
    record_property("worst", max(errors.values()))
    assert not {label: error for label, error in errors.items() if error >= support.LOGPROB_TOLERANCE}


def test_a_mixed_batch_is_the_merged_weights_of_each(world, engine, record_property):
    """More requests than are encoded in one step: some begin while others are being decoded."""
    asks = [Heard(audio, label) for audio in (SHARED, 1, 2) for label in world.states]
    answers = world.ask(engine, asks)
    errors = {ask: world.error(ask, answer) for ask, answer in zip(asks, answers, strict=True)}
    record_property("worst", max(errors.values()))
    assert not {ask: error for ask, error in errors.items() if error >= support.LOGPROB_TOLERANCE}


def test_the_adapters_are_told_apart(world):
    """Were two of them alike, a mix-up of rows would go unseen; also that the encoder's part matters by itself."""
    first = {label: world.oracle(SHARED).logprobs(state, world.prompt)[-1] for label, state in world.states.items()}
    for one, other in combinations(first, 2):
        gap = float((first[one] - first[other]).abs().max())
        assert gap > 1000 * support.LOGPROB_TOLERANCE, f"{one} and {other} differ by {gap:.1e} only"


def test_base_requests_beside_adapters_are_plain_vllms(world, engine, plain):
    asks = [Heard(SHARED), Heard(SHARED, "flora-all"), Heard(1), Heard(2, "lora"), Heard(2)]
    answers = world.ask(engine, asks)
    for place, wanted in zip((0, 2, 4), plain, strict=True):
        assert support.difference(answers[place], wanted) < support.LOGPROB_TOLERANCE


def test_one_audio_with_two_adapters_and_none_at_once_is_encoded_three_times(world, engine, alone):
    runner = engine._runner()
    asks = [Heard(SHARED, label) for label in ("flora-encoder", None, "lora", "flora-encoder")]
    with mock.patch.object(runner, "_cache_encoder_output", wraps=runner._cache_encoder_output) as cached:
        answers = world.ask(engine, asks)
    identities = [call.args[0] for call in cached.call_args_list]
    assert len(identities) == 4
    assert identities[0] == identities[3], "the adapter's identity and the audio's are all there is to it"
    assert len(set(identities)) == 3
    for ask, answer in zip(asks, answers, strict=True):
        assert support.difference(answer, alone[ask.adapter]) < support.LOGPROB_TOLERANCE


@pytest.mark.parametrize("module", ["proj_out", "model.decoder.embed_tokens", "model.encoder.conv1"])
def test_what_cannot_be_adapted_is_refused_by_name(world, engine, module, tmp_path):
    support.write_unchecked(tmp_path / "bad", {module: (torch.ones(2, WIDTH), torch.ones(512, 2))})
    with pytest.raises(flora_vllm.AdapterError, match=module):
        engine.llm.llm_engine.add_lora(engine.request_for(tmp_path / "bad"))


def test_the_packed_projections_without_a_bias_of_keys_are_adapted_one_by_one(world, engine):
    """The checkpoint has three modules where the engine has one; keys have no bias, the packed layer a zero one."""
    layouts = engine.manager().attached.layouts
    cross = layouts["model.decoder.layers.0.encoder_attn.kv_proj"]
    assert [part.module.rpartition(".")[2] for part in cross.slices] == ["k_proj", "v_proj"]
    assert len(layouts) == LAYERS * (4 + 7)


def _called_directly(engine: Engine, layer: str, rows: int) -> None:
    module = engine.model().get_submodule(layer)
    with torch.inference_mode():
        module(torch.zeros(rows, WIDTH))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("TOWER", "model.encoder.layers.1.mlp.fc1"), ("CONNECTOR", "model.decoder.layers.1.encoder_attn.kv_proj")],
)
def test_rows_of_the_encoder_must_be_the_mappings(world, engine, kind, layer):
    from vllm.lora.layers import LoRAMapping, LoRAMappingType

    manager = engine.manager()
    world.ask(engine, [Heard(1, "flora-all")], tokens=1)
    number = engine.request_for(world.paths["flora-all"]).lora_int_id
    try:
        manager.set_adapter_mapping(LoRAMapping((number,) * 3, (number,)))
        _called_directly(engine, layer, 4)
        assert "never said whose" in manager.take_fault().reason
        manager.set_adapter_mapping(LoRAMapping((number,) * 4, (number,), type=LoRAMappingType[kind]))
        assert "ran without reaching" in manager.take_fault().reason
        _called_directly(engine, layer, 4)
        for rows in (3, 5):
            _called_directly(engine, layer, rows)
            assert f"{rows} rows in a step of 4" in manager.take_fault().reason
        manager.set_adapter_mapping(LoRAMapping((0,) * 3, (0,)))
        _called_directly(engine, layer, 5)
    finally:
        manager.set_adapter_mapping(LoRAMapping((0,), (0,)))


def test_a_preempted_request_that_comes_back_beside_new_ones_hears_its_own_audio(world, engine):
    """vLLM encodes in the order of scheduling and stores in that of the batch: here they differ."""
    asks = [Heard(audio, label) for audio, label in enumerate([*world.states, *world.states])]
    runner, disordered = engine._runner(), 0
    encode = runner._execute_mm_encoder

    def watch(scheduler_output):
        nonlocal disordered
        scheduled = list(scheduler_output.scheduled_encoder_inputs)
        disordered += scheduled != [name for name in runner.input_batch.req_ids if name in scheduled]
        return encode(scheduler_output)

    with mock.patch.object(runner, "_execute_mm_encoder", watch):
        answers = world.ask(engine, asks, tokens=LONG)
    assert disordered > 0
    errors = {ask: world.error(ask, answer) for ask, answer in zip(asks, answers, strict=True)}
    assert not {ask: error for ask, error in errors.items() if error >= support.LOGPROB_TOLERANCE}
