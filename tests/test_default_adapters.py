"""The adapters of `--default-mm-loras`, looked up by vLLM's own handler."""

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.plugin import default_adapters
from flora_vllm.plugin.access import CURRENT, ScopedRequests, Tenant
from flora_vllm.plugin.identity import identity

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def serving() -> Iterator[Any]:
    kind = importlib.import_module("vllm.entrypoints.serve.engine.serving").BaseServing
    before = kind._get_active_default_mm_loras
    default_adapters.install()
    yield kind
    kind._get_active_default_mm_loras = before


def answered_by(serving: Any, additional_config: dict[str, Any], names: dict[str, str], *kinds: str) -> str | None:
    """The engine's name of the adapter that a request to the base model with such content gets; `names`: by table's."""
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    table = {name: lora_request(known, number, "dir") for number, (name, known) in enumerate(names.items(), 1)}
    handler = object.__new__(serving)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional_config))
    handler.models = SimpleNamespace(
        lora_requests=ScopedRequests(table), engine_client=engine, is_base_model=lambda name: name == "base"
    )
    content = [{"type": kind} for kind in kinds]
    request = SimpleNamespace(model="base", messages=[{"role": "user", "content": content}])
    found = handler._maybe_get_adapters(request, supports_default_mm_loras=True)
    return None if found is None else found.lora_name


def test_a_request_with_audio_is_answered_by_the_default_adapter(serving: Any) -> None:
    names = {name: identity(name, "0" * 64) for name in ("audio", "image", "poems")}
    flora: dict[str, Any] = {"flora": {}}
    assert answered_by(serving, flora, names, "text", "audio_url") == names["audio"]
    assert answered_by(serving, flora, names, "text", "image_url") == names["image"]
    assert answered_by(serving, flora, names, "text") is None
    assert answered_by(serving, flora, names, "audio_url", "image_url") is None, "as in vLLM: one or none"
    assert answered_by(serving, {}, {"audio": "audio"}, "audio_url") == "audio", "without FLoRA"


def test_a_tenant_gets_those_that_are_its_own(serving: Any) -> None:
    names = {"audio": identity("audio", "0" * 64)}
    token = CURRENT.set(Tenant("acme", ("acme/*",)))
    try:
        assert answered_by(serving, {"flora": {}}, names, "audio_url") is None
    finally:
        CURRENT.reset(token)
