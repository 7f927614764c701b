"""The status of a server: of one whose engine died, and of one that was told to end. test_chaos.py kills real ones."""

import asyncio
import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.plugin import ending

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("errored", "flora", "told", "status"),
    [(True, True, False, 1), (False, True, False, None), (True, False, False, None), (True, True, True, None)],
)
def test_only_a_server_whose_engine_died_fails(
    errored: bool, flora: bool, told: bool, status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry: Any = importlib.import_module("vllm.entrypoints.launchers.api_server.entry")
    async_llm: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM

    async def closing() -> str:
        return "closed"

    async def serve(engine: Any, *_: Any) -> Any:
        if told:  # as vLLM's server does on a signal
            async_llm.shutdown(engine, timeout=0)
        return closing()

    monkeypatch.setattr(entry, "build_and_serve", serve)
    monkeypatch.setattr(async_llm, "shutdown", lambda self, timeout=None: None)
    ending.install()
    config = SimpleNamespace(additional_config={"flora": {}} if flora else {})
    engine = SimpleNamespace(vllm_config=config, errored=errored)

    async def run() -> str:
        return await (await entry.build_and_serve(engine, "address"))

    if status is None:
        assert asyncio.run(run()) == "closed"
        return
    with pytest.raises(SystemExit) as ended:
        asyncio.run(run())
    assert ended.value.code == status
