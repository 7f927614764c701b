"""vLLM's speech server ends the requests of its own client only, whatever ids clients send."""

import asyncio
import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.plugin import speech

pytestmark = pytest.mark.filterwarnings("ignore")


class Engine:
    """As much of the engine as a detection of a language needs; `ended`: what ended, by itself or by an abort."""

    def __init__(self, additional_config: dict[str, Any]) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional_config)
        self.ended: list[str] = []
        self.running = asyncio.Event()

    async def generate(self, _prompt: Any, _params: Any, request_id: str) -> Any:
        try:
            self.running.set()
            await asyncio.Event().wait()
            yield None
        finally:
            self.ended.append(f"own {request_id}")

    async def abort(self, request_id: str) -> None:
        self.ended.append(f"all {request_id}")


@pytest.mark.parametrize(
    ("config", "ended"), [({"flora": {}}, ["own transcribe-1"]), ({}, ["own transcribe-1", "all transcribe-1"])]
)
def test_a_client_that_leaves_ends_its_own_request(
    config: dict[str, Any], ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = importlib.import_module("vllm.entrypoints.speech_to_text.base.serving").SpeechToTextBaseServing
    # What vLLM's own sets of it; the rest needs a model.
    monkeypatch.setattr(serving, "__init__", lambda self, engine: setattr(self, "engine_client", engine))
    speech.abort_own_requests_only()
    model = SimpleNamespace(get_language_detection_prompt=lambda *_: "prompt", get_language_token_ids=lambda _: [1])

    async def leave() -> list[str]:
        served: Any = serving(engine := Engine(config))
        served.__dict__["model_cls"], served.asr_config, served.tokenizer = model, None, None
        detecting = asyncio.create_task(served._detect_language(None, "transcribe-1"))
        await engine.running.wait()
        detecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await detecting
        return engine.ended

    assert asyncio.run(leave()) == ended
