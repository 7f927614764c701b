"""A real server, flooded with one key: when another key's request is answered."""

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_support import BASE, make_ask, serving

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

FLOOD, AT_ONCE = 40, 2
OPERATOR, LOUD, QUIET = "key-of-the-operator", "key-of-loud", "key-of-quiet"


class Door:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, route: str, key: str, body: Any = None) -> str:
        # Ours to set only: a client that says so itself says it in vain.
        headers = {"authorization": f"Bearer {key}", "x-flora-share": "tenant quiet"}
        headers |= {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
        response = self._http.request("GET" if body is None else "POST", route, headers=headers, json=body)
        return response.raise_for_status().text

    def complete(self, key: str, seed: int, tokens: int) -> float:
        """When it was answered."""
        body = {"model": BASE, "prompt": list(make_ask(seed).prompt), "max_tokens": tokens, "ignore_eos": True}
        self.ask("/v1/completions", key, body)
        return time.monotonic()

    def waiting(self) -> float:
        told = text_string_to_metric_families(self.ask("/metrics", OPERATOR))
        return sum(s.value for family in told if family.name == "vllm:num_requests_waiting" for s in family.samples)


def answered_before_quiet(door: Door) -> int:
    """How many of a flood's requests are answered while a quiet tenant waits for its first token."""
    with ThreadPoolExecutor(FLOOD) as pool:
        flood = [pool.submit(door.complete, LOUD, seed, 480) for seed in range(FLOOD)]
        # Of forty new connections some wait seconds to be taken. This one is open by now.
        while door.waiting() < FLOOD // 2 + AT_ONCE:
            assert not all(one.done() for one in flood), "answered one by one: never a queue"
            time.sleep(0.02)  # each look is a request beside the flood
        asked = time.monotonic()
        answered = door.complete(QUIET, FLOOD, 1)
        return sum(asked < one.result() < answered for one in flood)


@pytest.mark.parametrize("shares", ["none", "key"])
def test_a_flood_with_one_key_is_not_before_another_keys_request(
    shares: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in (("loud", LOUD), ("quiet", QUIET))}
    tenants = [{"name": name, "key_sha256": [digest], "adapters": ["*"]} for name, digest in digests.items()]
    (tmp_path / "acl.json").write_text(json.dumps({"tenants": tenants}))
    options = ["--api-key", OPERATOR, "--adapter-acl", str(tmp_path / "acl.json"), "--max-num-seqs", str(AT_ONCE)]
    with serving(tiny_model("llama"), {}, *options, "--adapter-shares", shares) as client:
        root = client.url.removesuffix("/v1")
        with httpx.Client(base_url=root, timeout=300, limits=httpx.Limits()) as http:
            between = answered_before_quiet(Door(http))
    if shares == "none":
        assert between >= FLOOD // 2, "as plain vLLM: all that came before"
    else:
        # One place gets free, and what ends while answers travel.
        assert between <= FLOOD // 5
