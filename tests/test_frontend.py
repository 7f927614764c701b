"""Names, identities and error texts, without a server."""

import asyncio
import contextvars
import functools
import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm import write_flora
from flora_vllm.errors import adapter_error
from flora_vllm.plugin import frontend, guard, mix_requests, mixes
from flora_vllm.plugin.access import ScopedRequests
from flora_vllm.plugin.identity import identity, plain_name, split_identity
from flora_vllm.plugin.lent import LENT
from flora_vllm.plugin.refusals import our_message

pytestmark = pytest.mark.filterwarnings("ignore")

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["poems", "team/poems", "a@b", f"odd@{DIGEST}", "multi\nline"])
def test_identity_and_plain_name(name: str) -> None:
    known = identity(name, DIGEST)
    assert split_identity(known) == (name, DIGEST)
    assert plain_name(known) == name
    assert identity(name, "f" * 64) != known


def test_an_identity_has_all_of_the_digest() -> None:
    """A part of it can be made to fit other content."""
    assert identity("a", "0" * 64) != identity("a", "0" * 63 + "1")
    with pytest.raises(AssertionError, match="16 digits"):
        identity("a", "0" * 16)


def test_a_name_without_digest_is_itself() -> None:
    assert split_identity("poems") == ("poems", None)
    assert split_identity("poems@v2") == ("poems@v2", None)


def test_our_message_is_found_in_the_engines_text() -> None:
    """vLLM's worker, executor and core each wrap an error's text in their own."""
    text = str(adapter_error("'p' (dir)", ["first fault", "second fault: 'x'"]))
    wrapped = f"Call to add_lora method failed: Worker failed with error '{text}', please check the stack trace above"
    assert our_message(wrapped) == text
    assert our_message(text) == text


def test_other_errors_are_not_ours() -> None:
    assert our_message("CUDA out of memory") is None


MIX = mixes.Mix((mixes.Part(1.0, f"poems@{DIGEST}", "nowhere"),))


class Asked(SimpleNamespace):
    """A request, to which weak references are possible, as to vLLM's."""


class Engine:
    """As much of vLLM's asynchronous engine as loads and unloads need: what it was asked for, and when it answers."""

    def __init__(self, engines: int = 1) -> None:
        parallel = SimpleNamespace(_api_process_count=1, _api_process_rank=0, data_parallel_size=engines)
        self.vllm_config = SimpleNamespace(additional_config={"flora": {}}, parallel_config=parallel)
        self.calls: list[tuple[str, int]] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self.fault: Exception | None = None
        self.on_remove: Callable[[], Any] = lambda: None

    async def add_lora(self, request: Any) -> bool:
        self.calls.append(("add", request.lora_int_id))
        await self.ready.wait()
        if self.fault is not None:
            raise self.fault
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.calls.append(("remove", lora_id))
        self.on_remove()
        return True

    async def until_asked(self) -> None:
        while not self.calls:
            await asyncio.sleep(0.001)


def models_of(engine: Engine) -> Any:
    """The server's models, as guard.py leaves them."""
    counter = itertools.count(1)
    return SimpleNamespace(
        engine_client=engine,
        lora_requests=ScopedRequests(),
        lora_resolver_lock=guard.Locks(),
        lora_id_counter=SimpleNamespace(inc=lambda _: next(counter)),
        static_lora_modules=[],
        lora_resolvers=[],
    )


async def done(models: Any) -> None:
    while tasks := models.__dict__.get("_flora_tasks"):
        await asyncio.gather(*tasks)


def test_what_a_handler_may_still_ask_with_is_released_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tokens of a beam search, and two turns of a response, the engine knows of no request."""
    monkeypatch.setattr(frontend, "_POLL_S", 0.001)

    async def scenario() -> None:
        models = models_of(engine := Engine())
        await frontend.admit(models, "both", MIX)
        lent = [LENT.lend(models.lora_requests["both"]) for _ in range(2)]
        await frontend.release(models, models.lora_requests.pop("both"))
        for _ in range(2):
            await asyncio.sleep(0.02)
            assert engine.calls == [("add", 1)]
            lent.pop()
        await done(models)
        assert engine.calls == [("add", 1), ("remove", 1)]

    asyncio.run(scenario())


def test_a_load_whose_client_has_gone_is_known_nonetheless() -> None:
    """The engine ends it; whatever nobody here knows of would never be unloaded."""

    async def mix(models: Any) -> None:
        request = Asked(model="base")
        await mix_requests._give(models, request, {"poems": 1.0}, "mix:poems*1.0", MIX, None)

    async def resolve(models: Any) -> None:
        options = frontend.options_of_engine(models.engine_client)
        assert options is not None
        await guard._resolve(functools.partial(frontend.admit, models, content=MIX), models, options, "poems")

    async def scenario(ask: Callable[[Any], Any], name: str) -> None:
        models = models_of(engine := Engine())
        engine.ready.clear()
        asking = asyncio.create_task(ask(models))
        await engine.until_asked()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        engine.ready.set()
        await done(models)
        assert name in models.lora_requests
        assert not name.startswith("mix:") or name in models._flora_mixes

    asyncio.run(scenario(mix, "mix:poems*1.0"))
    asyncio.run(scenario(resolve, "poems"))


def test_a_resolver_finds_in_its_own_directory_whatever_the_clients_root_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = importlib.import_module("vllm.lora.resolver").LoRAResolverRegistry
    monkeypatch.setattr(registry, "resolvers", {})
    monkeypatch.setenv("VLLM_LORA_RESOLVER_CACHE_DIR", str(tmp_path / "found"))
    write_flora(tmp_path / "found" / "poems", {"layers.0.q_proj": (torch.ones(1, 4), torch.ones(4, 1))})
    write_flora(tmp_path / "elsewhere", {"layers.0.q_proj": (torch.ones(1, 4), torch.ones(4, 1))})
    (tmp_path / "found" / "link").symlink_to(tmp_path / "elsewhere")
    frontend._register_resolver()

    async def scenario() -> None:
        models = models_of(engine := Engine())
        engine.vllm_config.additional_config = {"flora": {"adapter_root": str(tmp_path / "root")}}
        models.lora_resolvers, models.model_config = [*registry.resolvers.values()], SimpleNamespace(model="base")
        found = await frontend._resolve_lora(None, models, "poems")
        assert found.lora_path == str(tmp_path / "found" / "poems")
        assert (await frontend._resolve_lora(None, models, "link")).error.code == 404
        # The same path is not a client's to name.
        refused = await asyncio.create_task(asked_by_path(models), context=contextvars.Context())
        assert refused.error.code == 400

    async def asked_by_path(models: Any) -> Any:
        return await frontend.admit(models, "mine", str(tmp_path / "found" / "poems"), None, confined=True)

    asyncio.run(scenario())


def test_a_requests_mix_stays_while_the_request_does() -> None:
    """Its media may be fetched for long before the mix is looked up, while any number of other mixes come."""

    async def ask(models: Any, weight: float) -> Any:
        request = Asked(model="base")
        weights, mix = {"poems": weight}, mixes.Mix((mixes.Part(weight, f"poems@{DIGEST}", "nowhere"),))
        assert await mix_requests._give(models, request, weights, mixes.text_of(weights), mix, None) is None
        return request

    async def scenario() -> None:
        models = models_of(Engine())
        slow = await ask(models, 0.5)
        for number in range(mix_requests.MOST_UNNAMED):
            await ask(models, 1.0 + number)
        assert slow.model in models.lora_requests
        assert len(models._flora_mixes) == mix_requests.MOST_UNNAMED + 1
        name = slow.model
        del slow
        await ask(models, 0.75)
        await done(models)
        assert name not in models.lora_requests
        assert len(models._flora_mixes) == mix_requests.MOST_UNNAMED

    asyncio.run(scenario())


@pytest.mark.parametrize(("engines", "removed"), [(1, []), (2, [("remove", 1)])])
def test_what_one_of_several_engines_refuses_none_keeps(engines: int, removed: list[Any]) -> None:
    async def scenario() -> None:
        models = models_of(engine := Engine(engines))
        engine.fault = RuntimeError(str(adapter_error("both", ["no room"])))
        answer = await frontend.admit(models, "both", MIX)
        assert (answer.error.code, "no room" in answer.error.message) == (400, True)
        assert engine.calls == [("add", 1), *removed]
        engine.fault = None
        # A chooser's choices may be one adapter, which stays.
        assert isinstance(await frontend.admit(models, "tasks?1", MIX, told="tasks"), str)
        engine.fault = RuntimeError("out of memory")
        assert (await frontend.admit(models, "tasks?2", MIX, told="tasks")).error.code == 500
        assert engine.calls[-2:] == [("add", 2), ("add", 2)]

    asyncio.run(scenario())


def test_a_chooser_is_unloaded_whose_choices_go_meanwhile() -> None:
    """Each load of a request's mix makes room, perhaps with one of these."""

    async def check(_: Any) -> None:
        return None

    async def scenario() -> None:
        models = models_of(engine := Engine())
        models._check_unload_lora_adapter_request = check
        for number, name in enumerate(("tasks", "tasks?a", "tasks?b", "tasks?c"), 1):
            models.lora_requests[name] = SimpleNamespace(lora_name=f"{name}@{DIGEST}", lora_int_id=number)
        engine.on_remove = lambda: len(engine.calls) > 1 and models.lora_requests.pop("tasks?b", None)
        await frontend._unload_lora_adapter(None, models, SimpleNamespace(lora_name="tasks"))
        assert engine.calls == [("remove", 1), ("remove", 2), ("remove", 4)]
        assert not models.lora_requests

    asyncio.run(scenario())
