"""With an ACL no tenant names an image, audio or video by an id of its choice: vLLM would give it another's."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from flora_vllm.plugin.access import CURRENT, OPERATOR, Tenant
from flora_vllm.plugin.media_ids import TenantsMedia

ACME = Tenant("acme")
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
JSON = ("content-type", "application/json")
FORM = ("content-type", "multipart/form-data; boundary=x")


def chat(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}, {"role": "user", "content": [*parts]}]}


def post(body: bytes, tenant: Tenant = ACME, *headers: tuple[str, str]) -> httpx.Response:
    app = FastAPI()

    @app.post("/v1/x")
    async def echo(request: Request) -> Any:
        return {"length": len(await request.body())}

    app.add_middleware(TenantsMedia)

    async def ask() -> httpx.Response:
        CURRENT.set(tenant)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/v1/x", content=body, headers=[*headers] or [JSON])

    return asyncio.run(ask())


NAMED = [
    chat({**IMAGE, "uuid": "logo"}),
    chat(IMAGE, {"image_url": None, "uuid": "logo"}),
    chat({"type": "input_audio", "uuid": 1}),
    chat({"video_embeds": None, "uuid": "logo"}),
    {"token_ids": [1], "content_parts": [{"type": "image_url", "url": "data:,", "uuid": "logo"}]},
    {"data_1": "x", "data_2": {"content": [{**IMAGE, "uuid": "logo"}]}},
]
HASHED = {"token_ids": [1], "features": {"mm_hashes": {"image": ["ab"]}, "mm_placeholders": {}}}


@pytest.mark.parametrize("body", NAMED)
def test_a_uuid_of_media_is_the_operators(body: dict[str, Any]) -> None:
    text = json.dumps(body)
    for sent in (
        text.encode(),
        text.replace("uuid", "\\u0075uid").encode(),
        text.encode("utf-16"),
        text.encode("utf-32"),
    ):
        refused = post(sent)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "uuid"
        assert "leave it out" in refused.json()["error"]["message"]
        assert post(sent, OPERATOR).json() == {"length": len(sent)}


def test_hashes_of_media_are_the_operators() -> None:
    refused = post(json.dumps(HASHED).encode())
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mm_hashes")
    assert post(json.dumps(HASHED).encode(), OPERATOR).status_code == 200


def test_what_cannot_be_looked_at_is_refused() -> None:
    assert post(b'{"uuid": ' + b"[" * 100_000).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        chat(IMAGE),
        chat({**IMAGE, "uuid": None}),
        {**chat(IMAGE), "documents": [{"uuid": "7", "text": "a document"}]},
        {**chat(IMAGE), "tools": [{"parameters": {"properties": {"uuid": {}, "image_url": {}}}}]},
        {**chat(IMAGE), "uuid": "7"},
        ["uuid"],
    ],
)  # fmt: skip
def test_everything_else_arrives_whole(body: Any) -> None:
    sent = json.dumps(body).encode()
    assert post(sent).json() == {"length": len(sent)}
    assert post(b"uuid", ACME).json() == {"length": 4}


def test_files_are_not_looked_at_and_nothing_else_passes_for_one() -> None:
    sent = json.dumps(NAMED[0]).encode()
    assert post(sent, ACME, FORM).status_code == 200
    assert post(sent, ACME, JSON, FORM).status_code == post(sent, ACME, FORM, JSON).status_code == 400
