"""What the server's request handlers are lent, and what an engine makes of it."""

import asyncio
import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.plugin import lent, preload
from flora_vllm.plugin.identity import identity
from flora_vllm.plugin.lent import LENT, is_lent

pytestmark = pytest.mark.filterwarnings("ignore")

KNOWN = identity("poems", "0" * 64)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    kind = importlib.import_module("vllm.entrypoints.serve.engine.serving").BaseServing
    monkeypatch.setattr(kind, "_maybe_get_adapters", kind._maybe_get_adapters)
    lent.install()
    return kind


def _request(name: str = KNOWN, path: str = "nowhere") -> Any:
    return importlib.import_module("vllm.lora.request").LoRARequest(name, 7, path)


@pytest.mark.parametrize("config", [{"flora": {}}, {}])
def test_handlers_are_lent_what_they_look_up(serving: Any, config: dict[str, Any]) -> None:
    handler, table = object.__new__(serving), {"poems": _request(), "live": _request("live")}
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=config))
    handler.models = SimpleNamespace(lora_requests=table, engine_client=engine, is_base_model=lambda name: name == "b")
    assert handler._maybe_get_adapters(SimpleNamespace(model="b")) is None
    assert handler._maybe_get_adapters(SimpleNamespace(model="live")) is table["live"], "a trainer's own"
    first, second = (handler._maybe_get_adapters(SimpleNamespace(model="poems")) for _ in range(2))
    for found in (first, second):
        assert (found.lora_name, found.lora_int_id, found.lora_path) == (KNOWN, 7, "nowhere")
        assert is_lent(found) == bool(config)
    assert len(LENT.requests()) == 2 * len(config)
    del found, first
    assert len(LENT.requests()) == len(config)
    del second
    assert not LENT.requests()


class _Engine:
    """Keeps what it is told, as vLLM's asynchronous engine would pass it on, or refuses it."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.vllm_config = SimpleNamespace(additional_config={"flora": {}})
        self.heard: list[Any] = []
        self._fault = fault

    async def add_request(self, request_id: str, prompt: Any, params: Any, lora_request: Any) -> None:
        self.heard.append(lora_request)

    async def add_lora(self, lora_request: Any) -> bool:
        self.heard.append(lora_request)
        if self._fault is not None:
            raise self._fault
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return True


def test_what_was_lent_is_loaded_as_nothing_else() -> None:
    """Whatever is at its path by now, the worker is asked for the content that the server had named."""
    wrapped = type("Wrapped", (_Engine,), {})
    preload._wrap_async(wrapped)
    engine: Any = wrapped()
    asyncio.run(engine.add_request("r", "prompt", None, lora_request=LENT.lend(_request())))
    assert [(request.lora_name, request.lora_int_id) for request in engine.heard] == [(KNOWN, 7)] * 2
    assert not any(map(is_lent, engine.heard)), "other processes know vLLM's own class only"
    refusing: Any = wrapped(RuntimeError(str(adapter_error("'poems' (/srv/poems)", ["it has changed"]))))
    with pytest.raises(AdapterError, match=r"'poems' \(<path>\) cannot be served"):
        asyncio.run(refusing.add_request("r", "prompt", None, lora_request=LENT.lend(_request(path="/srv/poems"))))
