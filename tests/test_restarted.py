"""What a server that is started again does about adapters that it cannot load; test_chaos.py restarts a real one."""

import asyncio
import hashlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.errors import AdapterError
from flora_vllm.formats import resolve_under
from flora_vllm.plugin import restarted
from flora_vllm.plugin.access import is_operators, root_of_request
from flora_vllm.plugin.options import options_of_engine

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own table of models, whose adapters `b` and `d` are refused."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels, create_error_response

    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        assert [module.name for module in self.static_lora_modules] == [request.lora_name] or not self.by_supervisor
        options = options_of_engine(self.engine_client)
        is_own = is_operators(self.static_lora_modules, request.lora_name, request.lora_path)
        if options is not None and options.adapter_root is not None and not is_own:  # as frontend.py
            try:
                resolve_under(root_of_request(options.adapter_root) or "", request.lora_path.removeprefix("dlp:"))
            except AdapterError as error:
                return create_error_response(message=str(error))
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
    monkeypatch.setenv(restarted.RESTARTED, "{}")
    models.by_supervisor = True
    asyncio.run(models.init_static_loras())
    assert list(models.lora_requests) == ["a", "c"]
    assert [module.name for module in models.static_lora_modules] == ["a", "c"]
    assert [record.message for record in caplog.records if record.name == restarted.__name__] == [
        f"adapter {name!r} cannot be loaded again; serving without it: it has changed" for name in "bd"
    ]


def test_without_flora_it_is_vllms(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(restarted.RESTARTED, "{}")
    models.engine_client.vllm_config.additional_config = {}
    with pytest.raises(ValueError, match="it has changed"):
        asyncio.run(models.init_static_loras())


@pytest.fixture
def world(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with the directories of two tenants and what links have been put there since; all of it was loaded."""
    root = tmp_path / "root"
    for place in ("acme/good", "acme/inner", "other/theirs", "shared"):
        (root / place).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "acme" / "away").symlink_to(tmp_path / "outside")
    (root / "acme" / "across").symlink_to(root / "other" / "theirs")
    (root / "acme" / "within").symlink_to(root / "acme" / "inner")
    (root / "own").symlink_to(tmp_path / "outside")
    (root / "acme" / "chooser").symlink_to(tmp_path / "outside")
    key = hashlib.sha256(b"key").hexdigest()
    tenants = [{"name": n, "key_sha256": [key[::s]], "adapters": ["*"], "may_load": True, "directory": n}
               for n, s in (("acme", 1), ("other", -1))]  # fmt: skip
    (tmp_path / "acl").write_text(json.dumps({"tenants": tenants}))
    options = {"adapter_root": str(root), "adapter_acl": str(tmp_path / "acl")}
    models.engine_client.vllm_config.additional_config = {"flora": options}
    paths = {
        "good": root / "acme/good", "away": root / "acme/away", "across": root / "acme/across",
        "within": root / "acme/within", "shared": root / "shared", "own": root / "own", "hub": tmp_path / "outside",
        "stolen": root / "own", "chooser": f"dlp:{root}/acme/chooser",
    }  # fmt: skip
    models.static_lora_modules = [
        SimpleNamespace(name=name, path=str(path), is_3d_lora_weight=False, base_model_name=None)
        for name, path in paths.items()
    ]
    models.by_supervisor = True
    monkeypatch.setenv(restarted.RESTARTED, json.dumps({"own": str(root / "own"), "stolen": str(root / "stolen")}))
    return root


def test_what_a_request_loaded_is_read_as_strictly_as_the_first_time(models: Any, world: Path, caplog: Any) -> None:
    asyncio.run(models.init_static_loras())
    # Elsewhere than below the root nobody but the operator could have loaded, and `own` is where its command says.
    assert list(models.lora_requests) == ["good", "within", "shared", "own", "hub"]
    refused = [record.message for record in caplog.records if record.name == restarted.__name__]
    assert [message.split("'")[1] for message in refused] == ["away", "across", "stolen", "chooser"]
    assert all("does not lead to a directory below the adapter root" in message for message in refused)
    # A request that names it again is confined, too.
    assert [module.name for module in models.static_lora_modules] == ["own", "hub"]
