"""`flora-vllm serve`: what it runs, and that a server which died comes back with the adapters it had by then.

The server here is a few lines of Python that answer like one and can be told to die: what is tested is the watching.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from flora_vllm.commands import serve, server_process

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
words = sys.argv[1:]
print("started", *words, os.environ["OMP_NUM_THREADS"], file=open(os.environ["SEEN"], "a"), flush=True)
if "--broken" in words:
    sys.exit(3)
adapters = dict(w.split("=", 1) for w in words if "=" in w and not w.startswith("-"))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(9)
        if self.path.startswith("/load?"):
            adapters.update([self.path[6:].split("=", 1)])
        cards = [{"id": "base", "root": "m", "parent": None}]
        cards += [{"id": n, "root": p, "parent": "base"} for n, p in adapters.items()]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": cards}).encode())
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    return tmp_path / "seen"


def start(tmp_path: Path, seen: Path, *words: str) -> subprocess.Popen[str]:
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "server.py"), "serve", "MODEL", *words]
    code = (
        f"from flora_vllm.commands.serve import Supervisor; import sys; sys.exit(Supervisor({command}, 0.1, 0.1).run())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env={**os.environ, "SEEN": str(seen)}
    )


def ask(port: int, path: str) -> list[str]:
    """Ask until the server answers: the names it lists."""
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
                return [card["id"] for card in json.load(response)["data"]]
        except OSError:
            if path == "/die" or time.monotonic() > end:
                return []
            time.sleep(0.05)


@pytest.fixture
def supervised(tmp_path: Path, seen: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    process = start(tmp_path, seen, "--port", str(port), "--lora-modules", f"a={tmp_path}/a", "--enforce-eager")
    with process:
        yield process
        if process.poll() is None:
            process.kill()


def test_a_dead_server_comes_back_with_its_adapters(supervised, tmp_path: Path, seen: Path, port: int) -> None:
    assert ask(port, f"/load?b={tmp_path}/b") == ["base", "a", "b"]
    ask(port, f"/load?c={tmp_path}/c")
    time.sleep(1.5)  # it is watched ten times a second
    (tmp_path / "c").rmdir()
    ask(port, "/die")
    assert ask(port, "/v1/models") == ["base", "a", "b"]
    supervised.send_signal(signal.SIGINT)
    _, said = supervised.communicate(timeout=60)
    assert supervised.returncode == 130
    assert "ended with status 9; again in" in said
    assert "adapter c:" in said
    first, second = seen.read_text().splitlines()
    assert second.count("--lora-modules") == 1
    assert f"--enforce-eager --lora-modules a={tmp_path}/a b={tmp_path}/b" in second
    assert first.split()[-1] == str(server_process.engine_threads())


def test_a_server_that_never_served_is_not_started_again(tmp_path: Path, seen: Path, port: int) -> None:
    with start(tmp_path, seen, "--port", str(port), "--broken") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "before it served" in said
    assert len(seen.read_text().splitlines()) == 1


def test_without_restart_it_becomes_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(serve.os, "execvpe", lambda *args: called.append(args))
    monkeypatch.setattr(serve, "memory_options", lambda command: [])  # as on a machine that is free
    monkeypatch.setattr(serve, "Supervisor", lambda command: pytest.fail(f"watched: {command}"))
    from flora_vllm.commands.cli import main

    with pytest.raises(AssertionError, match="exec returned"):
        main(["serve", "MODEL", "--max-loras", "4"])
    ((_, command, environment),) = called
    assert command[-5:] == ["serve", "MODEL", "--enable-flora", "--max-loras", "4"]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"]


@pytest.mark.parametrize(
    ("free", "words", "added"),
    [
        (990, [], []),
        (620, [], ["--gpu-memory-utilization", "0.49"]),
        (500, ["--gpu_memory_utilization=0.3"], []),
        (500, ["--kv-cache-memory-bytes", "1G"], []),
    ],
)
def test_a_cpus_memory_is_what_is_free(
    tmp_path: Path, monkeypatch, free: int, words: list[str], added: list[str]
) -> None:
    for node, here in enumerate((1000, free)):
        (tmp_path / f"node{node}").mkdir()
        lines = {"MemTotal": 1000, "MemFree": here - 30, "Active(file)": 10, "Inactive(file)": 10, "SReclaimable": 10}
        text = "".join(f"Node {node} {name}: {value} kB\n" for name, value in lines.items())
        (tmp_path / f"node{node}" / "meminfo").write_text(text)
    monkeypatch.setattr(serve, "NODES", tmp_path)
    assert serve.memory_options(["vllm", "serve", "MODEL", *words]) == added
