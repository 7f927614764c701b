"""Which adapter a request used, on the span that vLLM writes of it for OpenTelemetry (`--otlp-traces-endpoint`)."""

import functools
import importlib
from contextvars import ContextVar
from typing import Any

from flora_vllm.plugin.identity import split_identity
from flora_vllm.plugin.published import identity_of

NAME, DIGEST = "flora.adapter.name", "flora.adapter.digest"
_traced: ContextVar[Any] = ContextVar("flora_traced", default=None)


def attributes_of(state: Any) -> dict[str, str]:
    """The span attributes of a request's state: none of one without an adapter."""
    known = identity_of(state)
    if known is None:
        return {}
    name, digest = split_identity(known)
    return {NAME: name} if digest is None else {NAME: name, DIGEST: digest}


def install() -> None:
    """Have vLLM's spans of requests tell the adapter."""
    module: Any = importlib.import_module("vllm.v1.engine.output_processor")
    trace, write = module.OutputProcessor.do_tracing, module.instrument_manual

    @functools.wraps(trace)
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        token = _traced.set(req_state)
        try:
            trace(self, engine_core_output, req_state, iteration_stats)
        finally:
            _traced.reset(token)

    @functools.wraps(write)
    def instrument_manual(*args: Any, attributes: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        state = _traced.get()
        more = {} if state is None else attributes_of(state)
        return write(*args, attributes={**(attributes or {}), **more}, **kwargs)

    module.OutputProcessor.do_tracing, module.instrument_manual = do_tracing, instrument_manual
