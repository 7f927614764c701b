"""Ids that clients choose for images, audio and video: with an ACL the operator alone may.

A content part's `uuid`, and `mm_hashes` of a request made of tokens, stand in vLLM for the content itself: what was
sent under such an id before, by whomever, is what the model sees, and the request's own content is not looked at.
"""

from collections.abc import Iterator
from typing import Any

from flora_vllm.plugin import bodies
from flora_vllm.plugin.access import CURRENT, OPERATOR
from flora_vllm.plugin.answers import error_answer

_UUID, _FEATURES, _HASHES = "uuid", "features", "mm_hashes"
_KINDS = ("image", "audio", "video")
# Of files, which are no JSON: uploads of adapters, and audio.
_FORM = b"multipart/form-data"


class TenantsMedia:
    """ASGI middleware for a server with tenants."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or CURRENT.get() is OPERATOR or _is_form(scope):
            await self._app(scope, receive, send)
            return
        body, again = await bodies.read(receive)
        if (key := _chosen_id(body)) is not None:
            text = (
                f"\"{key}\" names media by an id of the client's choice, which would stand for every tenant's; leave "
                "it out: the server knows media by their content (only the operator's key may name them)"
            )
            await error_answer(text, param=key)(scope, receive, send)
            return
        await self._app(scope, again, send)


def _is_form(scope: Any) -> bool:
    given = [value.lower() for name, value in scope["headers"] if name.lower() == b"content-type"]
    return bool(given) and all(value.startswith(_FORM) for value in given)


def _chosen_id(body: bytes) -> str | None:
    """The key of this JSON under which there is such an id, or None."""
    try:
        found = bodies.parsed(body, (_UUID, _HASHES))
    except RecursionError:
        return _UUID  # what cannot be looked at is not let through
    if isinstance(found, dict) and isinstance(found.get(_FEATURES), dict) and found[_FEATURES].get(_HASHES):
        return _HASHES
    return _UUID if any(map(_is_named_medium, _listed(found))) else None


def _listed(value: Any) -> Iterator[dict[str, Any]]:
    """The objects that stand in lists, at any depth: content parts do, the names in a tool's schema do not."""
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, list):
            rest += value
            yield from (item for item in value if isinstance(item, dict))


def _is_named_medium(part: dict[str, Any]) -> bool:
    words = (*part, str(part.get("type")))
    return part.get(_UUID) is not None and any(kind in word for word in words for kind in _KINDS)
