"""What `flora-vllm top` says of what a server publishes."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from rich.console import Console

from flora_vllm.commands.cli import main
from flora_vllm.commands.top import Snapshot, look, parse_metrics, summary, table
from flora_vllm.errors import ConfigError


def published(tokens: int, report: float = 5.0) -> str:
    """Metrics as vLLM's own library writes them."""
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "", ["engine"], registry=registry).labels("0").set(3)
    Gauge("vllm:num_requests_waiting", "", ["engine"], registry=registry).labels("0").set(2)
    Gauge("vllm:kv_cache_usage_perc", "", registry=registry).set(0.25)
    Counter("vllm:generation_tokens", "", registry=registry).inc(tokens)
    Counter("vllm:prefix_cache_queries", "", registry=registry).inc(200)
    Counter("vllm:prefix_cache_hits", "", registry=registry).inc(50)
    info = Gauge("vllm:lora_requests_info", "", ["running_lora_adapters", "waiting_lora_adapters"], registry=registry)
    info.labels("old", "").set(report - 1)
    info.labels("poems@abc,odd \"name'", "legal").set(report)
    return generate_latest(registry).decode()


def snapshot(at_s: float, tokens: int) -> Snapshot:
    return Snapshot(at_s, tuple(parse_metrics(published(tokens))), ("poems", "legal", "quiet"), {"poems": {"rank": 4}})


def test_states_are_those_of_the_latest_report() -> None:
    expected = {"poems": "running", "legal": "waiting", "quiet": "idle", "odd \"name'": "running"}
    assert snapshot(0, 0).states() == expected


def test_rates_are_between_two_looks() -> None:
    text = "\n".join(summary(snapshot(10, 100), snapshot(12, 160)))
    assert "3 running, 2 waiting" in text
    assert "30.0 generated, 0.0 of prompts" in text
    assert "25% of the KV cache in use, prefix hits 25%" in text
    assert "0.0 generated" in "\n".join(summary(snapshot(10, 100), snapshot(12, 5))), "a restarted server"


def test_the_table_has_busy_adapters_first_and_what_else_is_known() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(table("http://x", snapshot(0, 0), snapshot(1, 0)))
    text = out.getvalue()
    assert text.index("poems") < text.index("legal") < text.index("quiet")
    assert "rank" in text
    assert "bytes" not in text


@pytest.fixture
def server():
    """Answers like a vLLM server that wants a key and has no list of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            bodies = {
                "/metrics": published(7),
                "/v1/models": json.dumps({"data": [{"id": "base", "parent": None}, {"id": "poems", "parent": "base"}]}),
            }
            allowed = self.headers["Authorization"] == "Bearer secret"
            body = bodies.get(self.path, "") if allowed else ""
            self.send_response(200 if body else 404 if allowed else 401)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_once_prints_one_table(server: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert main(["top", f"{server}/v1/", "--once"]) == 0
    text = capsys.readouterr().out
    assert "poems" in text
    assert "base" not in text


def test_nobody_there_and_no_key_are_told(server: str, monkeypatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="401"):
        look(server)
    with pytest.raises(ConfigError, match=r"no vLLM server with metrics answers at http://127\.0\.0\.1:1"):
        look("http://127.0.0.1:1")
