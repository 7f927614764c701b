"""What others read of an engine: adapters by the name that clients use, and no series that grows for ever.

Inside, an adapter is `name@digest`. Schedulers and routers around a fleet (llm-d, AIBrix, Dynamo) look for the client's
name in `vllm:lora_requests_info` and in KV-cache events. That metric has a series for every set of adapters that ever
ran together, of which they read the newest; the oldest are dropped. Several server processes cannot drop any, so there
a set that is seen late goes with the others.
"""

import importlib
import os
from collections import OrderedDict
from typing import Any

from flora_vllm.plugin.access import CHOICE
from flora_vllm.plugin.handed import plain
from flora_vllm.plugin.hooks import offers
from flora_vllm.plugin.identity import plain_name
from flora_vllm.plugin.mix_paths import PREFIX
from flora_vllm.plugin.preload import NAMED

# One scrape apart, and all engines of a data-parallel group.
KEPT_SERIES = 64
# For ever, of each server process: several hundred bytes in its file and in every scrape.
LASTING_SERIES = 256
MIX, OTHER = "mix", "other"


def name_events() -> None:
    """KV-cache events carry the plain name; the engine's own keys use `lora_name`, not `name`."""
    if offers(NAMED):
        return
    lora_request = importlib.import_module("vllm.lora.request").LoRARequest
    lora_request.name = property(lambda self: plain_name(self.lora_name))


def name_metrics() -> None:
    """A request's state, from which metrics and outputs are made, has the plain name."""
    _bound_series()
    if offers(NAMED):
        return
    state = importlib.import_module("vllm.v1.engine.output_processor").RequestState
    init = state.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.flora_identity = self.lora_name
        if self.lora_name is not None and plain_name(self.lora_name) != self.lora_name:
            self.lora_name = plain_name(self.lora_name)
            self.lora_request = plain(self.lora_request, lora_name=self.lora_name)

    initialise.__wrapped__ = init  # pyright: ignore[reportFunctionMemberAccess]
    state.__init__ = initialise


def identity_of(state: Any) -> str | None:
    """The identity of the adapter of a request's state."""
    if hasattr(state, "flora_identity"):
        return state.flora_identity
    return None if state.lora_request is None else state.lora_request.lora_name


class NewestSeries:
    """A Prometheus gauge of which only the series set last are kept."""

    def __init__(self, gauge: Any, most: int = KEPT_SERIES) -> None:
        self._gauge, self._most = gauge, most
        self._used: OrderedDict[tuple[str, ...], None] = OrderedDict()

    def labels(self, **labels: Any) -> Any:
        series = tuple(str(labels[name]) for name in self._gauge._labelnames)
        self._used[series] = None
        self._used.move_to_end(series)
        while len(self._used) > self._most:
            oldest, _ = self._used.popitem(last=False)
            self._gauge.remove(*oldest)
        return self._gauge.labels(*series)


class FirstSeries:
    """A Prometheus gauge that cannot forget a series: the sets of names after the first `most` go as OTHER.

    Clients cannot use the sets up with mixes: those made by requests are all MIX, or have their chooser's name.
    """

    def __init__(self, gauge: Any, most: int = LASTING_SERIES) -> None:
        self._gauge, self._most = gauge, most
        self._used: set[tuple[str, ...]] = set()

    def labels(self, **labels: Any) -> Any:
        series = tuple(_set_of_names(str(labels[name])) for name in self._gauge._labelnames)
        if series not in self._used:
            if len(self._used) < self._most:
                self._used.add(series)
            else:
                series = tuple(
                    OTHER if name.endswith("_adapters") and value else value
                    for name, value in zip(self._gauge._labelnames, series, strict=True)
                )
        return self._gauge.labels(*series)


def _set_of_names(label: str) -> str:
    """The names in a label, each once and in one order."""
    names = label.split(",")
    return ",".join(sorted({MIX if name.startswith(PREFIX) else name.partition(CHOICE)[0] for name in names}))


def _bound_series() -> None:
    logger = importlib.import_module("vllm.v1.metrics.loggers").PrometheusStatLogger
    init = logger.__init__

    def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        gauge = self.gauge_lora_info
        if hasattr(gauge, "remove"):
            # Several server processes write into one file each, from which Prometheus' client cannot remove.
            lasts = "PROMETHEUS_MULTIPROC_DIR" in os.environ
            self.gauge_lora_info = FirstSeries(gauge) if lasts else NewestSeries(gauge)

    initialise.__wrapped__ = init  # pyright: ignore[reportFunctionMemberAccess]
    logger.__init__ = initialise
