"""Tokens, first tokens and requests by adapter and family, counted where vLLM's own stat loggers count them.

The process that talks to clients counts each output once, into one series: the adapter's own, or `other` of its family.
Who has a series is chosen once a CHOOSE_S, the MOST_NAMED adapters with the most recent traffic; one that gets a series
late begins at 0 and one that loses it takes its numbers along. So no series ever goes back while it is there, and sums
of rates are right. With several server processes each writes what it counted into a file beside those of Prometheus'
own library once a second, and whoever is asked adds them up.
"""

import asyncio
import contextlib
import functools
import importlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flora_vllm.plugin.identity import split_identity
from flora_vllm.plugin.published import identity_of

MOST_NAMED = 64
OTHER = "other"
CHOOSE_S = 60.0
# Adapters without a series whose traffic is remembered: of more than these the busiest quarter is kept.
MOST_REMEMBERED = 4096
# Prompt tokens, generated tokens, requests finished, first tokens, their seconds.
FIELDS = ("prompt", "generation", "finished", "firsts", "first_s")
_PUBLISH_S = 1.0
_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

# (adapter's plain name, family).
Key = tuple[str, str]


class Counts:
    """What one series counted, FIELDS."""

    __slots__ = FIELDS

    def __init__(self, values: Iterable[float] = (0, 0, 0, 0, 0.0)) -> None:
        self.prompt, self.generation, self.finished, self.firsts, self.first_s = values

    def values(self) -> list[float]:
        return [getattr(self, field) for field in FIELDS]

    def add(self, values: Iterable[float]) -> None:
        for field, value in zip(FIELDS, values, strict=True):
            setattr(self, field, getattr(self, field) + value)


class Traffic:
    """The series of one process. `most`: how many adapters have their own."""

    def __init__(self, most: int = MOST_NAMED) -> None:
        self._most = most
        self._series: dict[Key, Counts] = {}  # OTHER of each family among them
        self._named: set[Key] = set()
        self._recent: Counter[Key] = Counter()
        self._chosen_at: float | None = None

    def of(self, key: Key, tokens: int, now: float) -> Counts:
        """Where an output of so many tokens is counted, at `now` (seconds of any clock)."""
        if self._chosen_at is None or now - self._chosen_at > CHOOSE_S:
            self._choose(now)
        self._recent[key] += tokens
        counts = self._series.get(key)
        return self._new_or_other(key) if counts is None else counts

    def _new_or_other(self, key: Key) -> Counts:
        if len(self._named) < self._most and key[0] != OTHER:
            self._named.add(key)
        elif len(self._recent) > MOST_REMEMBERED:
            self._recent = Counter(dict(self._recent.most_common(MOST_REMEMBERED // 4)))
        return self._series.setdefault(key if key in self._named else (OTHER, key[1]), Counts())

    def _choose(self, now: float) -> None:
        """Who has been busiest keeps or gets a series; of equals, those that have one."""
        self._chosen_at = now
        asking = {key for key in self._recent if key[0] != OTHER}
        if asking - self._named:
            ranked = sorted(asking | self._named, key=lambda key: (-self._recent[key], key not in self._named))
            for key in self._named.difference(ranked[: self._most]):
                self._series.pop(key, None)  # it may have had no output since it was chosen
            self._named = set(ranked[: self._most])
        self._recent = Counter({key: count // 2 for key, count in self._recent.items() if count > 1})

    def forget_all_but(self, is_there: Callable[[str], bool]) -> None:
        """No series is left of an adapter that is gone."""
        for key in [key for key in self._named if not is_there(key[0])]:
            self._named.discard(key)
            self._series.pop(key, None)
            self._recent.pop(key, None)

    def values(self) -> dict[Key, list[float]]:
        return {key: counts.values() for key, counts in self._series.items()}


class Published:
    """What this server process and those beside it counted, of which each has a file in a directory that they share."""

    def __init__(self, own: Traffic) -> None:
        self._own = own
        self._file: Path | None = None
        self._is_due = False

    def begin(self) -> None:
        """In each server process, before it serves; a no-op where there is one process."""
        if directory := os.environ.get(_DIRECTORY):
            self._file = Path(directory, f"flora_traffic_{os.getpid()}.json")

    def note(self) -> None:
        """Something was counted: it is written soon. Called in the event loop that answers clients."""
        if self._file is not None and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(_PUBLISH_S, self._write, self._file)

    def _write(self, file: Path) -> None:
        self._is_due = False
        unfinished = file.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk; the next one has all
            unfinished.write_text(json.dumps([[*key, *values] for key, values in self._own.values().items()]))
            unfinished.rename(file)  # whoever reads it sees all or nothing

    def values(self) -> dict[Key, list[float]]:
        """Series -> its FIELDS, summed over the processes."""
        total = {key: Counts(values) for key, values in self._own.values().items()}
        for file in () if self._file is None else self._file.parent.glob("flora_traffic_*.json"):
            if file != self._file:
                for name, family, *values in json.loads(file.read_text()):
                    total.setdefault((name, family), Counts()).add(values)
        return {key: counts.values() for key, counts in total.items()}


TRAFFIC = Traffic()
PUBLISHED = Published(TRAFFIC)
# Identity -> family, as the server that loaded it read it in its config.
FAMILIES: dict[str, str] = {}


def key_of(state: Any) -> Key | None:
    """Whose series a request's outputs are; None of one without an adapter, or without FLoRA."""
    known = identity_of(state)
    name, digest = (None, None) if known is None else split_identity(known)
    return None if name is None or digest is None else (name, FAMILIES.get(str(known), ""))


def install() -> None:
    """Have vLLM's frontend count by adapter what it counts anyway; nothing where it is told to count nothing."""
    processor: Any = importlib.import_module("vllm.v1.engine.output_processor").OutputProcessor
    update, finish = processor._update_stats_from_output, processor._update_stats_from_finished

    @functools.wraps(update)
    def update_stats_from_output(
        self: Any, req_state: Any, engine_core_output: Any, engine_core_timestamp: Any, iteration_stats: Any
    ) -> None:
        is_first = req_state.is_prefilling
        update(self, req_state, engine_core_output, engine_core_timestamp, iteration_stats)
        if iteration_stats is None or (key := _key(req_state)) is None:
            return
        tokens, prefill = len(engine_core_output.new_token_ids), engine_core_output.prefill_stats
        prompt = prefill.num_prompt_tokens if is_first and prefill is not None else 0
        counts = TRAFFIC.of(key, tokens + prompt, iteration_stats.iteration_timestamp)
        counts.generation += tokens
        if is_first:
            counts.prompt += prompt
            counts.firsts += 1
            counts.first_s += req_state.stats.first_token_latency
        PUBLISHED.note()

    @functools.wraps(finish)
    def update_stats_from_finished(self: Any, req_state: Any, finish_reason: Any, iteration_stats: Any) -> None:
        finish(self, req_state, finish_reason, iteration_stats)
        if iteration_stats is not None and (key := _key(req_state)) is not None:
            TRAFFIC.of(key, 0, iteration_stats.iteration_timestamp).finished += 1
            PUBLISHED.note()

    processor._update_stats_from_output = update_stats_from_output
    processor._update_stats_from_finished = update_stats_from_finished


def _key(state: Any) -> Key | None:
    """`key_of`, once a request."""
    if "flora_key" not in state.__dict__:
        state.flora_key = key_of(state)
    return state.flora_key
