"""What the ingress does with a request, apart from HTTP: which adapter version, which handle, retry, loud ends.

A model is asked for as `base`, `adapter` or `base:adapter`. An adapter whose name is also a base model's, or that two
base models have, needs the long form. Replicas get the version with the request, so they need no catalogue.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flora_vllm.cluster.ray_hooks import controller_link, until_lost
from flora_vllm.cluster.refusals import unknown
from flora_vllm.cluster.store import Entry
from flora_vllm.cluster.streams import LostError, guarded
from flora_vllm.cluster.view import CatalogueView

# Answers that say "not here, not now" are tried this many times in all; a replica that died, until retry_s.
TRIES = 3
HANDLES = 1024


class UnknownModelError(LookupError):
    """No base model and no adapter has this name; the text is for the client."""


@dataclass(frozen=True)
class Target:
    """Base model and adapter of a request; `adapter` is None for the base model itself."""

    base: str
    adapter: Entry | None


class Directory:
    """Names of all base models and their adapters. `handles`: base model -> handle of its deployment."""

    def __init__(self, handles: Mapping[str, Any], refresh_s: float) -> None:
        self._handles = dict(handles)
        self._views = {
            base: CatalogueView(controller_link(handle.app_name, handle.deployment_name), refresh_s)
            for base, handle in self._handles.items()
        }
        self._with_adapter: dict[str, Any] = {}

    async def find(self, model: str | None, newer_than: Entry | None = None) -> Target:
        """The target of a request for `model`. Raises UnknownModelError."""
        if model is None:
            if len(self._handles) > 1:
                raise UnknownModelError(f"the request names no model; there are {', '.join(sorted(self._handles))}")
            return Target(next(iter(self._handles)), None)
        if model in self._handles:
            return Target(model, None)
        base, colon, adapter = model.partition(":")
        bases = [base] if colon else list(self._handles)
        if colon and base not in self._handles:
            raise UnknownModelError(unknown(model))
        name = adapter if colon else model
        entries = await asyncio.gather(*(self._views[b].known(name) for b in bases))
        if all(entry is None or entry == newer_than for entry in entries):
            # Only now: looking at the sources of every base model that lacks the name would slow each request.
            entries = await asyncio.gather(*(self._views[b].get(name, newer_than=newer_than) for b in bases))
        found = [Target(b, e) for b, e in zip(bases, entries, strict=True) if e is not None]
        if not found:
            raise UnknownModelError(unknown(model))
        if len(found) > 1:
            raise UnknownModelError(
                f"the adapter {model!r} belongs to several base models; ask for "
                + " or ".join(f"{t.base}:{model}" for t in found)
            )
        return found[0]

    def handle(self, target: Target) -> Any:
        """A streaming handle whose requests go where the adapter is."""
        key = target.base if target.adapter is None else f"{target.base}:{target.adapter.id}"
        if key not in self._with_adapter:
            if len(self._with_adapter) >= HANDLES:
                del self._with_adapter[next(iter(self._with_adapter))]
            options = {} if target.adapter is None else {"multiplexed_model_id": target.adapter.id}
            self._with_adapter[key] = self._handles[target.base].options(stream=True, **options)
        return self._with_adapter[key]

    async def listing(self) -> list[tuple[str, str, Entry]]:
        """(name a client can use, base model, adapter) of every adapter."""
        await asyncio.gather(*(view.known("") for view in self._views.values()))
        owners: dict[str, list[str]] = {}
        for base, view in self._views.items():
            for name in view.names():
                owners.setdefault(name, []).append(base)
        out = []
        for name, bases in sorted(owners.items()):
            for base in bases:
                entry = await self._views[base].known(name)
                plain = len(bases) == 1 and name not in self._handles
                if entry is not None:
                    out.append((name if plain else f"{base}:{name}", base, entry))
        return out


async def answer(
    directory: Directory,
    model: str | None,
    call: Callable[[Any, Target], AsyncIterator[Any]],
    refusal: Callable[[Any], int | None],
    retry_s: float,
) -> AsyncIterator[Any]:
    """Chunks of one request. `call(handle, target)` sends it; `refusal(chunk)` is the status if a chunk is an error.

    Raises UnknownModelError, or LostError if no replica could be reached before anything was sent.
    """
    tries, stale = 0, None

    async def attempt() -> AsyncIterator[Any]:
        nonlocal tries
        tries += 1
        target = await directory.find(model, newer_than=stale)
        return _checked(until_lost(call(directory.handle(target), target)), target)

    async def _checked(chunks: AsyncIterator[Any], target: Target) -> AsyncIterator[Any]:
        nonlocal stale
        is_first = True
        async for chunk in chunks:
            status = refusal(chunk) if is_first else None
            if status is not None and (status >= 500 or status == 409) and tries < TRIES:
                # 409: the source has a newer version of the adapter than this request was sent with.
                stale = target.adapter if status == 409 else stale
                raise LostError(f"the replica answered {status}")
            is_first = False
            yield chunk

    async for chunk in guarded(attempt, retry_s):
        yield chunk
