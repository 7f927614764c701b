"""Load for the serving benchmark: requests with ShareGPT lengths, sent to saturate a server or at a fixed rate."""

import asyncio
import csv
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

ZIPF_EXPONENT = 1.0
# Token ids that are plain text in any vocabulary of this size or larger.
TOKENS = range(1000, 9000)


@dataclass(frozen=True)
class Request:
    """One completion: prompt token ids, output tokens (exact), and the model or adapter it asks for."""

    prompt: tuple[int, ...]
    output_tokens: int
    model: str


@dataclass(frozen=True)
class Latency:
    """Of one streamed request, in seconds: until the first token, and between tokens on average."""

    first_token_s: float
    per_token_s: float


def read_lengths(path: Path | None, scale: float) -> list[tuple[int, int]]:
    """(prompt, output) tokens of 1,000 ShareGPT conversations times `scale`, at least 4 and 2.

    Without the file: the same means, exponentially distributed; the caller says so in its row.
    """
    if path is None:
        rng = random.Random(0)
        raw = [(rng.expovariate(1 / 259), rng.expovariate(1 / 214)) for _ in range(1000)]
    else:
        with path.open(newline="") as file:
            raw = [(float(row["prompt_tokens"]), float(row["output_tokens"])) for row in csv.DictReader(file)]
    return [(max(4, round(p * scale)), max(2, round(o * scale))) for p, o in raw]


def make_requests(lengths: Sequence[tuple[int, int]], count: int, pool: Sequence[str], law: str, seed: int):
    """`count` requests; each picks its model from `pool`, uniformly or by Zipf's law over the pool's order."""
    rng = random.Random(seed)
    weights = [1.0 if law == "uniform" else (i + 1) ** -ZIPF_EXPONENT for i in range(len(pool))]
    models = rng.choices(list(pool), weights, k=count)
    requests = []
    for model in models:
        prompt, output = rng.choice(lengths)
        requests.append(Request(tuple(rng.choices(TOKENS, k=prompt)), output, model))
    return requests


async def saturate(url: str, requests: Sequence[Request], concurrency: int) -> float:
    """Output tokens per second with always `concurrency` requests in flight. Raises on any failed request."""
    waiting = list(reversed(requests))
    async with _session() as session:

        async def client() -> None:
            while waiting:
                request = waiting.pop()
                async with session.post(f"{url}/completions", json=_body(request)) as response:
                    answer = await response.json()
                    if response.status != 200 or answer["usage"]["completion_tokens"] != request.output_tokens:
                        raise RuntimeError(f"request for {request.model} failed: {answer}")

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        elapsed_s = time.perf_counter() - start
    return sum(request.output_tokens for request in requests) / elapsed_s


async def at_rate(url: str, requests: Sequence[Request], rate_per_s: float, seed: int) -> list[Latency]:
    """Send with exponential gaps at `rate_per_s` and stream; the latency of every request."""
    rng = random.Random(seed)
    tasks = []
    async with _session() as session:
        for request in requests:
            tasks.append(asyncio.create_task(_stream(session, url, request)))
            await asyncio.sleep(rng.expovariate(rate_per_s))
        return list(await asyncio.gather(*tasks))


async def _stream(session: aiohttp.ClientSession, url: str, request: Request) -> Latency:
    start = time.perf_counter()
    times = []
    async with session.post(f"{url}/completions", json={**_body(request), "stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                if "error" in json.loads(line[6:]):
                    raise RuntimeError(f"request for {request.model} failed: {line!r}")
                times.append(time.perf_counter())
    gaps = max(1, request.output_tokens - 1)
    return Latency(times[0] - start, (times[-1] - times[0]) / gaps)


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0), raise_for_status=False
    )


def _body(request: Request) -> dict:
    return {
        "model": request.model,
        "prompt": list(request.prompt),
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
