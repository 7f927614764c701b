"""Caches that are too small: adapters' slots, their places in host memory, and blocks of keys and values.

Whatever was evicted, preempted, removed from disk or replaced in between, an answer is the same as alone.
"""

import ctypes
import gc
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import engine_support as support
import pytest
from engine_support import Ask, Engine
from tiny_models import HEADS, KV_HEADS, LAYERS, WIDTH
from vllm.lora.request import LoRARequest

import flora_vllm

pytestmark = support.ENGINE_MARKS

BLOCK_TOKENS, BLOCKS = 32, 10
BLOCK_BYTES = LAYERS * 2 * KV_HEADS * (WIDTH // HEADS) * BLOCK_TOKENS * 4  # keys and values, float32


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return support.write_every_family(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def engine(tiny_model) -> Iterator[Engine]:
    """2 slots, 3 adapters in host memory, 320 tokens of keys and values."""
    with support.running(
        tiny_model("llama"),
        max_loras=2,
        max_cpu_loras=3,
        block_size=BLOCK_TOKENS,
        kv_cache_memory_bytes=BLOCKS * BLOCK_BYTES,
        enable_prefix_caching=False,
        max_num_batched_tokens=48,
        max_num_seqs=32,
    ) as engine:
        yield engine


def test_more_adapters_than_slots_and_host_places(adapters, engine):
    used = [adapters[name] for name in ("flora-1", "lora", "flora-8", "ia3", "hira", "flora-4")]
    asks = [Ask(support.prompt(6 + i, seed=i), adapter) for i, adapter in enumerate([*used, None, *used])]
    alone = [engine.ask([ask])[0] for ask in asks]
    for turn in range(2):
        answers = engine.ask(asks if turn == 0 else asks[::-1])
        for answer, wanted in zip(answers if turn == 0 else answers[::-1], alone, strict=True):
            assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE
    manager = engine.manager()
    assert len(manager.list_adapters()) == 3
    assert sum(index is not None for index in manager.lora_index_to_id) == 2


def test_a_registered_adapter_that_is_not_in_memory_takes_next_to_none(engine, tiny_model, tmp_path):
    """Everything of the engine is in this process: server's names, the core's tables and the worker's adapters."""
    base = support.load(tiny_model("llama"))
    support.write_flora_adapter(base, tmp_path / "wide", 16, "mean", seed=0)

    def register(ids: range) -> int:
        """Bytes of this process's own memory when these are registered."""
        for number in ids:
            engine.llm.llm_engine.add_lora(LoRARequest(f"wide-{number}", number, str(tmp_path / "wide")))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) << 10

    before = register(range(1000, 1030))
    grown = register(range(1030, 1150)) - before
    kept = engine.manager().report(None)["adapters"]
    size = max(adapter["bytes"] for adapter in kept)
    assert (len(kept), size > 200_000) == (3, True)
    assert grown / 120 < 20_000, "what it is known by, not its numbers"
    for number in range(1000, 1150):
        engine.llm.llm_engine.remove_lora(number)


def test_no_step_walks_the_table_of_all_adapters(adapters, engine):
    """`LRUCache.cache` copies it; a step with thousands of registered adapters would wait for that."""
    from vllm.utils.cache import LRUCache

    asks = [Ask(support.prompt(9, seed=50 + i), adapters[name]) for i, name in enumerate(("flora-1", "lora"))]
    engine.ask(asks)  # they are loaded
    with mock.patch.object(LRUCache, "cache", new_callable=mock.PropertyMock, side_effect=AssertionError):
        engine.ask([*asks, Ask(support.prompt(9, seed=52), None)])


def test_a_preempted_request_continues_as_if_nothing_had_happened(adapters, engine):
    used = [None, adapters["flora-8"], adapters["lora"], None]
    asks = [Ask(support.prompt(60, seed=20 + i), adapter) for i, adapter in enumerate(used)]
    alone = [engine.ask([ask], tokens=40)[0] for ask in asks]
    scheduler = engine.scheduler()
    with mock.patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as preempt:
        answers = engine.ask(asks, tokens=40)
    assert preempt.call_count > 0
    for answer, wanted in zip(answers, alone, strict=True):
        assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE


def test_an_evicted_adapter_comes_back_from_its_copy(adapters, engine, tmp_path):
    """Its directory is gone, then another adapter's: the engine keeps serving what it admitted."""
    ask = Ask(support.prompt(12, seed=30), tmp_path / "mine")
    shutil.copytree(adapters["flora-2"], tmp_path / "mine")
    before = engine.ask([ask])[0]
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(adapters["flora-5"], tmp_path / "mine")
    for name in ("lora", "ia3", "hira"):
        engine.ask([Ask(support.prompt(5, seed=31), adapters[name])])
    number = engine.request_for(tmp_path / "mine").lora_int_id
    assert number not in engine.manager().list_adapters()
    assert support.difference(engine.ask([ask])[0], before) < support.LOGPROB_TOLERANCE


def test_the_same_id_loaded_in_place_serves_the_new_weights(adapters, engine, tmp_path):
    ask = Ask(support.prompt(12, seed=32), tmp_path / "mine")
    shutil.copytree(adapters["flora-2"], tmp_path / "mine")
    old = engine.ask([ask])[0]
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(adapters["flora-5"], tmp_path / "mine")
    request = engine.request_for(ask.adapter)
    request.load_inplace = True
    engine.llm.llm_engine.add_lora(request)
    wanted = engine.ask([Ask(ask.prompt, adapters["flora-5"])])[0]
    new = engine.ask([ask])[0]
    assert new.tokens != old.tokens
    assert support.difference(new, wanted) < support.LOGPROB_TOLERANCE


def test_a_faulty_replacement_leaves_the_old_weights_in_place(adapters, engine, tmp_path):
    ask = Ask(support.prompt(12, seed=33), tmp_path / "mine")
    shutil.copytree(adapters["flora-2"], tmp_path / "mine")
    old = engine.ask([ask])[0]
    (tmp_path / "mine" / "adapter_model.safetensors").write_bytes(b"torn")
    request = engine.request_for(ask.adapter)
    request.load_inplace = True
    with pytest.raises(flora_vllm.AdapterError, match="mine"):
        engine.llm.llm_engine.add_lora(request)
    assert support.difference(engine.ask([ask])[0], old) < support.LOGPROB_TOLERANCE
    for name in ("lora", "ia3", "hira"):
        engine.ask([Ask(support.prompt(5, seed=31), adapters[name])])
    assert support.difference(engine.ask([ask])[0], old) < support.LOGPROB_TOLERANCE


def test_an_adapter_that_cannot_come_back_fails_its_own_requests(adapters, engine, tmp_path):
    """Its copy is gone too, as when a disk is wiped; found out within a step, in which others run."""
    mine, other = Ask(support.prompt(12, seed=40), tmp_path / "mine"), Ask(support.prompt(12, seed=41), adapters["ia3"])
    shutil.copytree(adapters["flora-2"], tmp_path / "mine")
    engine.ask([mine])
    wanted = engine.ask([other, Ask(other.prompt)])
    number = engine.request_for(tmp_path / "mine").lora_int_id
    for name in ("lora", "hira", "ia3"):
        engine.ask([Ask(support.prompt(5, seed=42), adapters[name])])
    assert number not in engine.manager().list_adapters()
    shutil.rmtree(tmp_path / "mine")
    shutil.rmtree(engine._runner().lora_manager._loader._root / str(number))
    with pytest.raises(flora_vllm.StepError, match="'mine'"):
        engine.ask([mine, other, Ask(other.prompt)])
    assert not engine.llm.llm_engine.has_unfinished_requests()
    for answer, before in zip(engine.ask([other, Ask(other.prompt)]), wanted, strict=True):
        assert support.difference(answer, before) < support.LOGPROB_TOLERANCE
