"""`flora-vllm top URL`: a live table of a server's adapters, tokens, queue and caches, from what it publishes."""

import argparse
import contextlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flora_vllm.errors import ConfigError
from flora_vllm.plugin.identity import plain_name

EXAMPLES = """\
examples:
  flora-vllm top                                   # http://localhost:8000, until Ctrl-C
  flora-vllm top http://gpu-7:8000 --every 5
  flora-vllm top http://localhost:8000 --once      # one table, for scripts

A server that asks for a key gets --api-key or VLLM_API_KEY.
"""
_SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Columns of the server's own list of adapters (/v1/flora/adapters), where it has one.
DETAILS = ("family", "rank", "bytes", "state")
# HTTPException: of a server that ends in the middle of its answer.
_UNANSWERED = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError, KeyError)


@dataclass(frozen=True)
class Snapshot:
    """What a server said at one moment (seconds of a monotonic clock). `details`: adapter -> what else is known."""

    at_s: float
    samples: tuple[tuple[str, Mapping[str, str], float], ...]
    adapters: tuple[str, ...]
    details: Mapping[str, Mapping[str, Any]]

    def total(self, name: str) -> float:
        """The sum of a metric over its labels; 0 if it is not there."""
        return sum(value for found, _, value in self.samples if found == name)

    def by_adapter(self, name: str) -> dict[str, float]:
        """Adapter -> the sum of a metric over its other labels."""
        found: dict[str, float] = {}
        for other, labels, value in self.samples:
            if other == name and "adapter_name" in labels:
                found[labels["adapter_name"]] = found.get(labels["adapter_name"], 0.0) + value
        return found

    def states(self) -> dict[str, str]:
        """Adapter -> running, waiting or idle, by the latest report of vLLM, or of each replica behind an ingress."""
        latest: dict[str, tuple[float, Mapping[str, str]]] = {}
        for name, labels, value in self.samples:
            replica = labels.get("replica", "")
            if name == "vllm:lora_requests_info" and value >= latest.get(replica, (0.0, {}))[0]:
                latest[replica] = (value, labels)
        states = dict.fromkeys(self.adapters, "idle")
        for state in ("waiting", "running"):
            for _, labels in latest.values():
                names = [name for name in labels.get(f"{state}_lora_adapters", "").split(",") if name]
                # Older reports name an adapter with its digest.
                states.update({plain_name(name): state for name in names})
        return states


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Watch a server: its adapters and what they do, tokens per second, queue and caches."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("url", metavar="URL", nargs="?", default="http://localhost:8000", help="where the server is")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--api-key", help="the server's key (default: VLLM_API_KEY)")


def run(args: argparse.Namespace) -> int:
    """0 after --once, 130 after Ctrl-C. Raises ConfigError if nobody answers at the address."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise ConfigError("flora-vllm top needs rich: pip install rich") from error
    if not args.every > 0:
        raise ConfigError(f"--every is {args.every}, must be above 0")
    url, key = args.url.rstrip("/").removesuffix("/v1"), args.api_key or os.environ.get("VLLM_API_KEY")
    console, now = Console(), look(url, key)
    if args.once:
        time.sleep(min(args.every, 1.0))
        console.print(table(url, now, look(url, key)))
        return 0
    first = table(url, None, now)
    if not console.is_terminal:  # into a file or a pipe: one table after another
        console.print(first)
    with Live(first, console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        while True:
            time.sleep(args.every)
            before, now = now, look(url, key)
            shown = table(url, before, now)
            if live is None:
                console.print(shown)
            else:
                live.update(shown, refresh=True)


def look(url: str, key: str | None = None) -> Snapshot:
    """Ask the server. Raises ConfigError with the reason if it cannot be asked."""
    try:
        samples = parse_metrics(_get(f"{url}/metrics", key))
        cards = json.loads(_get(f"{url}/v1/models", key))["data"]
    except _UNANSWERED as error:
        raise ConfigError(
            f"no vLLM server with metrics answers at {url}: {error}; name its address, and its key if it asks for one"
        ) from error
    try:
        found = json.loads(_get(f"{url}/v1/flora/adapters", key))
        details = {entry["name"]: entry for entry in found.get("adapters") or found.get("data") or ()}
    except (*_UNANSWERED, AttributeError, TypeError):
        details = {}  # a server without that route
    adapters = {card["id"]: None for card in cards if card.get("parent")} | dict.fromkeys(details)
    return Snapshot(time.monotonic(), tuple(samples), tuple(adapters), details)


def _get(url: str, key: str | None) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def parse_metrics(text: str) -> list[tuple[str, dict[str, str], float]]:
    """The samples of Prometheus' text format: name, labels, value."""
    samples = []
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            labels = {name: value.replace('\\"', '"') for name, value in _LABEL.findall(match[2] or "")}
            samples.append((match[1], labels, float(match[3])))
    return samples


def summary(before: Snapshot | None, now: Snapshot) -> list[str]:
    """The lines above the table. `before` None: of a first look, which knows no rates."""

    def per_s(name: str) -> str:
        if before is None:
            return "…"
        return f"{max(0.0, now.total(name) - before.total(name)) / max(now.at_s - before.at_s, 1e-9):.1f}"

    queries = now.total("vllm:prefix_cache_queries_total")
    hits = f"{now.total('vllm:prefix_cache_hits_total') / queries:.0%}" if queries else "none asked"
    return [
        f"requests     {now.total('vllm:num_requests_running'):.0f} running, "
        f"{now.total('vllm:num_requests_waiting'):.0f} waiting",
        f"tokens/s     {per_s('vllm:generation_tokens_total')} generated, "
        f"{per_s('vllm:prompt_tokens_total')} of prompts",
        f"caches       {now.total('vllm:kv_cache_usage_perc'):.0%} of the KV cache in use, prefix hits {hits}",
    ]


def traffic(before: Snapshot | None, now: Snapshot) -> dict[str, tuple[str, str]]:
    """Adapter -> tokens per second, and seconds to the first token: of the requests since `before`, or of all if none
    has had one since. Nothing of servers that do not count by adapter."""

    def more(series: str) -> dict[str, float]:
        old = {} if before is None else before.by_adapter(series)
        # What is less than it was began again.
        return {name: v - old[name] if v >= old.get(name, v + 1) else v for name, v in now.by_adapter(series).items()}

    first = "flora_time_to_first_token_seconds"
    all_s, all_firsts = now.by_adapter(f"{first}_sum"), now.by_adapter(f"{first}_count")
    took_s, firsts, tokens = more(f"{first}_sum"), more(f"{first}_count"), more("flora_generation_tokens_total")
    shown = {}
    for name, count in tokens.items():
        rate = "…" if before is None else f"{count / max(now.at_s - before.at_s, 1e-9):.1f}"
        seconds, requests = (
            (took_s[name], firsts[name]) if firsts.get(name) else (all_s.get(name), all_firsts.get(name))
        )
        shown[name] = (rate, f"{seconds / requests:.2f} s" if seconds is not None and requests else "")
    return shown


def table(url: str, before: Snapshot | None, now: Snapshot) -> Any:
    """What is shown: a rich group of the summary and one row per adapter, busy ones first, then the rest in sum."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    states, counted = now.states(), traffic(before, now)
    columns = [name for name in DETAILS[:3] if any(name in entry for entry in now.details.values())]
    rates = ["tokens/s", "first token"] if counted else []
    shown = Table("adapter", "state", *rates, *columns, title=f"{len(states)} adapters at {url}", title_justify="left")
    order = {"running": 0, "waiting": 1}
    styles = {"running": "green", "waiting": "yellow"}
    for name, state in sorted(states.items(), key=lambda item: (order.get(item[1], 2), item[0])):
        details = now.details.get(name, {})
        told = state if state != "idle" else str(details.get("state", "idle"))
        cells = [str(details.get(column, "")) for column in columns]
        cells = [*counted.get(name, ("", ""))[: len(rates)], *cells]
        shown.add_row(Text(name), Text(told, style=styles.get(state, "")), *map(Text, cells))
    for name in counted.keys() - states.keys():
        shown.add_row(Text(name), Text(""), *map(Text, counted[name]), *[""] * len(columns))
    return Group(*map(Text, summary(before, now)), shown)
