"""/v1/audio/*: a request's language is detected by its adapter, and it ends no requests but its own.

vLLM passes a request's adapter on to the transcription alone; a merged model would detect the language too. And when a
client leaves, it ends every request of that client's `X-Request-Id`, which others may have sent as well.
"""

import copy
import functools
import importlib
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.options import options_of, options_of_engine

_SERVING = "vllm.entrypoints.speech_to_text.base.serving:SpeechToTextBaseServing"
_adapter: ContextVar[Any] = ContextVar("adapter", default=None)


class OwnRequests:
    """An engine for the speech server, which aborts by the ids that clients send: that does nothing here.

    Whatever ends it also ends or drops its generators, and each of those aborts its one request by the engine's own id.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def abort(self, _request_id: Any) -> None:
        """Of `_request_id`, one id or several."""


def abort_own_requests_only() -> None:
    """Wraps how the speech server is made, once; inert without FLoRA."""
    serving: Any = importlib.import_module(_SERVING.split(":")[0]).SpeechToTextBaseServing
    make = serving.__init__

    @functools.wraps(make)
    def make_apart(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if options_of_engine(self.engine_client) is not None:
            self.engine_client = OwnRequests(self.engine_client)

    serving.__init__ = make_apart


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
