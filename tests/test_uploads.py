"""What becomes of an upload before vLLM hears of it; test_server_surface.py sends some to a server, test_chaos.py fills
a real disk."""

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from flora_vllm.plugin import handed, uploads
from flora_vllm.plugin.access import CURRENT, NOBODY, Tenant
from flora_vllm.plugin.scratch import HANDED, KEPT_UPLOADS

pytestmark = pytest.mark.filterwarnings("ignore")
ACME = Tenant("acme", ("acme/*",), directory="acme")


def upload(name: str = "a", weights: bytes = b"weights") -> tuple[dict[str, Any], bytes]:
    """The ASGI scope and the body of an upload to a server with FLoRA."""
    files = {"config": b"{}", "weights": weights}
    request = httpx.Request("POST", f"http://x{uploads.ROUTE}", data={"lora_name": name}, files=files)
    config = SimpleNamespace(additional_config={"flora": {}})
    state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config))
    scope = {
        "type": "http", "method": "POST", "path": uploads.ROUTE, "app": SimpleNamespace(state=state),
        "headers": [(key.lower(), value) for key, value in request.headers.raw],
    }  # fmt: skip
    return scope, request.read()


async def answer(server: uploads.AdapterUploads, scope: dict[str, Any], body: bytes | None) -> tuple[int, str]:
    """(status, text), without which the app was called. `body`: None if it may not be asked for."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        assert body is not None, "the body was read"
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await server(scope, receive, send)
    return (sent[0]["status"], sent[1]["body"].decode()) if sent else (200, "")


async def refuse_to_load(*_: Any) -> None:
    pytest.fail("there is nothing to load")


def as_tenant(tenant: Tenant, action: Callable[[], Any]) -> Any:
    token = CURRENT.set(tenant)
    try:
        return action()
    finally:
        CURRENT.reset(token)


@pytest.mark.parametrize("size", [10, 2 << 20])  # kept in memory while it arrives, and in a file
def test_no_room_for_an_upload(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    handed._make_root.cache_clear()
    with caplog.at_level(logging.ERROR):
        status, said = asyncio.run(answer(uploads.AdapterUploads(refuse_to_load), *upload(weights=bytes(size))))
    assert status == 400
    assert "cannot keep the adapter's" in said
    assert "No such file or directory" in said
    assert str(tmp_path) not in said
    assert str(tmp_path / "gone") in caplog.text


@pytest.mark.parametrize("tenant", [NOBODY, Tenant("reader", ("*",), may_load=False)])
def test_who_may_not_load_is_told_before_the_body_is_read(tenant: Tenant) -> None:
    scope, _ = upload()
    status, said = as_tenant(tenant, lambda: asyncio.run(answer(uploads.AdapterUploads(refuse_to_load), scope, None)))
    assert status == 403
    assert json.loads(said)["error"]["type"] == "PermissionDeniedError"


@pytest.mark.parametrize(("name", "status"), [("other/a", 403), ("acme/../a", 400), ("acme/\udcff", 400), ("", 400)])
def test_a_name_that_is_not_the_tenants_writes_nothing(name: str, status: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(uploads, "directory_of", lambda *_: pytest.fail("files were kept"))
    scope, body = upload("acme/a")
    body = body.replace(b"acme/a", name.encode("utf-8", "surrogateescape"))
    server = uploads.AdapterUploads(refuse_to_load)
    assert as_tenant(ACME, lambda: asyncio.run(answer(server, scope, body)))[0] == status


def test_a_tenants_upload_is_written_beside_the_loop_and_is_gone_afterwards(monkeypatch: Any) -> None:
    write, threads, seen = handed._write, [], []

    def write_noted(*args: Any) -> None:
        threads.append(threading.current_thread())
        write(*args)

    async def load(scope: Any, receive: Any, send: Any) -> None:
        asked = json.loads((await receive())["body"])
        assert asked["lora_name"] == "acme/a"
        assert handed.is_handed(asked["lora_path"])
        seen.append({path.name: path.read_bytes() for path in Path(asked["lora_path"]).iterdir()})

    monkeypatch.setattr(handed, "_write", write_noted)
    handed._make_root.cache_clear()
    server = uploads.AdapterUploads(load)
    assert as_tenant(ACME, lambda: asyncio.run(answer(server, *upload("acme/a"))))[0] == 200
    assert seen == [{"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}]
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
    assert not [path for path in handed._root().iterdir() if path.is_dir()]


def test_few_uploads_at_a_time_and_others_wait(monkeypatch: Any) -> None:
    monkeypatch.setattr(uploads, "MOST_AT_A_TIME", 2)
    handed._make_root.cache_clear()

    async def scenario() -> None:
        done, loading = asyncio.Event(), 0

        async def load(scope: Any, receive: Any, send: Any) -> None:
            nonlocal loading
            loading += 1
            await done.wait()

        async def until_two_load() -> None:
            while loading < 2:
                await asyncio.sleep(0.001)

        server = uploads.AdapterUploads(load)
        asked = [asyncio.create_task(answer(server, *upload("a", bytes([n])))) for n in range(3)]
        await asyncio.wait_for(until_two_load(), 30)
        monkeypatch.setattr(uploads, "WAIT_S", 0.01)
        status, said = await answer(server, upload()[0], None)
        assert (status, json.loads(said)["error"]["type"]) == (429, "RateLimitError")
        assert loading == 2
        done.set()
        assert [status for status, _ in await asyncio.gather(*asked)] == [200] * 3
        assert loading == 3
        assert (await answer(server, *upload()))[0] == 200

    asyncio.run(scenario())


def test_who_found_no_place_is_told_when_to_ask_again() -> None:
    """Clients that ask again by themselves would come at once, and wait as long."""
    assert uploads._refuse(uploads.BusyError("busy")).headers["Retry-After"] == "60"
    assert "Retry-After" not in uploads._refuse(uploads.TooLargeError("large")).headers


def test_an_upload_that_does_not_arrive_gives_its_place_back(monkeypatch: Any) -> None:
    monkeypatch.setattr(uploads, "ARRIVAL_S", 0.01)

    async def scenario() -> None:
        server = uploads.AdapterUploads(refuse_to_load)
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await server(upload()[0], asyncio.Event().wait, send)
        assert sent[0]["status"] == 408
        assert server._places._value == uploads.MOST_AT_A_TIME

    asyncio.run(scenario())


def test_a_client_that_leaves_while_it_uploads_gives_its_place_back() -> None:
    async def scenario() -> None:
        server = uploads.AdapterUploads(refuse_to_load)
        scope, body = upload()
        messages = [{"type": "http.request", "body": body[:40], "more_body": True}, {"type": "http.disconnect"}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await server(scope, receive, send)
        assert sent[0]["status"] == 400
        assert server._places._value == uploads.MOST_AT_A_TIME

    asyncio.run(scenario())


def test_threads_that_keep_one_content_share_its_directory() -> None:
    handed._make_root.cache_clear()
    ready = threading.Barrier(8)

    def keep(_: int) -> set[str]:
        found = set()
        for _ in range(20):
            ready.wait(30)
            with handed.directory_of(b"{}", b"weights") as path:
                assert (Path(path) / "adapter_model.safetensors").read_bytes() == b"weights"
                found.add(path)
        return found

    with ThreadPoolExecutor(8) as threads:
        paths = set.union(*threads.map(keep, range(8)))
    assert len(paths) == 1
    assert not handed._users
    assert not [path for path in handed._root().iterdir() if path.is_dir()]


def test_only_the_directories_that_are_made_pass_for_handed_over() -> None:
    """Others' paths are confined to their root."""
    with handed.directory_of(b"{}", b"weights") as path:
        root, name = Path(path).parent, Path(path).name
        assert handed.is_handed(path)
        assert handed.is_handed(f"{path}/")
        for other in (f"{root}/..", f"{root}/.", str(root), f"{root}/../{name}", f"{path}/..", f"{root}/{name}0"):
            assert not handed.is_handed(other), other
        assert not handed.is_handed(f"/{root.name}/{name}")


def test_a_supervisors_server_keeps_what_was_handed_over(tmp_path: Path, monkeypatch: Any) -> None:
    """So that it can be loaded again; the supervisor removes it (test_serve_command.py)."""
    kept = tmp_path / f"{HANDED}kept"
    kept.mkdir()
    monkeypatch.setenv(KEPT_UPLOADS, str(kept))
    handed._make_root.cache_clear()
    try:
        for _ in range(2):
            with handed.directory_of(b"{}", b"weights") as path:
                assert handed.is_handed(path)
                assert time.time() - Path(path).stat().st_mtime < 60
            assert (Path(path) / "adapter_model.safetensors").read_bytes() == b"weights"
            assert list(kept.iterdir()) == [Path(path)]
            os.utime(path, (0, 0))
    finally:
        handed._make_root.cache_clear()
