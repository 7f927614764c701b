"""/v1/responses with a store: a response is read, cancelled and continued by the tenant whose it is, and nobody else.

vLLM keeps responses of all in tables by their ids, which a client may choose (`request_id`).
"""

import functools
import importlib
from typing import Any

from flora_vllm.plugin.access import TenantTable
from flora_vllm.plugin.options import options_of_engine

TABLES = ("response_store", "msg_store", "event_store", "background_tasks")


def install() -> None:
    """Gives vLLM's handler tables that are each tenant's own; inert without an ACL."""
    serving: Any = importlib.import_module("vllm.entrypoints.openai.responses.serving").OpenAIServingResponses
    make = serving.__init__

    @functools.wraps(make)
    def make_scoped(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        options = options_of_engine(self.models.engine_client)
        if options is not None and options.adapter_acl is not None:
            for name in TABLES:
                setattr(self, name, TenantTable())

    serving.__init__ = make_scoped
