"""Steady streams of tokens through one server, and the times between their tokens while something else happens."""

import asyncio
import contextlib
import json
import os
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import aiohttp

PROMPT = list(range(1000, 1016))
# Of one request of a steady stream: what it is watched beside is over before it has them all and begins anew.
STEADY_TOKENS = 1900


async def first_token_s(session: aiohttp.ClientSession, url: str, model: str) -> float:
    """Seconds until the first token of one short request."""
    start = time.perf_counter()
    async for _ in _tokens(session, url, model, 2):
        return time.perf_counter() - start
    raise RuntimeError(f"{model} sent no token")


async def _tokens(session: aiohttp.ClientSession, url: str, model: str, count: int):
    """The time at which each token of one completion of exactly `count` tokens arrives."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
    async with session.post(f"{url}/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{model}: {response.status} {(await response.text())[:500]}")
        async for line in response.content:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
                yield time.perf_counter()


async def gaps_while(
    url: str, models: Sequence[str], work: Callable[[aiohttp.ClientSession], Awaitable[None]]
) -> list[float]:
    """Seconds between tokens of one stream per entry of `models`, while `work` runs. Raises what a stream raises."""
    gaps: list[float] = []
    stop = asyncio.Event()

    async def stream(session: aiohttp.ClientSession, model: str) -> None:
        while not stop.is_set():
            last = None
            async with contextlib.aclosing(_tokens(session, url, model, STEADY_TOKENS)) as tokens:
                async for at in tokens:
                    if stop.is_set():
                        break
                    if last is not None and begun.is_set():
                        gaps.append(at - last)
                    last = at

    begun = asyncio.Event()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        streams = [asyncio.create_task(stream(session, model)) for model in models]
        await asyncio.sleep(3.0)  # until all of them decode
        begun.set()
        try:
            await work(session)
        finally:
            stop.set()
            await asyncio.gather(*streams)
    return gaps


async def load(session: aiohttp.ClientSession, url: str, name: str, path: Path) -> float:
    """Load an adapter by the API; the seconds it took."""
    start = time.perf_counter()
    async with session.post(f"{url}/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)}) as response:
        if response.status != 200:
            raise RuntimeError(f"{name}: {response.status} {(await response.text())[:500]}")
    return time.perf_counter() - start


async def unload(session: aiohttp.ClientSession, url: str, name: str) -> None:
    async with session.post(f"{url}/unload_lora_adapter", json={"lora_name": name}) as response:
        if response.status != 200:
            raise RuntimeError(f"{name}: {response.status} {(await response.text())[:500]}")


def load_phases_s(url: str) -> float:
    """Seconds that this plugin's loads have spent on their work in the engine; 0 of a server without it."""
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics") as response:
        told = response.read().decode().splitlines()
    series = "flora_adapter_load_phase_seconds_total"
    return sum(float(line.rsplit(" ", 1)[1]) for line in told if line.startswith(series))


async def in_parallel(work: Sequence[Callable[[], Awaitable[object]]], width: int) -> None:
    """All of `work`, at most `width` at once."""
    free = asyncio.Semaphore(width)

    async def one(act: Callable[[], Awaitable[object]]) -> None:
        async with free:
            await act()

    await asyncio.gather(*(one(act) for act in work))


async def thrash(url: str, models: Sequence[str], requests: int, width: int) -> tuple[float, list[float]]:
    """(tokens/s, seconds to the first token of each request) of requests that go round `models`, `width` at once."""
    firsts: list[float] = []
    tokens = 0

    async def one(session: aiohttp.ClientSession, model: str) -> None:
        nonlocal tokens
        start, first = time.perf_counter(), None
        async for at in _tokens(session, url, model, 16):
            first = at - start if first is None else first
            tokens += 1
        assert first is not None, "the request sent no token"
        firsts.append(first)

    begin = time.perf_counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        chosen = [models[i % len(models)] for i in range(requests)]
        await in_parallel([lambda model=model: one(session, model) for model in chosen], width)
    return tokens / (time.perf_counter() - begin), firsts


def resident_bytes(pid: int) -> int:
    """Memory of a process and all below it: what is its own (PSS where the kernel tells, else RSS)."""
    total = 0
    for process in _family(pid):
        with contextlib.suppress(OSError):
            lines = (process / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def cpu_s(pid: int) -> float:
    """Seconds of a core that a process and all below it have taken since they began."""
    ticks = 0
    for process in _family(pid):
        with contextlib.suppress(OSError):
            ticks += sum(map(int, (process / "stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _family(pid: int) -> Iterator[Path]:
    """The directories of a process and all below it in /proc."""
    waiting = [pid]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        yield process
        with contextlib.suppress(OSError):
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())


def names(url: str) -> set[str]:
    with urllib.request.urlopen(f"{url}/models", timeout=60) as response:
        return {card["id"] for card in json.load(response)["data"]}
