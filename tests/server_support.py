"""A real server over a tiny model with adapters of every family, and the merged weights that judge its answers."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import openai
import peft
import torch
from engine_support import Answer, Ask, Oracle, State, load, prompt, save_peft_adapter, write_flora_adapter

from flora_vllm.commands.server_process import ServerProcess

TINY_OPTIONS = ("--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20))
BASE = "base"


@dataclass(frozen=True)
class World:
    """A model, its adapters on disk by name, and the weights each amounts to (BASE included)."""

    model: Path
    adapters: Mapping[str, Path]
    states: Mapping[str, State]

    def oracle(self) -> Oracle:
        return Oracle(load(self.model))


def make_world(model: Path, folder: Path) -> World:
    """FLoRA of ranks 1, 2 (sum) and 5 (some modules), LoRA, IA3 and HiRA, far from the base and from each other."""
    base = load(model)
    some = [n for n, _ in base.named_modules() if n.endswith(("q_proj", "down_proj"))]
    states: dict[str, State] = {BASE: dict(base.state_dict())}
    states["flora1"] = write_flora_adapter(base, folder / "flora1", 1, "mean", 1)
    states["flora2"] = write_flora_adapter(base, folder / "flora2", 2, "sum", 2)
    states["flora5"] = write_flora_adapter(base, folder / "flora5", 5, "mean", 3, some)
    configs: dict[str, peft.PeftConfig] = {
        "lora": peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "hira": peft.HiraConfig(r=4, target_modules=["q_proj", "gate_proj"]),
    }
    for seed, (name, config) in enumerate(configs.items()):
        states[name] = save_peft_adapter(model, folder / name, config, seed)
    return World(model, {name: folder / name for name in states if name != BASE}, states)


class Client:
    """The `openai` client and the two admin routes of one server; `pid`: its process."""

    def __init__(self, url: str, pid: int = 0) -> None:
        self.url, self.pid = url, pid
        self.openai = openai.OpenAI(base_url=url, api_key="none", timeout=300, max_retries=0)
        # Connections are kept, for less than the server keeps them: of hundreds of new ones some wait a second or two.
        self._http = httpx.Client(timeout=300, limits=httpx.Limits(keepalive_expiry=2))

    def __del__(self) -> None:
        self._http.close()

    def ask(self, model: str, tokens: Sequence[int], new: int = 8, **more: Any) -> Answer:
        completion = self.openai.completions.create(
            model=model,
            prompt=list(tokens),
            max_tokens=new,
            temperature=0,
            logprobs=5,
            extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
            **more,
        )
        assert completion.model == model, "the response must carry the plain name the client asked for"
        return answer_of(completion.choices[0])

    def ask_all(self, asks: Sequence[tuple[str, Sequence[int]]], new: int = 8) -> list[Answer]:
        """All at once."""
        with ThreadPoolExecutor(len(asks)) as pool:
            return list(pool.map(lambda one: self.ask(*one, new=new), asks))

    def names(self) -> set[str]:
        return {card.id for card in self.openai.models.list()}

    def metric(self, name: str) -> float:
        """Sum of a Prometheus counter over its labels."""
        lines = self._http.get(self.url.removesuffix("/v1") + "/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def post(self, route: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """(status, message) of an admin call."""
        headers = {"content-type": "application/json"}
        response = self._http.post(f"{self.url}/{route}", content=json.dumps(body), headers=headers)
        if response.is_success:
            return response.status_code, response.text
        try:
            return response.status_code, response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return response.status_code, response.text

    def load(self, name: str, path: Path | str, **more: Any) -> tuple[int, str]:
        return self.post("load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("unload_lora_adapter", {"lora_name": name})


def answer_of(choice: Any) -> Answer:
    def number(token: str) -> int:
        return int(token.removeprefix("token_id:"))

    places = tuple({number(t): value for t, value in place.items()} for place in choice.logprobs.top_logprobs)
    return Answer(tuple(number(token) for token in choice.logprobs.tokens), places)


def regret(oracle: Oracle, state: State, ask: Ask, answer: Answer) -> float:
    """How much likelier than the served token the oracle's choice was, at worst: rounding decides near ties only.

    For long answers, in which a near tie is to be expected; other weights would show as differences of order 1.
    """
    whole = oracle.logprobs(state, ask.prompt + answer.tokens)[len(ask.prompt) - 1 : -1]
    served = whole.gather(-1, torch.tensor(answer.tokens).unsqueeze(-1)).squeeze(-1)
    return float((whole.max(-1).values - served).max())


def make_ask(seed: int, length: int = 24) -> Ask:
    return Ask(prompt(length, seed))


@contextlib.contextmanager
def serving(
    model: Path, adapters: Mapping[str, Path], *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Client]:
    more = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "OMP_NUM_THREADS": "1", **(environment or {})}
    with (
        mock.patch.dict(os.environ, more),
        ServerProcess(model, adapters, served_name=BASE, options=[*TINY_OPTIONS, *options], quiet=True) as server,
    ):
        yield Client(server.url, server.pid)


@contextlib.contextmanager
def under_load(client: Client, world: World, models: Sequence[str]) -> Iterator[None]:
    """Ask `models` all the time in the background; on leaving, every answer must have been the oracle's."""
    stop = threading.Event()
    found: list[tuple[str, Ask, Answer]] = []
    errors: list[BaseException] = []

    def work(model: str, seed: int) -> None:
        try:
            while not stop.is_set():
                ask = make_ask(seed)
                found.append((model, ask, client.ask(model, ask.prompt)))
        except BaseException as error:  # handed to the main thread below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(m, i), daemon=True) for i, m in enumerate(models)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    assert not errors, f"a request of another tenant failed: {errors[0]!r}"
    assert len(found) >= len(models)
    oracle = world.oracle()
    for model, ask, answer in found[:: max(1, len(found) // 20)]:
        assert oracle.error(world.states[model], ask, answer) < 1e-4
