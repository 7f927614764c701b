"""Sleep level 2 discards device memory without a copy, slots of adapters among it: refused where there is such memory.

Level 1 copies it to the host and back, so adapters in slots are what they were. vLLM's own LoRA loses its slots at
level 2 and serves base output under the adapter's name.
"""

import functools
import importlib
from typing import Any

from flora_vllm.errors import ConfigError
from flora_vllm.plugin.options import options_of_engine

MOST_LEVEL = 1


def install() -> None:
    """Wraps `sleep` of vLLM's two engines; inert without FLoRA and on a CPU, which does not sleep."""
    sync_engine: Any = importlib.import_module("vllm.v1.engine.llm_engine").LLMEngine
    async_engine: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
    sync_sleep, async_sleep = sync_engine.sleep, async_engine.sleep

    @functools.wraps(sync_sleep)
    def sleep(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        _check(self, level)
        return sync_sleep(self, level, *args, **kwargs)

    @functools.wraps(async_sleep)
    async def sleep_async(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        _check(self, level)
        return await async_sleep(self, level, *args, **kwargs)

    sync_engine.sleep, async_engine.sleep = sleep, sleep_async


def _check(engine: Any, level: int) -> None:
    device = importlib.import_module("vllm.platforms").current_platform.device_type
    if level > MOST_LEVEL and device != "cpu" and options_of_engine(engine) is not None:
        raise ConfigError(
            f"sleep level {level} discards device memory, and with it the adapters in their slots; "
            f"allowed with adapters: 0 to {MOST_LEVEL}. Use level {MOST_LEVEL}, or start without --enable-flora"
        )
