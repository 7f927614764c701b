"""More than one server process and more than one engine: each knows the adapters, or vLLM's own refusal says why."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from engine_support import LOGPROB_TOLERANCE
from server_support import BASE, TINY_OPTIONS, World, make_ask, make_world, serving

from flora_vllm.commands.top import parse_metrics

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

NO_LOADS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"}


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


def _counted(url: str) -> dict[str, tuple[float, float]]:
    """Adapter -> requests and generated tokens, as one of the servers tells over a connection of its own."""
    samples = parse_metrics(httpx.get(url.removesuffix("/v1") + "/metrics").raise_for_status().text)
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in samples:
        if name in ("flora_requests_total", "flora_generation_tokens_total"):
            found.setdefault(labels["adapter_name"], {})[name] = value
    return {name: (of["flora_requests_total"], of["flora_generation_tokens_total"]) for name, of in found.items()}


def test_two_servers_over_two_engines_serve_every_adapter(world: World) -> None:
    models = [BASE, *world.adapters]
    asks = [(model, make_ask(seed)) for seed, model in enumerate(models * 4)]
    options = ("--api-server-count", "2", "--data-parallel-size", "2", "--max-loras", "3")
    with serving(world.model, world.adapters, *options, environment=NO_LOADS) as client:
        # Many connections: both servers and both engines get some of them.
        answers = client.ask_all([(model, ask.prompt) for model, ask in asks])
        assert set(models) <= client.names()
        # Whichever server is asked: what both have counted, once each has written it down.
        expected = dict.fromkeys(world.adapters, (4.0, 32.0))
        deadline = time.monotonic() + 20
        while (counted := [_counted(client.url) for _ in range(6)]) != [expected] * 6 and time.monotonic() < deadline:
            time.sleep(1)
        assert counted == [expected] * 6
    oracle = world.oracle()
    for (model, ask), answer in zip(asks, answers, strict=True):
        assert oracle.error(world.states[model], ask, answer) < LOGPROB_TOLERANCE, model


def test_a_batch_file_names_adapters(world: World, tmp_path: Path) -> None:
    lines = [
        {
            "custom_id": model,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8,
                     "temperature": 0},
        }
        for model in (BASE, "flora1", "lora")
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    adapters = [f"{name}={world.adapters[name]}" for name in ("flora1", "lora")]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", "--model", str(world.model)]
    command += ["--served-model-name", BASE, *TINY_OPTIONS, "--enforce-eager"]
    command += ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    command += ["--enable-flora", "--lora-modules", *adapters]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {r["custom_id"]: r for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert {name: result["response"]["status_code"] for name, result in results.items()} == dict.fromkeys(
        (BASE, "flora1", "lora"), 200
    )
    texts = {result["response"]["body"]["choices"][0]["message"]["content"] for result in results.values()}
    assert len(texts) == 3
