"""Adapters of the command line load beside one another, and yet have the ids that its order gives them."""

import asyncio
import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.plugin import at_start


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    importlib.import_module("vllm.entrypoints.serve.lora.protocol")  # takes longer than any load here


class Server:
    """Loads the later ones of a group sooner, and gives ids as frontend.py does."""

    def __init__(self, *paths: str, refused: str = "") -> None:
        self.static_lora_modules = [SimpleNamespace(name=p, path=p, base_model_name="base") for p in paths]
        self.refused = refused
        self.given: list[str] = []
        self.finished: list[str] = []
        self.running = self.most = 0

    async def load_lora_adapter(self, request: Any, base_model_name: str) -> Any:
        assert base_model_name == "base"
        self.running += 1
        self.most = max(self.most, self.running)
        started = self.running
        for _ in range(3 * (at_start.AT_ONCE - started)):
            await asyncio.sleep(0)
        try:
            if request.lora_path == self.refused:
                return SimpleNamespace(error=SimpleNamespace(message=f"{self.refused} is faulty"))
            async with at_start.in_order():
                self.given.append(request.lora_path)
            await asyncio.sleep(0)
            self.finished.append(request.lora_path)
            return "Success"
        finally:
            self.running -= 1


def _load(server: Server) -> Server:
    asyncio.run(asyncio.wait_for(at_start.load_static(None, server), 20))
    return server


def test_several_load_at_a_time_with_ids_in_order():
    paths = [f"/{i}" for i in range(2 * at_start.AT_ONCE + 3)]
    server = _load(Server(*paths))
    assert server.given == paths
    assert {*server.finished} == {*paths}
    assert server.most == at_start.AT_ONCE


def test_what_is_made_of_adapters_comes_after_them():
    server = _load(Server("/a", "/b", "mix:/a*0.5+/b*0.5", "/c", "dlp:/d", "/e"))
    for made in ("mix:/a*0.5+/b*0.5", "dlp:/d"):
        place = server.given.index(made)
        assert {*server.finished[:place]} == {*server.given[:place]}, "alone"
    assert server.most == 2


def test_one_that_is_refused_holds_up_no_other():
    server = Server("/a", "/b", "/c", refused="/b")
    with pytest.raises(ValueError, match="/b is faulty"):
        _load(server)
    assert server.given == ["/a", "/c"]


def test_others_do_not_wait():
    async def alone() -> None:
        async with at_start.in_order():
            pass

    asyncio.run(asyncio.wait_for(alone(), 20))
    _load(SimpleNamespace(static_lora_modules=None))  # pyright: ignore[reportArgumentType]
