"""What a server that is started again does about adapters that it cannot load; test_chaos.py restarts a real one."""

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.plugin import restarted

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own table of models, whose adapters `b` and `d` are refused."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels, create_error_response

    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        assert [module.name for module in self.static_lora_modules] == [request.lora_name] or not self.by_supervisor
        if request.lora_name in "bd":
            return create_error_response(message="it has changed")
        self.lora_requests[request.lora_name] = request
        return "loaded"

    # Another test of this process may have installed everything.
    own = inspect.unwrap(OpenAIServingModels.init_static_loras)
    monkeypatch.setattr(OpenAIServingModels, "init_static_loras", own)
    monkeypatch.setattr(OpenAIServingModels, "load_lora_adapter", load)
    restarted.install()
    made: Any = object.__new__(OpenAIServingModels)
    made.lora_requests, made.by_supervisor = {}, False
    config = SimpleNamespace(additional_config={"flora": {}})
    made.engine_client = SimpleNamespace(vllm_config=config)
    made.static_lora_modules = [
        SimpleNamespace(name=name, path=f"/{name}", is_3d_lora_weight=False, base_model_name=None) for name in "abcd"
    ]
    return made


def test_a_person_is_told_of_the_first_fault(models: Any) -> None:
    with pytest.raises(ValueError, match="it has changed"):
        asyncio.run(models.init_static_loras())


def test_after_a_restart_the_others_are_served(models: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv(restarted.RESTARTED, "1")
    models.by_supervisor = True
    asyncio.run(models.init_static_loras())
    assert list(models.lora_requests) == ["a", "c"]
    assert [module.name for module in models.static_lora_modules] == ["a", "c"]
    assert [record.message for record in caplog.records if record.name == restarted.__name__] == [
        f"adapter {name!r} cannot be loaded again; serving without it: it has changed" for name in "bd"
    ]


def test_without_flora_it_is_vllms(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(restarted.RESTARTED, "1")
    models.engine_client.vllm_config.additional_config = {}
    with pytest.raises(ValueError, match="it has changed"):
        asyncio.run(models.init_static_loras())
