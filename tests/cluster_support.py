"""What the tests of the cluster's parts share: adapters, the smallest configuration, a store that can be shut,
an engine that keeps a list."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flora_vllm.cluster.memory import AdapterMemory, NotLoadedError
from flora_vllm.cluster.store import Cache, Catalogue
from flora_vllm.errors import AdapterError


def write_adapter(
    root: Path, name: str, content: bytes = b"weights", config: str = '{"peft_type": "FLORA", "r": 4}'
) -> Path:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(config)
    (directory / "adapter_model.safetensors").write_bytes(content)
    return directory


def minimal(**model: Any) -> dict[str, Any]:
    return {"models": [{"name": "base", "source": "/models/base", **model}]}


async def play(script: Sequence[Any]) -> AsyncIterator[Any]:
    """One attempt at an answer: the chunks of `script`; an exception among them is raised."""
    for item in script:
        if isinstance(item, Exception):
            raise item
        yield item


class NoCredentialsError(Exception):
    """Storage libraries raise classes of their own."""


class GatedFileSystem(LocalFileSystem):
    """Local files behind a service that keeps paths with `closed` in them to itself, or breaks off downloads."""

    protocol = "gated"
    closed, cut = "", False

    def _enter(self, path):
        if self.closed and self.closed in path:
            raise NoCredentialsError("unable to locate credentials")

    def ls(self, path, detail=True, **kwargs):
        self._enter(path)
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path, **kwargs):
        self._enter(path)
        return super().cat_file(path, **kwargs)

    def get_file(self, rpath, lpath, **kwargs):
        super().get_file(rpath, lpath, **kwargs)
        if self.cut:
            os.truncate(lpath, 3)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gated://"))


def make_gate(monkeypatch):
    """What sets `closed` and `cut` of the store behind gated:// for one test."""
    fsspec.register_implementation("gated", GatedFileSystem, clobber=True)
    return lambda **state: [monkeypatch.setattr(GatedFileSystem, name, value) for name, value in state.items()]


class FakeEngine:
    """Keeps the law: no double load, no unload of what is not there."""

    def __init__(self):
        self.held, self.log, self.gate = set(), [], asyncio.Event()
        self.gate.set()
        self.refuse, self.fail = set(), set()

    async def load(self, entry, path):
        await self.gate.wait()
        if entry.name in self.fail:
            self.log.append(f"?{entry.name}")
            raise NotLoadedError(f"no space for {entry.name}")
        if entry.name in self.refuse:
            raise AdapterError(f"{entry.name} is faulty")
        assert entry.id not in self.held
        self.held.add(entry.id)
        self.log.append(f"+{entry.name}")

    async def unload(self, adapter_id):
        await asyncio.sleep(0.005)
        self.held.remove(adapter_id)
        self.log.append(f"-{adapter_id.split('@')[0]}")


def make_memory(tmp_path, names, slots, **options):
    for name in names:
        write_adapter(tmp_path / "src", name, name.encode() * 10)
    entries = {e.name: e for e in Catalogue([str(tmp_path / "src")]).scan()[0]}
    engine = FakeEngine()
    memory = AdapterMemory(engine, Cache(tmp_path / "cache", 10**9), slots, lambda: None, **options)
    return memory, engine, entries
