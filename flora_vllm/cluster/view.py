"""An ingress's view of the catalogues: which name is which adapter version now. Survives the controller's absence."""

import asyncio
import logging
import time
from typing import Any

from flora_vllm.cluster.messages import CatalogueNews
from flora_vllm.cluster.store import Entry
from flora_vllm.cluster.streams import LostError

log = logging.getLogger("ray.serve")

# A name nobody knows makes the controller look at its sources at most this often.
RESCAN_S = 1.0


class CatalogueView:
    """Adapters of one base model. `link` offers `news` and `rescan` and raises ConnectionError or TimeoutError.

    As long as no controller has ever answered, nothing is known: then a name is looked for in vain, with LostError.
    """

    def __init__(self, link: Any, refresh_s: float) -> None:
        self._link, self._refresh_s = link, refresh_s
        self._born, self._number = "", -1
        self._entries: dict[str, Entry] = {}
        self._rescanned_s = -RESCAN_S
        self._asking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def names(self) -> list[str]:
        return sorted(self._entries)

    async def refresh(self) -> None:
        """Takes what is new; keeps what it has while there is no controller."""
        try:
            self._take(await self._link.news(self._born, self._number))
        except (ConnectionError, TimeoutError) as error:
            log.info("catalogue not refreshed: %s", error)

    async def _refresh_loop(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            await self.refresh()

    def _take(self, news: CatalogueNews) -> None:
        if news.is_full:
            self._entries = {} if news.is_complete else self._entries
        elif news.born != self._born or news.number < self._number:
            return
        self._born, self._number = news.born, news.number
        for name in news.removed:
            self._entries.pop(name, None)
        self._entries.update({e.name: e for e in news.entries})

    async def known(self, name: str) -> Entry | None:
        """The adapter as of the last refresh, None if there was none."""
        if self._task is None:
            self._task = asyncio.create_task(self._refresh_loop())
            await self.refresh()
        return self._entries.get(name)

    async def get(self, name: str, *, newer_than: Entry | None = None) -> Entry | None:
        """The present version of an adapter, None if there is none; `newer_than` was found to be out of date."""
        entry = await self.known(name)
        if entry is None or entry == newer_than:
            await self._rescan_since(time.monotonic())
            entry = self._entries.get(name)
        if entry is None and not self._born:
            raise LostError("no placement controller has told the adapters yet")
        return entry

    async def _rescan_since(self, asked_s: float) -> None:
        """Has the sources looked at after `asked_s`; all who wait share one look."""
        async with self._asking:
            if self._rescanned_s >= asked_s:
                return
            await asyncio.sleep(max(0.0, self._rescanned_s + RESCAN_S - time.monotonic()))
            self._rescanned_s = time.monotonic()
            try:
                self._take(await self._link.rescan(self._born, self._number))
            except (ConnectionError, TimeoutError) as error:
                log.info("catalogue not refreshed: %s", error)
