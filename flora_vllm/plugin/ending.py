"""A server whose engine died ends with a status that says so.

vLLM's server then ends as it does when it is told to, with status 0, and whoever starts servers again that failed
(systemd's `Restart=on-failure`, Kubernetes) leaves it where it is.
"""

import functools
import importlib
import logging
from typing import Any

from flora_vllm.plugin.options import options_of_engine

logger = logging.getLogger(__name__)

STATUS = 1
_TOLD = "_flora_told_to_end"  # on the engine's client


def install() -> None:
    """Wraps what serves HTTP for an engine; inert without FLoRA."""
    entry: Any = importlib.import_module("vllm.entrypoints.launchers.api_server.entry")
    client: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
    serve, shutdown = entry.build_and_serve, client.shutdown

    @functools.wraps(shutdown)
    def shutdown_told(self: Any, *args: Any, **kwargs: Any) -> None:
        self.__dict__[_TOLD] = True
        shutdown(self, *args, **kwargs)

    @functools.wraps(serve)
    async def build_and_serve(engine_client: Any, *args: Any, **kwargs: Any) -> Any:
        closing = await serve(engine_client, *args, **kwargs)
        if options_of_engine(engine_client) is None or not _died(engine_client):
            return closing
        closing.close()
        logger.error("the engine died, for the reason that it or its workers gave above; the server ends")
        raise SystemExit(STATUS)

    client.shutdown, entry.build_and_serve = shutdown_told, build_and_serve


def _died(engine_client: Any) -> bool:
    return engine_client.errored and _TOLD not in engine_client.__dict__
