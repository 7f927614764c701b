"""What `flora-vllm top` says of what a server publishes."""

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, generate_latest
from rich.console import Console

from flora_vllm.commands import top
from flora_vllm.commands.cli import main
from flora_vllm.commands.top import Snapshot, look, parse_metrics, summary, table, traffic
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
    info.labels(f"poems@{'0' * 64},odd \"name'", "legal@v2").set(report)
    labels = ["adapter_name", "family"]
    generated = Counter("flora_generation_tokens", "", labels, registry=registry)
    first = Summary("flora_time_to_first_token_seconds", "", labels, registry=registry)
    generated.labels("poems", "LORA").inc(tokens)
    generated.labels("other", "LORA").inc(8)
    first.labels("poems", "LORA").observe(tokens / 100)
    return generate_latest(registry).decode()


def snapshot(at_s: float, tokens: int) -> Snapshot:
    adapters = ("poems", "legal@v2", "quiet")
    return Snapshot(at_s, tuple(parse_metrics(published(tokens))), adapters, {"poems": {"rank": 4}})


def test_states_are_those_of_the_latest_report() -> None:
    expected = {"poems": "running", "legal@v2": "waiting", "quiet": "idle", "odd \"name'": "running"}
    assert snapshot(0, 0).states() == expected


def test_rates_are_between_two_looks() -> None:
    text = "\n".join(summary(snapshot(10, 100), snapshot(12, 160)))
    assert "3 running, 2 waiting" in text
    assert "30.0 generated, 0.0 of prompts" in text
    assert "25% of the KV cache in use, prefix hits 25%" in text
    assert "0.0 generated" in "\n".join(summary(snapshot(10, 100), snapshot(12, 5))), "a restarted server"


def test_tokens_and_first_tokens_are_by_adapter() -> None:
    rows = traffic(snapshot(10, 100), snapshot(12, 160))
    assert rows["poems"] == ("30.0", "1.60 s"), "no first token since: the mean of all"
    assert rows["other"] == ("0.0", "")
    assert traffic(None, snapshot(10, 100))["poems"] == ("…", "1.00 s")
    assert traffic(snapshot(10, 100), snapshot(12, 6))["poems"][0] == "3.0", "a restarted server"


def test_each_replica_behind_an_ingress_has_a_latest_report() -> None:
    def report(replica: str, at: float, running: str) -> tuple[str, dict[str, str], float]:
        return ("vllm:lora_requests_info", {"replica": replica, "running_lora_adapters": running}, at)

    found = Snapshot(0, (report("x", 9, "a"), report("y", 3, "b"), report("y", 2, "c")), ("a", "b", "c"), {})
    assert found.states() == {"a": "running", "b": "running", "c": "idle"}


def test_into_a_file_there_is_a_table_at_once_and_then_one_an_interval(server: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    printed: list[str] = []

    def sleep(seconds: float) -> None:
        assert seconds == 5
        printed.append(capsys.readouterr().out)
        if len(printed) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    with contextlib.suppress(KeyboardInterrupt):
        main(["top", server, "--every", "5"])
    assert len(printed) == 3
    assert all("poems" in text and "tokens/s" in text for text in printed)
    assert "…" in printed[0]
    assert "…" not in printed[1]


def test_the_table_has_busy_adapters_first_and_what_else_is_known() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(table("http://x", snapshot(0, 0), snapshot(1, 0)))
    text = out.getvalue()
    assert text.index("poems") < text.index("legal") < text.index("quiet")
    assert "rank" in text
    assert "bytes" not in text


@contextlib.contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that answers by `handler`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


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

    with answering(Handler) as url:
        yield url


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
    with pytest.raises(ConfigError, match="nonnumeric port: 'abc'"):
        look("http://localhost:abc")


def test_a_server_that_ends_in_the_middle_of_an_answer_is_told() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"vllm:")

        def log_message(self, *args) -> None:
            """Quiet."""

    with (
        answering(Handler) as url,
        pytest.raises(ConfigError, match=r"no vLLM server with metrics answers .*IncompleteRead"),
    ):
        look(url)
