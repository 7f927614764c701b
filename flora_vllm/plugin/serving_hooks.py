"""Rows of hook_table.py: what vLLM's request handlers look up and keep."""

from flora_vllm.plugin.hook import Hook

_BASE = "vllm.entrypoints.serve.engine.serving:BaseServing"

SERVING_HOOKS = (
    Hook(f"{_BASE}.__init__", ("self",), sets=("models",)),
    Hook(f"{_BASE}._get_active_default_mm_loras", ("self", "request")),
    Hook(f"{_BASE}._get_message_types", ("self", "request")),
    Hook(f"{_BASE}._maybe_get_adapters", ("self", "request")),
    Hook(
        "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.__init__",
        ("self", "engine_client"),
        sets=("response_store", "msg_store", "event_store", "background_tasks"),
    ),
    Hook(
        "vllm.entrypoints.speech_to_text.base.serving:SpeechToTextBaseServing.__init__",
        ("self", "engine_client"),
        sets=("engine_client",),
    ),
)
