"""Responses that vLLM's own handler of /v1/responses keeps are each tenant's own."""

import asyncio
import importlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.plugin import stored_responses
from flora_vllm.plugin.access import CURRENT, OPERATOR, Tenant, TenantTable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ACME, OTHER = Tenant("acme"), Tenant("other")


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    kind = importlib.import_module("vllm.entrypoints.openai.responses.serving").OpenAIServingResponses
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    monkeypatch.setattr(kind, "__init__", kind.__init__)
    stored_responses.install()
    return kind


def handler_of(serving: Any, options: dict[str, Any]) -> Any:
    config = SimpleNamespace(
        model="base", hf_config=SimpleNamespace(model_type="llama"), get_diff_sampling_param=dict,
        generation_config="auto", max_model_len=64,
    )  # fmt: skip
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config={"flora": options}), model_config=config,
        renderer=SimpleNamespace(tokenizer=None), input_processor=None,
    )  # fmt: skip
    models = SimpleNamespace(engine_client=engine, lora_requests={}, is_base_model=lambda name: True)
    renderer = SimpleNamespace(validate_chat_template=lambda **_: None, trust_request_chat_template=False)
    made = serving(
        engine, models, renderer, request_logger=None, chat_template=None, chat_template_content_format="auto"
    )
    made._preflight = lambda: None
    return made


async def as_tenant(tenant: Tenant, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """A request of the tenant's, in a context of its own as a server's is."""

    async def asked() -> Any:
        CURRENT.set(tenant)
        return await work()

    return await asyncio.create_task(asked())


def test_a_response_is_its_tenants(serving: Any, tmp_path: Path) -> None:
    protocol = importlib.import_module("vllm.entrypoints.openai.responses.protocol")
    unknown = importlib.import_module("vllm.exceptions").VLLMValidationError
    kept = SimpleNamespace(id="r", status="queued", output=[])

    async def scenario() -> None:
        handler = handler_of(serving, {"adapter_acl": str(tmp_path / "acl")})

        async def keep() -> None:
            handler.response_store["r"] = kept
            handler.event_store["r"] = ("deque", "event")
            handler.background_tasks["r"] = task = asyncio.create_task(asyncio.sleep(60))
            task.add_done_callback(lambda _: handler.background_tasks.pop("r", None))

        async def follow() -> Any:
            return [event async for event in handler.responses_background_stream_generator("r")]

        async def go_on() -> Any:
            request = protocol.ResponsesRequest(model="base", input="more", previous_response_id="r")
            return await handler.create_responses(request)

        await as_tenant(ACME, keep)
        for stranger in (OTHER, OPERATOR, Tenant("operator")):
            for work in (
                lambda: handler.retrieve_responses("r", None, False), lambda: handler.cancel_responses("r"), go_on
            ):  # fmt: skip
                assert (await as_tenant(stranger, work)).error.code == 404
            with pytest.raises(unknown, match="Unknown response_id"):
                await as_tenant(stranger, follow)
        assert kept.status == "queued"
        assert await as_tenant(ACME, lambda: handler.retrieve_responses("r", None, False)) is kept
        assert await as_tenant(ACME, lambda: handler.cancel_responses("r")) is kept
        assert kept.status == "cancelled"
        assert await as_tenant(ACME, lambda: asyncio.sleep(0, len(handler.background_tasks))) == 0

    asyncio.run(scenario())


def test_without_an_acl_the_tables_are_vllms(serving: Any) -> None:
    handler = handler_of(serving, {})
    assert {type(getattr(handler, name)) for name in stored_responses.TABLES} == {dict}


def test_one_id_of_two_tenants_is_two_entries() -> None:
    table, seen = TenantTable(), []
    for tenant in (ACME, OTHER, OPERATOR, Tenant("operator", may_load=False)):
        token = CURRENT.set(tenant)
        try:
            assert "r" not in table
            table["r"] = tenant
        finally:
            CURRENT.reset(token)
    for tenant in (ACME, OTHER):
        token = CURRENT.set(tenant)
        try:
            seen.append((table["r"], list(table), len(table), table.pop("r"), table.get("r")))
        finally:
            CURRENT.reset(token)
    assert seen == [(tenant, ["r"], 1, tenant, None) for tenant in (ACME, OTHER)]
