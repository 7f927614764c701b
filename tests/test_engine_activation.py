"""Activated adapters (`alora_invocation_tokens`), of every family: base tokens and base cache before the invocation.

LoRA is judged against PEFT's own aLoRA, all families against merged weights that continue the base model's cache.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import engine_support as support
import peft
import pytest
import torch
from engine_support import Answer, Ask, Engine, State
from tiny_models import HEADS, KV_HEADS, LAYERS, WIDTH

import flora_vllm

pytestmark = support.ENGINE_MARKS

INVOCATION, OTHER_INVOCATION, ONE = (301, 7, 302), (401, 402), (303,)
BLOCK, BLOCKS = 32, 70
BLOCK_BYTES = LAYERS * 2 * KV_HEADS * (WIDTH // HEADS) * BLOCK * 4  # keys and values, float32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class World:
    """`states`: the weights each activated adapter amounts to. `invocations`: adapter -> what wakes it."""

    model: Path
    states: Mapping[Path, State]
    invocations: Mapping[Path, tuple[int, ...]]
    named: Mapping[str, Path]


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> World:
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("activated")
    configs = {
        "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        "judge": peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "hira": peft.HiraConfig(r=3, target_modules=TARGETS),
        "whole": peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    }
    named = {name: folder / name for name in (*configs, "flora")}
    states = {
        named[name]: support.save_peft_adapter(model, named[name], config, seed)
        for seed, (name, config) in enumerate(configs.items())
    }
    states[named["flora"]] = support.write_flora_adapter(support.load(model), named["flora"], 3, "mean", seed=9)
    invocations = dict.fromkeys(named.values(), INVOCATION) | {named["judge"]: OTHER_INVOCATION}
    del invocations[named["whole"]]
    for path, tokens in invocations.items():
        activate(path, tokens)
    named["one"] = folder / "one"
    shutil.copytree(named["lora"], named["one"])
    activate(named["one"], ONE)
    states[named["one"]], invocations[named["one"]] = states[named["lora"]], ONE
    return World(model, states, invocations, named)


def activate(path: Path, tokens: Sequence[int]) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": list(tokens)}))


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[Engine]:
    """Chunked prefill, a prefix cache, 3 slots for 6 adapters, keys and values of 2,240 tokens."""
    with support.running(
        world.model,
        max_loras=3,
        max_cpu_loras=4,
        block_size=BLOCK,
        kv_cache_memory_bytes=BLOCKS * BLOCK_BYTES,
        enable_prefix_caching=True,
        max_num_batched_tokens=48,
        max_num_seqs=32,
        max_model_len=2048,
    ) as engine:
        yield engine


class Oracle:
    """The base model's keys and values of what comes before `first`, continued with an adapter's weights; float64."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._model = support.load(world.model).double()
        self._base = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    def first(self, ask: Ask) -> int:
        """The first token of a request that is its adapter's; its length and more if none is."""
        if ask.adapter is None:
            return 1 << 30
        if ask.adapter not in self._world.invocations:
            return 0
        wanted = self._world.invocations[ask.adapter]
        starts = [i for i in range(len(ask.prompt)) if ask.prompt[i : i + len(wanted)] == wanted]
        return max(starts, default=1 << 30)

    @torch.no_grad()
    def logprobs(self, ask: Ask, answer: Sequence[int]) -> torch.Tensor:
        """(tokens, vocabulary) logprobs of what follows each token of the prompt and its answer."""
        tokens = torch.tensor([[*ask.prompt, *answer]])
        first = min(self.first(ask), tokens.shape[1])
        parts, cache = [], None
        for state, ids in ((self._base, tokens[:, :first]), (ask.adapter, tokens[:, first:])):
            if ids.shape[1]:
                self._model.load_state_dict(dict(self._world.states[state] if isinstance(state, Path) else state))
                out = self._model(ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits[0])
        return torch.log_softmax(torch.cat(parts), -1)

    def error(self, ask: Ask, answer: Answer, greedy: bool = True) -> float:
        whole = self.logprobs(ask, answer.tokens)[len(ask.prompt) - 1 : -1]
        if greedy and answer.tokens != tuple(whole.argmax(-1).tolist()):
            return math.inf
        return max(
            abs(value - float(place[token]))
            for place, served in zip(whole, answer.logprobs, strict=True)
            for token, value in served.items()
        )


@pytest.fixture(scope="module")
def oracle(world: World) -> Oracle:
    return Oracle(world)


def ask_all(engine: Engine, asks: Sequence[Ask], tokens: int = 8, **options: Any) -> tuple[list[Answer], list[int]]:
    """Greedy answers of one batch, and how many tokens of each prompt came from the prefix cache."""
    import vllm

    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=5, detokenize=False, ignore_eos=True, **options
    )
    prompts: list[Any] = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
    requests = [engine.request_for(ask.adapter) for ask in asks]
    outputs = engine.llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
    return [support._answer(output.outputs[0]) for output in outputs], [output.num_cached_tokens for output in outputs]


def prompts_around(invocation: Sequence[int]) -> list[tuple[int, ...]]:
    """The invocation in the middle, at the start, at the end, twice, cut off at the end, and nowhere."""
    wake, some = tuple(invocation), [support.prompt(n, seed=n) for n in (70, 33, 9)]
    return [
        some[0] + wake + some[1],
        wake + some[0],
        some[0] + wake,
        some[1] + wake + some[0] + wake + some[2],
        some[0] + wake[:-1],
        some[0],
    ]


def test_lora_is_pefts_own(world, engine, oracle):
    model = peft.PeftModel.from_pretrained(support.load(world.model), str(world.named["lora"])).eval()
    asks = [Ask(prompt, world.named["lora"]) for prompt in prompts_around(INVOCATION)]
    engine.llm.reset_prefix_cache()
    answers, _ = ask_all(engine, asks)
    for ask, answer in zip(asks, answers, strict=True):
        ids = torch.tensor([list(ask.prompt)])
        if ask in asks[2:4]:  # slow
            mask = torch.ones_like(ids)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
            )
            assert answer.tokens == tuple(out[0, len(ask.prompt) :].tolist())
        whole = [*ask.prompt, *answer.tokens]
        offset = len(whole) - oracle.first(ask)
        with torch.no_grad():
            logits = model(torch.tensor([whole]), alora_offsets=[offset if offset > 0 else None]).logits[0].double()
        wanted = torch.log_softmax(logits, -1)[len(ask.prompt) - 1 : -1]
        worst = max(abs(v - float(p[t])) for p, s in zip(wanted, answer.logprobs, strict=True) for t, v in s.items())
        assert worst < support.LOGPROB_TOLERANCE
        assert oracle.error(ask, answer) < support.LOGPROB_TOLERANCE
    assert answers[4].tokens == engine.ask([Ask(asks[4].prompt)])[0].tokens


def test_every_family_in_one_batch_with_base_and_ordinary_adapters(world, engine, oracle):
    adapters = [*world.named.values(), None]
    asks = [Ask(p, a) for p in prompts_around(INVOCATION)[:5] for a in adapters]
    asks += [Ask(p, world.named["judge"]) for p in prompts_around(OTHER_INVOCATION)]
    for turn in range(2):
        answers, cached = ask_all(engine, asks if turn == 0 else asks[::-1])
        for ask, answer in zip(asks if turn == 0 else asks[::-1], answers, strict=True):
            assert oracle.error(ask, answer) < support.LOGPROB_TOLERANCE, (turn, ask)
    assert sum(cached) > 0


def test_the_base_prefix_is_read_and_nothing_else(world, engine, oracle):
    prefix = support.prompt(200, seed=77)
    woken = Ask(prefix + INVOCATION + support.prompt(80, seed=78), world.named["lora"])
    whole = Ask(woken.prompt, world.named["whole"])
    engine.llm.reset_prefix_cache()
    alone, cached = ask_all(engine, [woken])
    assert cached == [0]
    engine.llm.reset_prefix_cache()
    ask_all(engine, [Ask(prefix)])
    for ask, expected in ((whole, 0), (woken, 192), (woken, 256), (Ask(woken.prompt, world.named["hira"]), 192)):
        answer, cached = ask_all(engine, [ask])
        assert cached == [expected]
        assert oracle.error(ask, answer[0]) < support.LOGPROB_TOLERANCE
        if ask == woken:
            assert support.difference(answer[0], alone[0]) < support.LOGPROB_TOLERANCE
    # The base model reads what the adapter's request computed of the prefix, and stops there.
    answer, cached = ask_all(engine, [Ask(woken.prompt)])
    assert cached == [192]
    assert oracle.error(Ask(woken.prompt), answer[0]) < support.LOGPROB_TOLERANCE


def test_a_sequence_in_an_answer_does_not_move_the_start_and_its_block_is_its_own(world, engine, oracle):
    """One block of the same text: adapted from its second token on where the rest is an answer, from its last on where
    all is a prompt."""
    adapter = world.named["one"]
    asked = Ask(_without(support.prompt(33, seed=5)) + ONE + _without(support.prompt(5, seed=6)), adapter)
    engine.llm.reset_prefix_cache()
    answers, _ = ask_all(engine, [asked], 2 * BLOCK, allowed_token_ids=list(ONE))
    assert answers[0].tokens == ONE * 2 * BLOCK
    again = Ask((asked.prompt + answers[0].tokens)[: 2 * BLOCK] + _without(support.prompt(20, seed=7)), adapter)
    assert (oracle.first(asked), oracle.first(again)) == (33, 63)
    answers, cached = ask_all(engine, [again])
    assert oracle.error(again, answers[0]) < support.LOGPROB_TOLERANCE
    assert cached == [BLOCK]


def _without(tokens: Sequence[int]) -> tuple[int, ...]:
    return tuple(token for token in tokens if token not in ONE)


def test_logprobs_of_a_prompt_and_several_answers_to_it(world, engine, oracle):
    import vllm

    ask = Ask(support.prompt(50, seed=8) + INVOCATION + support.prompt(12, seed=9), world.named["flora"])
    sampling = vllm.SamplingParams(
        n=3, temperature=1, max_tokens=6, logprobs=3, prompt_logprobs=3, detokenize=False, ignore_eos=True
    )
    request = engine.request_for(ask.adapter)
    prompt: Any = {"prompt_token_ids": list(ask.prompt)}
    (output,) = engine.llm.generate([prompt], sampling, lora_request=[request], use_tqdm=False)
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    for one in output.outputs:
        assert oracle.error(ask, support._answer(one), greedy=False) < support.LOGPROB_TOLERANCE
    wanted = oracle.logprobs(ask, ())
    for place, served in enumerate(output.prompt_logprobs[1:]):
        for token, entry in served.items():
            assert abs(float(wanted[place, token]) - entry.logprob) < support.LOGPROB_TOLERANCE


def test_a_preempted_request_keeps_its_start(world, engine, oracle):
    used = [world.named[name] for name in ("lora", "flora", "ia3")]
    asks = [
        Ask(support.prompt(200 + i, seed=20 + i) + INVOCATION + support.prompt(30, seed=i), used[i % 3])
        for i in range(9)
    ]
    engine.llm.reset_prefix_cache()
    scheduler = engine.scheduler()
    with mock.patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as preempt:
        answers, _ = ask_all(engine, asks, tokens=60)
    assert preempt.call_count > 0
    for ask, answer in zip(asks, answers, strict=True):
        assert oracle.error(ask, answer) < support.LOGPROB_TOLERANCE


def test_conversation_of_base_judge_and_rewriter_over_one_context(world, engine, oracle):
    """Each call reads what the base model's calls left of the context; an adapter's turn costs its own tokens only."""
    base, judge, rewriter = None, world.named["judge"], world.named["flora"]
    text = support.prompt(1500, seed=90)
    engine.llm.reset_prefix_cache()
    reused = []
    turns = ((base, ()), (judge, OTHER_INVOCATION), (rewriter, INVOCATION), (base, ()), (judge, OTHER_INVOCATION))
    for turn, (speaker, wake) in enumerate(turns):
        said = support.prompt(20, seed=91 + turn)
        ask = Ask(text + (said + wake), speaker)
        answers, cached = ask_all(engine, [ask], tokens=12)
        assert oracle.error(ask, answers[0]) < support.LOGPROB_TOLERANCE
        reused.append(cached[0])
        text = text + said + answers[0].tokens
    # Whole blocks before what is new to the base model: its own words of the turn, and all that adapters said.
    assert reused[0] == 0
    assert reused[1:] == [1504, 1536, 1568, 1600], reused


def test_what_cannot_be_told_exactly_is_refused(world, engine, oracle, tmp_path):
    ask = Ask(support.prompt(5, seed=1), world.named["lora"])
    engine.ask([ask])
    request = engine.request_for(ask.adapter)
    core = engine.llm.llm_engine.engine_core.engine_core
    pieces = SimpleNamespace(
        request_id="r", lora_request=request, prompt_embeds=None, prompt_token_ids=[1], resumable=True
    )
    with pytest.raises(flora_vllm.AdapterError, match="comes in pieces"):
        core.preprocess_add_request(pieces)
    pieces.prompt_embeds, pieces.resumable = torch.zeros(1, 1), False
    with pytest.raises(flora_vllm.AdapterError, match="embeddings in place of tokens"):
        core.preprocess_add_request(pieces)
    changed = tmp_path / "lora"
    shutil.copytree(world.named["lora"], changed)
    activate(changed, OTHER_INVOCATION)
    replacing = type(request)("lora", request.lora_int_id, str(changed), load_inplace=True)
    with pytest.raises(flora_vllm.AdapterError, match="other alora_invocation_tokens"):
        engine.llm.llm_engine.add_lora(replacing)
    for name in ("flora", "ia3", "hira", "judge"):  # evicted, and back from its copy
        engine.ask([Ask(ask.prompt, world.named[name])])
    woken = Ask(support.prompt(40, seed=2) + INVOCATION + support.prompt(9, seed=3), ask.adapter)
    assert oracle.error(woken, ask_all(engine, [woken])[0][0]) < support.LOGPROB_TOLERANCE
    manager = engine.manager()
    with pytest.raises(flora_vllm.errors.StepError, match="without its requests' positions"):
        engine._runner().lora_manager.base_rows.without_base_rows(None, {request.lora_int_id})
    assert manager.get_adapter(request.lora_int_id) is not None
