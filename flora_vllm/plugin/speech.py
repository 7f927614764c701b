"""/v1/audio/*: a request that names an adapter and no language has it detected by that adapter, not by the base model.

vLLM passes a request's adapter on to the transcription alone. A merged model would detect the language too.
"""

import copy
import functools
import importlib
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.options import options_of

_SERVING = "vllm.entrypoints.speech_to_text.base.serving:SpeechToTextBaseServing"
_adapter: ContextVar[Any] = ContextVar("adapter", default=None)


def detect_language_with_adapter() -> None:
    """Replaces two methods of the speech server, once; inert without FLoRA."""
    if not offers(f"{_SERVING}._detect_request_language"):  # patches/0015
        _replace()


@functools.cache
def _replace() -> None:
    serving = importlib.import_module(_SERVING.split(":")[0]).SpeechToTextBaseServing
    preprocess, detect = serving._preprocess_speech_to_text, serving._detect_language

    @functools.wraps(preprocess)
    async def preprocess_speech_to_text(self: Any, request: Any, audio_data: bytes, request_id: str) -> Any:
        is_ours = options_of(self.engine_client.vllm_config.additional_config) is not None
        outer = _adapter.set(self._maybe_get_adapters(request) if is_ours else None)
        try:
            return await preprocess(self, request, audio_data, request_id)
        finally:
            _adapter.reset(outer)

    @functools.wraps(detect)
    async def detect_language(self: Any, audio_chunk: Any, request_id: str) -> str:
        if _adapter.get() is None:
            return await detect(self, audio_chunk, request_id)
        asking = copy.copy(self)
        engine = self.engine_client
        generate = functools.partial(engine.generate, lora_request=_adapter.get())
        asking.engine_client = SimpleNamespace(generate=generate, abort=engine.abort)
        return await detect(asking, audio_chunk, request_id)

    serving._preprocess_speech_to_text, serving._detect_language = preprocess_speech_to_text, detect_language
