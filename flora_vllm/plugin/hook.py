"""One of vLLM's symbols that we rely on: a row of hook_table.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hook:
    """`symbol` is `module:attribute.path`.

    `parameters` must appear in its signature in this order; it must set `sets` on its `self`; `device` ("cpu", "cuda")
    is the only one that needs it; where `unless` exists the hook is not needed (a diff in patches/ offers another way).
    """

    symbol: str
    parameters: tuple[str, ...] | None = None
    device: str | None = None
    sets: tuple[str, ...] = ()
    unless: str | None = None
