"""MixLoRA in an engine: rows that go through a block several times, whatever a scheduler does with their request."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import engine_support as support
import mixlora_support
import peft
import pytest
import torch
from engine_support import Ask, Engine
from formats_support import edit_config
from tiny_models import HEADS, KV_HEADS, LAYERS, WIDTH, tiny_llama

import flora_vllm
from flora_vllm.commands.cli import main

pytestmark = support.ENGINE_MARKS

NEW, LONG = 12, 40
# 320 tokens of keys and values; steps of 48 tokens, so that the long prompts come in pieces.
SETTINGS = {
    "block_size": 32,
    "kv_cache_memory_bytes": 10 * LAYERS * 2 * KV_HEADS * (WIDTH // HEADS) * 32 * 4,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 16,
    "max_loras": 3,
    "enable_prefix_caching": True,
}


@dataclass
class World:
    model: Path
    paths: dict[str, Path]
    engine: Engine


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "compiled"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("mixlora")
    model, paths = tiny_llama(folder / "model"), {}
    for seed in (1, 2):
        tensors = mixlora_support.random_tensors(support.load(model), seed=seed)
        mixlora_support.write(folder / f"theirs{seed}", mixlora_support.config_of(), tensors)
        paths[f"mix{seed}"] = folder / f"mix{seed}"
        assert main(["convert", "--pickle", str(folder / f"theirs{seed}"), str(paths[f"mix{seed}"])]) == 0
    paths["lora"] = folder / "lora"
    support.save_peft_adapter(model, paths["lora"], peft.LoraConfig(r=4, target_modules=["down_proj", "q_proj"]), 3)
    with support.running(model, enforce_eager=request.param, **SETTINGS) as engine:
        yield World(model, paths, engine)


def oracle(world: World, seed: int, tokens: tuple[int, ...]) -> torch.Tensor:
    model = support.load(world.model).double()
    tensors = mixlora_support.random_tensors(model, seed=seed)
    with torch.no_grad():
        logits = mixlora_support.mixed_model(model, tensors)(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits, -1)


def test_pieces_and_preemption_and_company_change_nothing(world: World) -> None:
    """Each alone is the equation in float64; together they run out of blocks, and are what they were alone."""
    names = ("mix1", "base", "mix2", "lora", "mix1")
    asks = [Ask(support.prompt(58 + i, seed=i), world.paths.get(name)) for i, name in enumerate(names)]
    alone = [world.engine.ask([ask], LONG)[0] for ask in asks]
    for ask, answer in zip(asks, alone, strict=True):
        if ask.adapter is not None and ask.adapter.name.startswith("mix"):
            whole = oracle(world, int(ask.adapter.name[-1]), (*ask.prompt, *answer.tokens))[len(ask.prompt) - 1 : -1]
            assert answer.tokens == tuple(whole.argmax(-1).tolist())
            for place, row in zip(answer.logprobs, whole, strict=True):
                assert max(abs(v - float(row[token])) for token, v in place.items()) < support.LOGPROB_TOLERANCE
    scheduler = world.engine.scheduler()
    with mock.patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as preempt:
        together = world.engine.ask(asks, LONG)
        assert preempt.call_count > 0
    for answer, wanted in zip(together, alone, strict=True):
        assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE


def test_several_answers_to_one_prompt_are_one_answer(world: World) -> None:
    """n > 1 and a prompt that is cached."""
    import vllm

    ask = Ask(support.prompt(70, seed=5), world.paths["mix1"])
    (once,) = world.engine.ask([ask], NEW)
    sampling = vllm.SamplingParams(n=3, top_k=1, max_tokens=NEW, detokenize=False, ignore_eos=True)
    (output,) = world.engine.llm.generate(
        [{"prompt_token_ids": list(ask.prompt)}],
        sampling,
        lora_request=world.engine.request_for(ask.adapter),
        use_tqdm=False,
    )
    assert output.num_cached_tokens == 64
    assert [tuple(each.token_ids) for each in output.outputs] == 3 * [once.tokens]


def test_another_activation_than_the_models_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.paths["mix1"], tmp_path / "gelu")
    edit_config(tmp_path / "gelu", act_fn="gelu")
    with pytest.raises(flora_vllm.AdapterError, match="activation 'gelu', the model has silu or swish"):
        world.engine.ask([Ask(support.prompt(5, seed=1), tmp_path / "gelu")])
