"""`--default-mm-loras audio=DIR`: a request to the base model that has audio is answered by the adapter `audio`.

vLLM finds it by comparing the engine's names of adapters with the kinds of content; those here have a digest in them.
"""

import functools
import importlib
from typing import Any

from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.options import options_of_engine
from flora_vllm.plugin.preload import NAMED


def install() -> None:
    """Replaces a method of vLLM's handlers; inert without FLoRA."""
    if offers(NAMED):
        return
    serving: Any = importlib.import_module("vllm.entrypoints.serve.engine.serving").BaseServing
    original = serving._get_active_default_mm_loras

    @functools.wraps(original)
    def active_default(self: Any, request: Any) -> Any:
        if options_of_engine(getattr(self.models, "engine_client", None)) is None:
            return original(self, request)
        kinds = self._get_message_types(request)
        found = [adapter for name, adapter in self.models.lora_requests.items() if name in kinds]
        return found[0] if len(found) == 1 else None

    serving._get_active_default_mm_loras = active_default
