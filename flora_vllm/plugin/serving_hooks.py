"""Rows of hook_table.py: what vLLM's request handlers look up."""

from flora_vllm.plugin.hook import Hook

_BASE = "vllm.entrypoints.serve.engine.serving:BaseServing"

SERVING_HOOKS = (
    Hook(f"{_BASE}.__init__", ("self",), sets=("models",)),
    Hook(f"{_BASE}._get_active_default_mm_loras", ("self", "request")),
    Hook(f"{_BASE}._get_message_types", ("self", "request")),
)
