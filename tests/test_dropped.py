"""No route answers a request for a mix with the base model: where vLLM would drop the field, it is refused."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from flora_vllm.plugin import mix_requests
from flora_vllm.plugin.dropped import DroppedField

MIX = {"mix": {"a": 1.0}}


def _post(route: str, body: bytes) -> httpx.Response:
    app = FastAPI()

    @app.post(route)
    async def echo(request: Request) -> Any:
        return {"length": len(await request.body())}

    app.add_middleware(DroppedField)

    async def post() -> httpx.Response:
        async def chunks() -> Any:
            for start in range(0, len(body), 1000):
                yield body[start : start + 1000]

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(route, content=chunks(), headers={"content-type": "application/json"})

    return asyncio.run(post())


@pytest.mark.parametrize(
    "route",
    [
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/cohere/v2/chat",
        "/v2/embed",
        "/inference/v1/generate",
        "/v1/chat/completions/derender",
        "/v1/completions/derender",
    ],
)
def test_the_field_is_refused_where_it_would_be_lost(route: str) -> None:
    answer = _post(route, json.dumps({"model": "base", "text": "x" * 5000, "flora": MIX}).encode())
    assert answer.status_code == 400
    assert f'{route} takes no "flora"' in answer.json()["error"]["message"]
    assert _post(route, b'{"\\u0066lora": 1}').status_code == 400, "the same key to JSON"
    for encoding in ("utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"):
        assert _post(route, '{"flora": 1}'.encode(encoding)).status_code == 400, encoding


@pytest.mark.parametrize(
    "body", [b'{"text": "flora"}', b'{"a": {"flora": 1}}', b"flora", b'["flora"]', b"", b"x" * 5000]
)
def test_everything_else_arrives_whole(body: bytes) -> None:
    assert _post("/v1/messages", body).json() == {"length": len(body)}


def test_routes_that_keep_the_field_get_it() -> None:
    assert _post("/v1/completions", b'{"flora": 1}').status_code == 200


def test_a_server_that_only_renders_says_so() -> None:
    serving = SimpleNamespace(models=SimpleNamespace())
    refused = asyncio.run(mix_requests.choose(serving, SimpleNamespace(model_extra={"flora": MIX}, model="base")))
    assert (refused.error.code, "no engine" in refused.error.message) == (400, True)
    assert asyncio.run(mix_requests.choose(serving, SimpleNamespace(model_extra={}, model="base"))) is None
