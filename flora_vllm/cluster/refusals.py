"""What a client is told where its request cannot be served: short, in vLLM's words where it has some, no path, no URI.

What a source, Ray or the file system said goes to the log of whoever met it.
"""

import logging
import re

from flora_vllm.cluster.memory import NoRoomError, NotLoadedError
from flora_vllm.cluster.store import Entry, StaleVersionError, StoreError
from flora_vllm.errors import AdapterError, bounded, without_paths

log = logging.getLogger("ray.serve")

REFUSALS = (AdapterError, StaleVersionError, StoreError, NoRoomError, NotLoadedError)
UNREACHED = "no replica can serve the request now; the ingress's log says why"
FAILED = "the replica failed at the request; its log says why"
_URI = re.compile(r"(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"`,;()\[\]<>]*")
_MOST_NAME_BYTES = 200  # more than a name that is allowed has


def refusal_of(error: Exception, adapter: Entry) -> tuple[int, str]:
    """(status, message) for one of REFUSALS, met as a request wanted the adapter; the error itself is logged."""
    log.warning("adapter %s: %s", adapter.id, error)
    if isinstance(error, StaleVersionError):
        return 409, f"the adapter {adapter.name} has changed or is gone; ask again"
    if isinstance(error, StoreError):
        return 503, f"the adapter {adapter.name} cannot be fetched now; the replica's log says why"
    if isinstance(error, NotLoadedError):
        return 503, f"the adapter {adapter.name} cannot be loaded now; the replica's log says why"
    status = 503 if isinstance(error, NoRoomError) else 400
    return status, bounded(without_paths(_URI.sub("<uri>", str(error)), None))


def unknown(model: str) -> str:
    """As vLLM says it, of a name of any length."""
    return f"The model `{bounded(model, _MOST_NAME_BYTES)}` does not exist."
