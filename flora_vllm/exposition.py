"""Metric families as Prometheus' text format."""

import importlib
from collections.abc import Iterable
from typing import Any


def exposition_of(families: Iterable[Any]) -> bytes:
    """The families, prometheus_client's, as the library writes those of a registry."""
    client: Any = importlib.import_module("prometheus_client")
    registry = client.CollectorRegistry()

    class Collector:
        def collect(self) -> Iterable[Any]:
            return families

    registry.register(Collector())
    return client.generate_latest(registry)
