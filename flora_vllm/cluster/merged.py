"""What an ingress says of all its replicas: their series as one, their adapters as one list. Knows no Ray and no HTTP.

Counters, histograms and summaries are summed, so that a sum never goes back: what a replica counted stays in it when
the replica goes, and one that does not answer keeps what it had. Gauges that count something (SUMMED) are summed over
those that answer; of others a sum would say nothing, and each replica's stands alone, with the label `replica`.
"""

import importlib
import time
from collections.abc import Container, Sequence
from typing import Any

from flora_vllm.cluster.store import Entry
from flora_vllm.exposition import exposition_of

SUMMED = frozenset(
    f"vllm:{name}"
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_waiting_by_reason",
        "lora_adapter_loaded",
        "num_gpu_loaded_lora_adapters",
        "num_cpu_loaded_lora_adapters",
        "max_gpu_lora_adapters",
    )
) | {"flora_adapter_bytes", "flora_adapters_starved", "flora_requests_waiting"}
# A replica that has not answered for so long is gone; another one would have another id.
GONE_S = 3600.0
_OURS = ("vllm:", "flora_")
# Where an adapter is best off first.
_STATES = ("resident", "host", "registered")

# A sample's name and labels.
_Series = tuple[str, tuple[tuple[str, str], ...]]


class MergedMetrics:
    """The sums of one ingress since it began."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, dict[_Series, float]]] = {}  # replica -> when it answered last, its counts
        self._sums: dict[_Series, float] = {}
        self._families: dict[str, tuple[str, str]] = {}  # name -> documentation and type
        self._family_of: dict[_Series, str] = {}

    def merge(self, answers: Sequence[tuple[str, str, str]]) -> bytes:
        """One text in Prometheus' format of (base model, replica, its text) of each that answered."""
        core: Any = importlib.import_module("prometheus_client.core")
        parser: Any = importlib.import_module("prometheus_client.parser")
        gauges: dict[_Series, float] = {}
        for base, replica, text in answers:
            counts: dict[_Series, float] = {}
            for family in parser.text_string_to_metric_families(text):
                if not family.name.startswith(_OURS) or family.name.endswith("_created"):
                    continue
                self._families[family.name] = (family.documentation, family.type)
                for sample in family.samples:
                    labels = {"model_name": base, **sample.labels}
                    if family.type == "gauge" and family.name not in SUMMED:
                        labels["replica"] = replica
                    series = (sample.name, tuple(sorted(labels.items())))
                    self._family_of[series] = family.name
                    if family.type == "gauge":
                        gauges[series] = gauges.get(series, 0.0) + sample.value
                    else:
                        counts[series] = sample.value
            self._add(replica, counts)
        self._forget(gauges)
        merged = {name: core.Metric(name, *self._families[name]) for name in dict.fromkeys(self._family_of.values())}
        for series, family in self._family_of.items():
            value = gauges[series] if series in gauges else self._sums[series]
            merged[family].add_sample(series[0], dict(series[1]), value)
        return exposition_of(merged.values())

    def _forget(self, gauges: Container[_Series]) -> None:
        """Replicas that are gone, and series that no replica has any more."""
        oldest = time.monotonic() - GONE_S
        self._last = {replica: answer for replica, answer in self._last.items() if answer[0] > oldest}
        counted = {series for _, counts in self._last.values() for series in counts}
        self._sums = {series: value for series, value in self._sums.items() if series in counted}
        self._family_of = {s: family for s, family in self._family_of.items() if s in counted or s in gauges}

    def _add(self, replica: str, counts: dict[_Series, float]) -> None:
        _, before = self._last.get(replica, (0.0, {}))
        for series, value in counts.items():
            old = before.get(series, 0.0)
            # Below what it was it began again at 0.
            self._sums[series] = self._sums.get(series, 0.0) + (value - old if value >= old else value)
        self._last[replica] = (time.monotonic(), counts)


def merged_adapters(
    catalogue: Sequence[tuple[str, str, Entry]], answers: Sequence[tuple[str, str, list[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """An entry for each adapter of the catalogue (name, base model, version), of (base, replica, its entries).

    As one server's, and `parent`, the base model, and `replicas`: replica -> state there. `bytes` are one copy's.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for base, replica, entries in answers:
        for entry in entries:
            found.setdefault((base, entry["name"]), {})[replica] = entry
    merged = []
    for name, base, adapter in catalogue:
        copies = found.get((base, adapter.id), {})
        states = {replica: copy["state"] for replica, copy in copies.items()}
        best = min(states.values(), key=_STATES.index, default="registered")
        one = max(copies.values(), key=lambda copy: (copy["rank"] is not None, copy["last_used"] or 0), default={})
        known = {key: one.get(key) for key in ("digest", "family", "rank", "bytes", "last_used")}
        pinned = any(copy["pinned"] for copy in copies.values()) if one.get("rank") is not None else None
        merged.append({"name": name, "parent": base, "state": best, **known, "pinned": pinned, "replicas": states})
    return merged
