"""An upload for which there is no room is refused in one line; test_chaos.py fills a real disk."""

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from flora_vllm.plugin import handed, uploads

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("size", [10, 2 << 20])  # kept in memory while it arrives, and in a file
def test_no_room_for_an_upload(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    handed._root.cache_clear()
    files = {"config": b"{}", "weights": bytes(size)}
    request = httpx.Request("POST", f"http://x{uploads.ROUTE}", data={"lora_name": "a"}, files=files)
    body, sent = request.read(), []
    config = SimpleNamespace(additional_config={"flora": {}})
    state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config))
    scope = {
        "type": "http", "method": "POST", "path": uploads.ROUTE, "app": SimpleNamespace(state=state),
        "headers": [(key.lower(), value) for key, value in request.headers.raw],
    }  # fmt: skip

    async def app(*_: Any) -> None:
        pytest.fail("nothing was kept that it could load")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    with caplog.at_level(logging.ERROR):
        asyncio.run(uploads.AdapterUploads(app)(scope, receive, send))
    assert sent[0]["status"] == 400
    said = sent[1]["body"].decode()
    assert "cannot keep the adapter's" in said
    assert "No such file or directory" in said
    assert str(tmp_path) not in said
    assert str(tmp_path / "gone") in caplog.text
