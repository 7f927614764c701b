"""Routes whose requests vLLM reads without fields that it does not know: "flora" is refused there.

Otherwise a request for a mix would be answered by the base model, or under its name.
"""

from typing import Any

from flora_vllm.plugin import bodies
from flora_vllm.plugin.answers import error_answer
from flora_vllm.plugin.mix_requests import KEY
from flora_vllm.plugin.routes import path_of

# Anthropic's, Cohere's, and the one that takes tokens. Elsewhere unknown fields are kept (mix_requests.py).
ROUTES = ("/v1/messages", "/cohere/", "/v2/embed", "/inference/")
# Tokens are turned back into text there, and no model runs.
_DERENDER = "/derender"


class DroppedField:
    """ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = path_of(scope)
        drops = path.startswith(ROUTES) or path.endswith(_DERENDER)
        if scope["type"] != "http" or scope["method"] != "POST" or not drops:
            await self._app(scope, receive, send)
            return
        body, again = await bodies.read(receive)
        if _names_mix(body):
            instead = "ask /v1/chat/completions or /v1/completions, or load the mix under a name"
            if path.endswith(_DERENDER):
                instead = "the mix is for /render, whose answer names it as its model; leave it out here"
            text = f'{path} takes no "{KEY}"; {instead}'
            await error_answer(text, param=KEY)(scope, receive, send)
            return
        await self._app(scope, again, send)


def _names_mix(body: bytes) -> bool:
    """Whether a JSON object has the key; what is no JSON is vLLM's to refuse."""
    try:
        found = bodies.parsed(body, (KEY,))
    except RecursionError:
        return False
    return isinstance(found, dict) and KEY in found
