"""`flora-vllm serve`: what it runs, and that a server which died comes back with the adapters it had by then.

The server here is a few lines of Python that answer like one and can be told to die: what is tested is the watching.
"""

import contextlib
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
from urllib.parse import quote

import pytest

from flora_vllm.commands import serve, server_process
from flora_vllm.commands.own_server import ServerAddress, adapters_in, address_in
from flora_vllm.plugin.restarted import place_of

SERVER = """
import json, os, socket, ssl, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import unquote
words = sys.argv[1:]
print("started", *words, os.environ["OMP_NUM_THREADS"], file=open(os.environ["SEEN"], "a"), flush=True)
told = {name: os.environ.get(name) for name in ("FLORA_KEPT_UPLOADS", "FLORA_RESTARTED")}
print(json.dumps(told), file=open(os.environ["SEEN"] + ".told", "a"), flush=True)
if "--broken" in words or any(w.startswith('{"name": "bad"') for w in words):
    sys.exit(3)
adapters = {}
for w in words[words.index("--lora-modules") + 1:] if "--lora-modules" in words else ():
    if w.startswith("-"):
        break
    # As vLLM's LoRAParserAction.
    name, path = w.split("=", 1) if "=" in w and "," not in w else json.loads(w).values()
    adapters[name] = path
settings = dict(zip(words, [*words[1:], ""]))
if "--config" in words:
    lines = [line.split(": ") for line in open(settings["--config"]).read().splitlines()]
    settings = {**{f"--{name}": value for name, value in lines}, **settings}
asked = 0
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        # What waits for a server to be asked reads its process here.
        print(os.getpid(), file=open(os.environ["SEEN"] + ".asked", "a"), flush=True)
        if self.path == "/die":
            os._exit(9)
        if self.path.startswith("/load?"):
            adapters.update([unquote(self.path[6:]).split("=", 1)])
        if self.path.startswith("/unload?"):
            del adapters[self.path[8:]]
        cards = [{"id": "base", "root": "m", "parent": None}]
        cards += [{"id": n, "root": p, "parent": "base"} for n, p in adapters.items()]
        key = settings.get("--api-key")
        is_known = key is None or self.headers["Authorization"] == f"Bearer {key}"
        self.send_response(200 if is_known and "--locked" not in words else 401)
        body = json.dumps({"data": cards}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "--cut" in words and asked > 1:
            self.wfile.write(body[:5])
            self.wfile.flush()
            os._exit(9)
        self.wfile.write(body)
    def address_string(self):
        return ""
    def log_message(self, *args):
        pass
if "--uds" in words:
    class UnixServer(HTTPServer):
        address_family = socket.AF_UNIX
        def server_bind(self):
            if os.path.exists(self.server_address):
                os.unlink(self.server_address)
            self.socket.bind(self.server_address)
    server = UnixServer(settings["--uds"], Handler)
else:
    server = HTTPServer((settings.get("--host", "127.0.0.1"), int(settings["--port"])), Handler)
if "--ssl-certfile" in settings:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(settings["--ssl-certfile"], settings["--ssl-keyfile"])
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    return tmp_path / "seen"


def start(tmp_path: Path, seen: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "server.py"), "serve", "MODEL", *words]
    code = (
        f"from flora_vllm.commands.serve import Supervisor; import sys; sys.exit(Supervisor({command}, 0.1, 0.1).run())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SEEN": str(seen), **environment},
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


def told(seen: Path) -> list[dict[str, str | None]]:
    """What each server was told by its environment."""
    return [json.loads(line) for line in Path(f"{seen}.told").read_text().splitlines()]


@pytest.fixture
def supervised(tmp_path: Path, seen: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    process = start(tmp_path, seen, "--port", str(port), "--lora-modules", f"a={tmp_path}/a", "--enforce-eager")
    with process:
        yield process
        if process.poll() is None:
            process.kill()


def let_supervisor_look() -> None:
    """It asks the server for its adapters ten times a second, and shows nobody what it has heard."""
    time.sleep(1.5)


def test_a_dead_server_comes_back_with_its_adapters(supervised, tmp_path: Path, seen: Path, port: int) -> None:
    assert ask(port, f"/load?b={tmp_path}/b") == ["base", "a", "b"]
    ask(port, f"/load?c={tmp_path}/c")
    let_supervisor_look()
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
    modules = [json.dumps({"name": name, "path": f"{tmp_path}/{name}"}) for name in ("a", "b")]
    assert f"--enforce-eager --lora-modules {' '.join(modules)}" in second
    assert first.split()[-1] == str(server_process.engine_threads())


def test_mixes_and_choosers_come_back(supervised, tmp_path: Path, seen: Path, port: int) -> None:
    parts = [[0.7, "a@1", f"{tmp_path}/a"], [0.3, "b@2", f"{tmp_path}/b#task"]]
    long = [[0.1, f"n{i}@{i}", str(tmp_path / "a")] for i in range(200)]  # no path: it would be too long for one
    told = {"mixed": parts, "long": long, "lost": [*parts, [1.0, "d@3", f"{tmp_path}/d"]]}
    told |= {"mix:a*0.7": parts[:1], "chosen?a*0.7": parts[:1]}  # made by requests
    for name, mix in told.items():
        ask(port, f"/load?{quote(f'{name}=mix:{json.dumps(mix)}')}")
    ask(port, f"/load?chosen=dlp:{tmp_path}/c")
    let_supervisor_look()
    ask(port, "/die")
    assert ask(port, "/v1/models") == ["base", "a", "mixed", "long", "chosen"]
    supervised.send_signal(signal.SIGINT)
    assert "adapter lost:" in supervised.communicate(timeout=60)[1]
    assert json.dumps({"name": "mixed", "path": f"mix:{json.dumps(parts)}"}) in seen.read_text()


def test_uploads_come_back_and_go_when_they_are_not_served(supervised, tmp_path: Path, seen: Path, port: int) -> None:
    ask(port, "/v1/models")
    folder = Path(told(seen)[0]["FLORA_KEPT_UPLOADS"])
    for name in ("served", "arriving", "unloaded"):
        (folder / name).mkdir()
    ask(port, f"/load?sent={folder}/served")
    let_supervisor_look()
    for name in ("served", "unloaded"):
        os.utime(folder / name, (0, 0))
    end = time.monotonic() + 60
    while (folder / "unloaded").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"served", "arriving"}
    ask(port, "/die")
    assert ask(port, "/v1/models") == ["base", "a", "sent"]
    supervised.send_signal(signal.SIGINT)
    supervised.communicate(timeout=60)
    assert not folder.exists()
    assert [one["FLORA_KEPT_UPLOADS"] for one in told(seen)] == [str(folder)] * 2
    own = json.dumps({"a": f"{tmp_path}/a"})
    assert [one["FLORA_RESTARTED"] for one in told(seen)] == [None, own], "see test_restarted.py"


def test_what_was_unloaded_does_not_come_back(supervised, seen: Path, port: int) -> None:
    assert ask(port, "/unload?a") == ["base"]
    let_supervisor_look()
    ask(port, "/die")
    assert ask(port, "/v1/models") == ["base"]
    supervised.send_signal(signal.SIGINT)
    assert "again in 0 s with 0 adapter(s)" in supervised.communicate(timeout=60)[1]
    assert "--lora-modules" not in seen.read_text().splitlines()[1]


def test_what_keeps_a_server_from_coming_back_is_left_out_in_the_end(
    supervised, tmp_path: Path, seen: Path, port: int
) -> None:
    ask(port, f"/load?bad={tmp_path}/b")
    let_supervisor_look()
    ask(port, "/die")
    assert ask(port, "/v1/models") == ["base", "a"]
    assert seen.read_text().count('"bad"') == serve.TRIES
    supervised.send_signal(signal.SIGINT)
    _, said = supervised.communicate(timeout=60)
    assert "did not come up with a, bad" in said


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The supervisor, with its server no longer there after the block."""
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def _wait_for_lines(path: Path, count: int) -> list[str]:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if path.exists() and len(lines := path.read_text().splitlines()) >= count:
            return lines
        time.sleep(0.05)
    raise AssertionError(f"fewer than {count} lines in {path.name}")


def _killed_once_asked(process: subprocess.Popen[str], seen: Path) -> str:
    """Kill the supervised server after its second question, wait for its successor, and end: what was said."""
    asked = seen.with_name(f"{seen.name}.asked")
    os.kill(int(_wait_for_lines(asked, 2)[0]), signal.SIGKILL)
    end = time.monotonic() + 30
    while process.poll() is None and len(set(asked.read_text().split())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "ended with status -9; again in" in said
    return said


@pytest.mark.parametrize("where", ["host", "uds", "tls", "config", "proxy", "key"])
def test_a_server_is_reached_wherever_it_listens(tmp_path: Path, seen: Path, port: int, where: str) -> None:
    environment = {}
    words = ["--port", str(port), "--lora-modules", f"a={tmp_path}/a"]
    if where == "host":
        words += ["--host", "127.0.0.2"]
    elif where == "uds":
        words += ["--uds", str(tmp_path / "socket")]
    elif where == "tls":
        key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
        made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=elsewhere", "-days", "1"]
        subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
        words += ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    elif where == "config":
        (tmp_path / "config.yaml").write_text(f"host: 127.0.0.2\nport: {port}\napi-key: secret\n")
        words = [*words[2:], "--config", str(tmp_path / "config.yaml")]
    elif where == "proxy":
        environment = {"http_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    else:
        words += ["--api-key", "secret"]
    (tmp_path / "a").mkdir()
    with _ended(start(tmp_path, seen, *words, **environment)) as process:
        said = _killed_once_asked(process, seen)
    assert "again in 0 s with 1 adapter(s)" in said
    assert "will not come back" not in said


def test_what_cannot_be_followed_is_said_once_and_served_again(tmp_path: Path, seen: Path, port: int) -> None:
    with _ended(start(tmp_path, seen, "--port", str(port), "--locked")) as process:
        said = _killed_once_asked(process, seen)
    assert said.count("will not come back after a restart") == 1


def test_a_server_killed_in_an_answer_is_started_again(tmp_path: Path, seen: Path, port: int) -> None:
    with _ended(start(tmp_path, seen, "--port", str(port), "--cut")) as process:
        _wait_for_lines(seen, 2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert "IncompleteRead" not in said
    assert "ended with status 9; again in" in said


def test_an_address_is_what_vllm_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "ours")
    config = tmp_path / "config.yaml"
    config.write_text("port: 9000\nhost: 10.0.0.1\napi_key: [one, two]\nenforce-eager: true\n")
    command = ["vllm", "serve", "MODEL"]
    assert address_in(command) == ServerAddress("127.0.0.1", 8000, key="ours")
    assert address_in([*command, "--host", "::", "--port=1", "--port", "2"]) == ServerAddress("::1", 2, key="ours")
    configured = [*command, "--config", str(config)]
    assert address_in(configured) == ServerAddress("10.0.0.1", 9000, key="one")
    assert address_in([*configured, "--api-key", "three", "--host=0.0.0.0"]) == ServerAddress(
        "127.0.0.1", 9000, key="three"
    )
    config.write_text("[not: closed")
    assert address_in([*configured, "--ssl_certfile=c"]) == ServerAddress("127.0.0.1", 8000, is_tls=True, key="ours")


def test_a_commands_own_adapters_are_told_from_others(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text('lora-modules: [c=/c, \'{"name": "d", "path": "dlp:/d"}\']\n')
    command = ["vllm", "serve", "MODEL", "--config", str(config)]
    assert adapters_in(command) == {"c": "/c", "d": "dlp:/d"}
    words = ["--lora_modules", "a=x/../a", '{"name": "b", "path": "/b", "base_model_name": "m"}', "{", "--port", "1"]
    assert adapters_in([*command, *words]) == {"a": "x/../a", "b": "/b"}
    assert [place_of(path) for path in ("x/../a", "dlp:/d/", "~")] == [
        str(Path("a").absolute()),
        "/d",
        str(Path.home()),
    ]


def test_a_killed_servers_engine_does_not_stay() -> None:
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid); sys.stdout.flush(); sys.exit(1)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        engine = int(server.stdout.readline())
    assert _runs(engine)
    server_process.end_group(server.pid, patience_s=0.1)
    end = time.monotonic() + 10
    while _runs(engine) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(engine)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
