"""Loads hold up no step: while an adapter is read, everybody else's tokens come, and nobody's are other tokens.

A real asynchronous engine whose workers read slowly when they are told to (slow_worker.py).
"""

import asyncio
import itertools
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import engine_support as support
import peft
import pytest
from engine_support import Answer

from flora_vllm.errors import StepError

pytestmark = support.ENGINE_MARKS

SLOW_S = 1.5
BESIDE = "flora-loads"
NAMES = ("flora-1", "lora", "flora-8", "ia3", "hira")


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    dora = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "o_proj", "down_proj"])
    support.save_peft_adapter(tiny_model("llama"), folder / "dora", dora, 11)
    return support.write_every_family(tiny_model("llama"), folder) | {"dora": folder / "dora"}


class Running:
    """An asynchronous engine, two slots and three places in host memory."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._requests = itertools.count()

    def request(self, name: str, path: Path) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, abs(hash(name)) % 10_000 + 1, str(path))

    async def tokens(self, adapter: Any = None, count: int = 8) -> AsyncIterator[Any]:
        """vLLM's outputs, one a token."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=count, logprobs=5, detokenize=False, ignore_eos=True,
            output_kind=RequestOutputKind.CUMULATIVE,
        )  # fmt: skip
        prompt = {"prompt_token_ids": list(support.prompt(20, seed=3))}
        async for output in self.engine.generate(prompt, sampling, f"r{next(self._requests)}", lora_request=adapter):
            yield output

    async def ask(self, adapter: Any = None) -> Answer:
        last = None
        async for output in self.tokens(adapter):
            last = output
        assert last is not None
        return support._answer(last.outputs[0])

    async def alone(self, adapters: Mapping[str, Path]) -> dict[str | None, Answer]:
        """The answer without adapter, and each adapter's, one request after another."""
        found: dict[str | None, Answer] = {None: await self.ask()}
        for name in (*NAMES, "dora"):
            found[name] = await self.ask(self.request(f"alone-{name}", adapters[name]))
        assert not any(same(one, other) for one, other in itertools.combinations(found.values(), 2))
        return found

    async def slow(self, seconds: float) -> None:
        await self.engine.collective_rpc("slow_reads", args=(seconds,))
        await self.readers()

    async def readers(self) -> set[str]:
        """Of all ranks: the threads that have read adapters."""
        found = await self.engine.collective_rpc("readers")
        return {name.rpartition("_")[0] or name for of_rank in found for name in of_rank}

    async def longest_gap(self, work: Awaitable[Any]) -> tuple[float, int, Any]:
        """Seconds between the tokens of a request without adapter while `work` runs, tokens, and what `work` gave."""
        task: asyncio.Future | None = None
        times: list[float] = []
        while task is None or not task.done():
            async for _ in self.tokens(count=200):
                task = asyncio.ensure_future(work) if task is None else task
                times.append(time.monotonic())
                if task.done():
                    break
        assert task is not None
        return max(after - before for before, after in itertools.pairwise(times)), len(times) - 1, await task


@asynccontextmanager
async def running(model: Path, **options: Any) -> AsyncIterator[Running]:
    with mock.patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 64 << 20,
            "skip_tokenizer_init": True,
            "max_num_seqs": 16,
            "enable_lora": True,
            "max_loras": 2,
            "max_cpu_loras": 3,
            "additional_config": {"flora": {}},
            "worker_extension_cls": "slow_worker.SlowReads",
        }
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **(settings | options)))
        try:
            yield Running(engine)
        finally:
            engine.shutdown()


@pytest.fixture(scope="module")
def alone() -> dict[str | None, Answer]:
    """Filled by `served`."""
    return {}


@pytest.fixture(scope="module")
def served(tiny_model, adapters, alone) -> Iterator[Callable[[Callable[[Running], Coroutine]], None]]:
    """Runs a test's coroutine with the module's one engine."""
    loop = asyncio.new_event_loop()
    context = running(tiny_model("llama"))
    engine = loop.run_until_complete(context.__aenter__())
    alone |= loop.run_until_complete(engine.alone(adapters))
    yield lambda test: loop.run_until_complete(asyncio.wait_for(test(engine), 120))
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


def _cause(error: Any) -> Any:
    """What vLLM's "the request failed" is about."""
    return error.__cause__ or error


def same(answer: Answer, wanted: Answer) -> bool:
    return answer.tokens == wanted.tokens and support.difference(answer, wanted) < support.LOGPROB_TOLERANCE


def test_tokens_come_while_an_adapter_is_read(served, adapters, alone):
    async def test(engine: Running) -> None:
        await engine.slow(SLOW_S)
        request = engine.request("slow", adapters["lora"])
        gap, tokens, answer = await engine.longest_gap(engine.ask(request))
        assert gap < SLOW_S
        assert tokens > 10
        assert same(answer, alone["lora"])
        assert await engine.readers() == {BESIDE}
        await engine.slow(0)

    served(test)


def test_an_evicted_adapter_comes_back_while_others_go_on(served, adapters, alone):
    async def test(engine: Running) -> None:
        requests = {name: engine.request(f"evicted-{name}", adapters[name]) for name in NAMES}
        for request in requests.values():  # three places: the first two make room
            await engine.engine.add_lora(request)
        await engine.slow(SLOW_S)
        gap, tokens, answer = await engine.longest_gap(engine.ask(requests["flora-1"]))
        assert gap < SLOW_S
        assert tokens > 10
        assert same(answer, alone["flora-1"])
        assert await engine.readers() == {BESIDE}
        await engine.slow(0)

    served(test)


def test_more_adapters_than_places_all_at_once(served, adapters, alone):
    """Whose turn it is changes all the time; whose weights, never."""

    async def test(engine: Running) -> None:
        requests = {None: None} | {name: engine.request(f"many-{name}", adapters[name]) for name in NAMES}
        names = [*requests] * 3
        answers = await asyncio.gather(*(engine.ask(requests[name]) for name in names))
        assert [name for name, answer in zip(names, answers, strict=True) if not same(answer, alone[name])] == []
        assert await engine.readers() <= {BESIDE}

    served(test)


def test_a_refusal_at_first_use_fails_alone(served, adapters, alone, tmp_path):
    shutil.copytree(adapters["lora"], tmp_path / "faulty")
    (tmp_path / "faulty" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "no_such_key": 1}')

    async def test(engine: Running) -> None:
        await engine.slow(0.1)
        good = engine.request("good", adapters["hira"])
        answers = await asyncio.gather(
            engine.ask(), engine.ask(engine.request("faulty", tmp_path / "faulty")), engine.ask(good),
            return_exceptions=True,
        )  # fmt: skip
        assert same(answers[0], alone[None])
        assert "'faulty'" in str(_cause(answers[1]))
        assert "no_such_key" in str(_cause(answers[1]))
        assert same(answers[2], alone["hira"])
        await engine.slow(0)

    served(test)


def test_unloaded_while_it_is_loaded(served, adapters, alone):
    async def test(engine: Running) -> None:
        await engine.slow(SLOW_S)
        request = engine.request("short-lived", adapters["ia3"])
        load = asyncio.ensure_future(engine.engine.add_lora(request))
        await asyncio.sleep(SLOW_S / 3)
        assert await engine.engine.remove_lora(request.lora_int_id)
        assert same(await engine.ask(), alone[None])
        await asyncio.wait_for(load, 10)
        assert request.lora_int_id not in await engine.engine.list_loras()
        await engine.slow(0)
        assert same(await engine.ask(request), alone["ia3"])

    served(test)


def test_a_copy_that_is_gone_fails_its_requests_alone(served, adapters, alone, tmp_path):
    shutil.copytree(adapters["flora-8"], tmp_path / "gone")

    async def test(engine: Running) -> None:
        gone, others = engine.request("gone", tmp_path / "gone"), NAMES[:3]
        await engine.engine.add_lora(gone)
        shutil.rmtree(tmp_path / "gone")
        for name in others:
            await engine.engine.add_lora(engine.request(f"later-{name}", adapters[name]))
        await engine.engine.collective_rpc("lose_copies")
        shown = engine.request("later-lora", adapters["lora"])
        answers = await asyncio.gather(engine.ask(gone), engine.ask(), engine.ask(shown), return_exceptions=True)
        assert isinstance(_cause(answers[0]), StepError)
        assert same(answers[1], alone[None])
        assert same(answers[2], alone["lora"])

    served(test)


def test_no_memory_to_bring_an_adapter_back_fails_its_requests_alone(served, adapters, alone):
    async def test(engine: Running) -> None:
        names = ("ia3", "flora-1", "lora", "flora-8")
        requests = {name: engine.request(f"short-{name}", adapters[name]) for name in names}
        for request in requests.values():  # one more than there are places
            await engine.engine.add_lora(request)
        await engine.engine.collective_rpc("fail_reads", args=([0],))
        try:
            asked = (engine.ask(requests["ia3"]), engine.ask(), engine.ask(requests["flora-8"]))
            answers = await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await engine.engine.collective_rpc("fail_reads", args=([],))
        assert isinstance(_cause(answers[0]), StepError)
        assert same(answers[1], alone[None])
        assert same(answers[2], alone["flora-8"])
        assert same(await engine.ask(requests["ia3"]), alone["ia3"])

    served(test)


@pytest.mark.slow
def test_two_ranks_load_beside_their_steps(tiny_model, adapters):
    async def test() -> None:
        async with running(tiny_model("llama"), tensor_parallel_size=2) as engine:
            alone = await engine.alone(adapters)
            await engine.slow(SLOW_S)
            gap, tokens, answer = await engine.longest_gap(engine.ask(engine.request("slow", adapters["lora"])))
            assert gap < SLOW_S
            assert tokens > 5
            assert same(answer, alone["lora"])
            assert await engine.readers() == {BESIDE}
            await engine.slow(0)
            # One rank has no memory for it: none waits for the other.
            for rank in (0, 1):
                short = engine.request(f"short-{rank}", adapters["lora"])
                await engine.engine.collective_rpc("fail_reads", args=([rank],))
                with pytest.raises(Exception, match=r"another rank of this engine|of a test"):
                    await asyncio.wait_for(engine.engine.add_lora(short), 60)
                await engine.engine.collective_rpc("fail_reads", args=([],))
                assert same(await engine.ask(short), alone["lora"])
            # DoRA asks the base, of which each rank has a part: between steps.
            names = [*NAMES, "dora", None, "lora", "flora-8"]
            requests = {name: None if name is None else engine.request(f"two-{name}", adapters[name]) for name in names}
            answers = await asyncio.gather(*(engine.ask(requests[name]) for name in names))
            assert [name for name, found in zip(names, answers, strict=True) if not same(found, alone[name])] == []

    asyncio.run(test())
