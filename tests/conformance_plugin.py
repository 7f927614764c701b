"""Loaded into vLLM's own tests (`pytest -p conformance_plugin`): what they start with LoRA is started with our flag."""

import functools
import importlib
from typing import Any

from flora_vllm.plugin import register


def pytest_configure() -> None:
    register()
    engine_args: Any = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    finish = engine_args.__post_init__

    @functools.wraps(finish)
    def finish_with_flora(self: Any) -> None:
        if self.enable_lora:
            self.additional_config = {"flora": {}, **(self.additional_config or {})}
        finish(self)

    engine_args.__post_init__ = finish_with_flora

    server: Any = importlib.import_module("tests.utils").RemoteVLLMServer
    start = server.__init__

    @functools.wraps(start)
    def start_with_flora(self: Any, model: str, vllm_serve_args: list[str], **options: Any) -> None:
        more = ["--enable-flora"] if "--enable-lora" in vllm_serve_args else []
        start(self, model, [*vllm_serve_args, *more], **options)

    server.__init__ = start_with_flora
