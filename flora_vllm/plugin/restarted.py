"""A server that is started again serves without the adapters that cannot be loaded again, in place of not at all.

One that a person starts ends with the reason if an adapter of its command line has a fault. After a restart the command
line is what the last server had: others' adapters too, which may have been replaced or broken since.
"""

import functools
import importlib
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)

RESTARTED = "FLORA_RESTARTED"  # a supervisor's word to its server


def install() -> None:
    """Replaces the loading of the command line's adapters; inert without FLoRA and for a first start."""
    from flora_vllm.plugin.options import options_of_engine  # here: the supervisor imports this file

    serving: Any = importlib.import_module("vllm.entrypoints.openai.models.serving").OpenAIServingModels
    load_all = serving.init_static_loras

    @functools.wraps(load_all)
    async def load_each(self: Any) -> None:
        if RESTARTED not in os.environ or options_of_engine(self.engine_client) is None:
            await load_all(self)
            return
        kept = []
        for module in self.static_lora_modules or ():
            self.static_lora_modules = [module]
            try:
                await load_all(self)
                kept.append(module)
            except ValueError as error:
                logger.error("adapter %r cannot be loaded again; serving without it: %s", module.name, error)
        self.static_lora_modules = kept

    serving.init_static_loras = load_each
