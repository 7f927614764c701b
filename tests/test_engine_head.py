"""Adapters of the output layer and of the embedding, tied and padded: rows sampled from, rows of prompts, token ids.

The oracle is PEFT's own forward of each folder: an adapter changes the one module alone, whatever weight it shares; but
rows of tokens are those of both.
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_support as support
import peft
import pytest
import torch
from engine_support import Answer, Ask, Engine
from families_support import fill_normal
from formats_support import edit_config
from safetensors.torch import load_file, save_file
from tiny_models import FEED_FORWARD, HEADS, KV_HEADS, LAYERS, WIDTH, randomise
from transformers import Qwen2Config, Qwen2ForCausalLM

import flora_vllm

pytestmark = support.ENGINE_MARKS

VOCABULARY = 500  # vLLM pads it to 512
NEW = 4
TOKENS = [*range(1, VOCABULARY, 3)]  # such that prompts have some
CONFIGS = {
    "head": peft.LoraConfig(r=4, target_modules=["lm_head"]),
    "head and queries": peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], rank_pattern={"lm_head": 6}),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["lm_head", "v_proj"]),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    "dora of both ends": peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "lm_head"]),
    "both ends": peft.LoraConfig(
        r=3, use_rslora=True, target_modules=["embed_tokens", "lm_head", "q_proj"], alpha_pattern={"embed_tokens": 3}
    ),
    "queries": peft.LoraConfig(r=4, target_modules=["q_proj"]),
    "head saved": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding saved": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both saved": peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "a layer saved": peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["o_proj", "layers.1.mlp.up_proj"]
    ),
    # Of a tied model they are the output layer's, too, unless it has its own.
    "tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS),
    "tokens of each": peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS[:7]}
    ),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "norms saved": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"]),
    "tokens alone": peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
}


@dataclass
class World:
    model: Path
    paths: dict[str, Path | None]
    engine: Engine

    def logits(self, name: str, tokens: list[int]) -> torch.Tensor:
        """(tokens, vocabulary) logprobs of PEFT's forward, float64."""
        model: Any = support.load(self.model)
        path = self.paths[name]
        if path is not None:
            model = peft.PeftModel.from_pretrained(model, str(path)).eval()
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)

    def error(self, name: str, ask: Ask, answer: Answer) -> float:
        """Largest difference of a logprob from PEFT's, over the whole answer."""
        whole = self.logits(name, [*ask.prompt, *answer.tokens])[len(ask.prompt) - 1 : -1]
        return max(
            abs(value - float(row[token]))
            for row, place in zip(whole, answer.logprobs, strict=True)
            for token, value in place.items()
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("head")
    settings = {"hidden_size": WIDTH, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config = Qwen2Config(vocab_size=VOCABULARY, tie_word_embeddings=True, **settings, **heads)
    model = Qwen2ForCausalLM(config)
    randomise(model, seed=0)
    model.save_pretrained(folder / "model")
    paths: dict[str, Path | None] = {"base": None}
    for seed, (name, adapter) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        wrapped: Any = peft.get_peft_model(support.load(folder / "model"), adapter)
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                fill_normal(key, parameter.data, std=0.2)
        wrapped.save_pretrained(str(folder / name))
        paths[name] = folder / name
    with support.running(folder / "model", max_loras=len(paths), max_num_batched_tokens=64) as engine:
        yield World(folder / "model", paths, engine)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def test_every_row_of_a_mixed_batch_is_its_own_adapters(world: World, record_property: Any) -> None:
    names = [*world.paths, *reversed(world.paths)]
    asks = [Ask(prompt(5 + 3 * i, seed=i), world.paths[name]) for i, name in enumerate(names)]
    answers = world.engine.ask(asks, NEW)
    for name, ask, answer in zip(names, asks, answers, strict=True):
        error = world.error(name, ask, answer)
        record_property(name, error)
        assert error < support.LOGPROB_TOLERANCE, name
    # The adapters are far from the base, and from each other.
    tokens = list(asks[0].prompt)
    logits = [world.logits(name, tokens) for name in world.paths]
    assert min(float((a - b).abs().max()) for a, b in itertools.combinations(logits, 2)) > 0.1


def test_an_answer_is_the_same_alone_and_others_leave_the_base_as_it_is(world: World) -> None:
    asks = [Ask(prompt(9, seed=50), path) for path in world.paths.values()]
    for ask, answer in zip(asks, world.engine.ask(asks, NEW), strict=True):
        assert support.difference(world.engine.ask([ask], NEW)[0], answer) < support.LOGPROB_TOLERANCE


def test_logprobs_of_prompts_and_of_several_answers_are_the_adapters(world: World) -> None:
    """Prompts longer than a step's tokens come in pieces, beside requests that sample."""
    import vllm

    sampling = vllm.SamplingParams(
        n=3, temperature=1.0, max_tokens=NEW, logprobs=3, prompt_logprobs=2, detokenize=False, ignore_eos=True
    )
    names = ["head", "base", "dora", "both ends", "head and queries", "both saved", "tokens"]
    prompts = [prompt(length, seed=70 + length) for length in (7, 90, 81, 12, 30, 20, 40)]
    outputs = world.engine.llm.generate(
        [{"prompt_token_ids": list(tokens)} for tokens in prompts],
        sampling,
        lora_request=[world.engine.request_for(world.paths[name]) for name in names],
        use_tqdm=False,
    )
    for name, tokens, output in zip(names, prompts, outputs, strict=True):
        whole = world.logits(name, list(tokens))
        for row, place in zip(whole, output.prompt_logprobs[1:], strict=False):
            for token, entry in place.items():
                assert abs(entry.logprob - float(row[token])) < support.LOGPROB_TOLERANCE, name
        assert len(output.outputs) == 3
        for one in output.outputs:
            places = tuple({token: entry.logprob for token, entry in place.items()} for place in one.logprobs)
            answer = Answer(tuple(one.token_ids), places)
            assert world.error(name, Ask(tokens), answer) < support.LOGPROB_TOLERANCE, name


def test_logits_of_rows_that_nobody_named_fail_their_requests_and_no_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a model whose output layer runs on other rows than those sampled from."""
    head: Any = world.engine.model().get_submodule("lm_head")
    apply = head.quant_method.apply

    def doubled(layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return apply(layer, torch.cat([x, x]), bias)[: len(x)]

    asks = [Ask(prompt(9, seed=90), world.paths["queries"]), Ask(prompt(9, seed=90))]
    wanted = world.engine.ask(asks, NEW)
    with monkeypatch.context() as patched:
        patched.setattr(head.quant_method, "apply", doubled)
        for answer, known in zip(world.engine.ask(asks, NEW), wanted, strict=True):
            assert support.difference(answer, known) < support.LOGPROB_TOLERANCE
        with pytest.raises(flora_vllm.StepError, match="adapters cannot follow"):
            world.engine.ask([Ask(prompt(9, seed=91), world.paths["head"]), *asks], NEW)
    assert world.engine.ask(asks, NEW)[1].tokens == wanted[1].tokens


def test_what_is_saved_whole_and_cannot_be_served_is_refused_by_name(world: World, tmp_path: Path) -> None:
    weight = "base_model.model.lm_head.weight"
    for name, change, said in (
        ("resized", lambda t: t | {weight: t[weight][:-3]}, r"'lm_head'.*another size \(weight \(497, .*\(500, "),
        (
            "twice",
            lambda t: t | {weight.replace("weight", "modules_to_save.weight"): t[weight] + 1},
            "both weight of 'lm_head'",
        ),
        (
            "elsewhere",
            lambda t: t | {weight.replace("lm_", "other_"): t[weight] + 1},
            "'base_model.model.other_head.weight'",
        ),
        ("base", lambda t: t | {weight.replace("weight", "base_layer.weight"): t[weight] + 1}, "serve that base model"),
    ):
        source = world.paths["head saved"]
        assert source is not None
        shutil.copytree(source, tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)
        with pytest.raises(flora_vllm.AdapterError, match=said):
            world.engine.ask([Ask(prompt(5, seed=1), tmp_path / name)])


def test_other_families_and_misplaced_tensors_are_refused_by_name(world: World, tmp_path: Path) -> None:
    support.write_unchecked(
        tmp_path / "flora", {"model.embed_tokens": (torch.ones(2, WIDTH), torch.ones(VOCABULARY, 2))}
    )
    folder = world.paths["embedding"]
    assert folder is not None
    shutil.copytree(folder, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = {name.replace("embed_tokens", "layers.0.self_attn.q_proj"): t for name, t in load_file(file).items()}
    save_file({name: t for name, t in tensors.items() if "lora_" in name}, file)
    edit_config(tmp_path / "lora", target_modules=["q_proj"])
    for name, said in (("flora", "'model.embed_tokens' is an embedding"), ("lora", "q_proj'.*embedding.*is none")):
        with pytest.raises(flora_vllm.AdapterError, match=said):
            world.engine.ask([Ask(prompt(5, seed=1), tmp_path / name)])
