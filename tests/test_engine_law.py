"""The law of the project: a request gives the same result alone and in any mix, any order, any slot.

Requests of all families share steps with chunked prefills and prefix-cache hits; adapters' directories are swapped.
"""

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import engine_support as support
import pytest
from engine_support import Answer, Ask, Engine
from tiny_models import tiny_llama

pytestmark = support.ENGINE_MARKS

# Chunked prefill: no prompt below fits a step that 16 requests share. Blocks of 32 tokens: prefixes of 64 are cached.
SETTINGS = {"max_num_batched_tokens": 48, "max_num_seqs": 32, "block_size": 32, "enable_prefix_caching": True}
MIXES = 3
REQUESTS = 16
FORCED_FLOOR = 2e-5


@dataclass(frozen=True)
class World:
    model: Path
    adapters: Mapping[str, Path]
    mixes: Sequence[Sequence[Ask]]


@dataclass
class Recorded:
    """Answers of one engine: each request alone, and each mix as one batch."""

    alone: dict[Ask, Answer] = field(default_factory=dict)
    mixed: list[list[Answer]] = field(default_factory=list)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("law")
    model = tiny_llama(folder / "model")
    adapters = support.write_every_family(model, folder)
    chance = random.Random(0)
    prefixes = [support.prompt(64, seed) for seed in (1, 2)]
    tails = [support.prompt(1 + 4 * i, seed=10 + i) for i in range(10)]

    def request() -> Ask:
        prefix = chance.choice([(), *prefixes, *prefixes])
        adapter = chance.choice([None, None, None, *adapters.values()])
        return Ask(prefix + chance.choice(tails), adapter)

    return World(model, adapters, [[request() for _ in range(REQUESTS)] for _ in range(MIXES)])


def _record(engine: Engine, mixes: Sequence[Sequence[Ask]]) -> Recorded:
    recorded = Recorded()
    # The first mix fills the prefix cache for the others, and each repeats prefixes within itself.
    recorded.mixed = [engine.ask(mix) for mix in mixes]
    for ask in {ask for mix in mixes for ask in mix}:
        engine.llm.reset_prefix_cache()
        recorded.alone[ask] = engine.ask([ask])[0]
    return recorded


def _worst(mixes: Sequence[Sequence[Ask]], recorded: Recorded) -> float:
    return max(
        support.difference(answer, recorded.alone[ask])
        for mix, answers in zip(mixes, recorded.mixed, strict=True)
        for ask, answer in zip(mix, answers, strict=True)
    )


@pytest.fixture(scope="module")
def plain(world: World) -> tuple[Recorded, float]:
    """Plain vLLM on the same prompts without adapters, and its own worst alone-against-batch difference."""
    mixes = [[Ask(ask.prompt) for ask in mix] for mix in world.mixes]
    with support.running(world.model, flora=False, **SETTINGS) as engine:
        recorded = _record(engine, mixes)
    return recorded, _worst(mixes, recorded)


@pytest.fixture(scope="module", params=["auto", "stacked", "modulated"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(world: World, path: str, plain: tuple[Recorded, float]) -> Iterator[Engine]:
    # One engine at a time: `plain` has ended its own before this one starts.
    with support.running(world.model, flora_path=path, max_loras=len(world.adapters), **SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def recorded(world: World, engine: Engine) -> Recorded:
    return _record(engine, world.mixes)


def _bound(path: str, own: float) -> float:
    return support.LOGPROB_TOLERANCE if path == "auto" else max(FORCED_FLOOR, 3 * own)


def test_each_request_of_a_mix_gets_what_it_gets_alone(world, path, recorded, plain, record_property):
    worst, own = _worst(world.mixes, recorded), plain[1]
    record_property("worst", worst)
    record_property("plain_vllm_own", own)
    assert worst <= _bound(path, own), f"alone against mixed: {worst:.1e}, plain vLLM alone against mixed: {own:.1e}"


def test_the_mixes_had_what_they_promise(world, engine, path):
    """Prefix-cache hits, prefill in chunks and repeated adapters, or the test above proves less than it says."""
    assert all(len({ask.adapter for ask in mix}) >= 6 for mix in world.mixes)
    assert all(len(mix) - len({ask.adapter for ask in mix}) >= 3 for mix in world.mixes)
    sampled = [{"prompt_token_ids": list(ask.prompt)} for ask in world.mixes[0]]
    requests = [engine.request_for(ask.adapter) for ask in world.mixes[0]]
    engine.llm.reset_prefix_cache()
    scheduled = []
    scheduler = engine.scheduler()
    schedule = scheduler.schedule

    def recording(*args, **kwargs):
        scheduled.append(schedule(*args, **kwargs))
        return scheduled[-1]

    with mock.patch.object(scheduler, "schedule", recording):
        outputs = [*engine.llm.generate(sampled, lora_request=requests, use_tqdm=False)]
        outputs += engine.llm.generate(sampled, lora_request=requests, use_tqdm=False)
    assert sum(output.num_cached_tokens > 0 for output in outputs) >= 5
    lengths = {len(ask.prompt) for ask in world.mixes[0]}
    parts = [tokens for step in scheduled for tokens in step.num_scheduled_tokens.values() if tokens > 1]
    assert any(part not in lengths for part in parts)
    assert any(len(step.num_scheduled_tokens) > 3 and max(step.num_scheduled_tokens.values()) > 1 for step in scheduled)


def test_base_rows_are_plain_vllm_with_every_slot_full(world, engine, path, plain, record_property):
    prompts = [ask.prompt for ask in world.mixes[0]][: REQUESTS // 2]
    asks = [Ask(p) for p in prompts] + [Ask(support.prompt(9, seed=3), a) for a in world.adapters.values()]
    random.Random(1).shuffle(asks)
    answers = engine.ask(asks)
    assert None not in engine.manager().lora_index_to_id
    worst = max(
        support.difference(answer, plain[0].alone[ask])
        for ask, answer in zip(asks, answers, strict=True)
        if ask.adapter is None
    )
    record_property("worst", worst)
    assert worst <= max(FORCED_FLOOR, 3 * plain[1])


def test_two_swapped_directories_change_exactly_their_two_requests(world, engine, path, tmp_path):
    """Rank 4, 8 adapters among 24 requests; the other 22 must not notice, and the two exchange their answers."""
    base = support.load(world.model)
    names = [f"swap-{i}" for i in range(8)]
    for seed, name in enumerate(names):
        support.write_flora_adapter(base, tmp_path / name, 4, "mean", seed=50 + seed)
    shared = support.prompt(20, seed=4)
    asks = [Ask(shared, tmp_path / names[i % 8]) for i in (0, 1)]
    asks += [Ask(support.prompt(20, seed=5 + i % 3), tmp_path / names[2 + i % 6]) for i in range(15)]
    asks += [Ask(support.prompt(20, seed=5 + i % 3)) for i in range(7)]
    assert len(asks) == 24
    before = engine.ask(asks)
    swapped = tmp_path / "swapped"
    for i, name in enumerate(names):
        shutil.copytree(tmp_path / names[1 - i if i < 2 else i], swapped / name)
    after = engine.ask([Ask(a.prompt, a.adapter and swapped / a.adapter.name) for a in asks])
    assert before[0].tokens != before[1].tokens
    assert support.difference(after[0], before[1]) < support.LOGPROB_TOLERANCE
    assert support.difference(after[1], before[0]) < support.LOGPROB_TOLERANCE
    for old, new in zip(before[2:], after[2:], strict=True):
        assert support.difference(old, new) < support.LOGPROB_TOLERANCE
