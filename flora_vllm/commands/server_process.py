"""A `vllm serve` process of our own, for the demo and the benchmarks: started, watched, and ended with its children."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from flora_vllm.errors import FloraError

READY_S = 600.0
ENGINE_END_S = 15.0  # after its server has ended
LOG_LINES = 25
KV_CACHE_BYTES = 512 << 20
# What libraries of vLLM say at the end of every process, and that means nothing.
NOISE = re.compile(r"nanobind:|\s*- leaked|.*resource_tracker:|\s*warnings\.warn\(|\s*See https://nanobind|$")


class ServerProcess:
    """`with ServerProcess(model, adapters) as server:` serves on `server.url` (…/v1) while the block runs.

    `flora` False starts plain vLLM; then `adapters` are loaded by vLLM's own LoRA. `options` are further
    `vllm serve` arguments. Raises FloraError with the end of the server's log if it does not start.
    """

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path] | None = None,
        *,
        flora: bool = True,
        served_name: str | None = None,
        options: Sequence[str] = (),
        eager: bool = True,
        quiet: bool = False,
    ) -> None:
        self._quiet = quiet
        self._port = _free_port()
        self._command = [*vllm_command(), "serve", str(model), "--host", "127.0.0.1", "--port", str(self._port)]
        self._command += ["--served-model-name", served_name] if served_name else []
        self._command += ["--enforce-eager"] if eager else []
        self._command += ["--enable-flora"] if flora else []
        if adapters:
            self._command += ["--enable-lora", "--lora-modules", *(f"{n}={p}" for n, p in adapters.items())]
            if "--max-loras" not in options:
                self._command += ["--max-loras", str(len(adapters))]
        if on_cpu():
            self._command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--max-model-len", "2048"]
        self._command += options
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="flora-server-", suffix=".log", delete=False)  # noqa: SIM115

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def __enter__(self) -> "ServerProcess":
        self._say(f"starting: {shlex.join(self._command)}")
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, env=server_environment(), start_new_session=True
        )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        if error is None:  # else it may say why
            self.log.unlink(missing_ok=True)

    @property
    def log(self) -> Path:
        return Path(self._log.name)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The server's status when it ends; None on Ctrl-C. Raises subprocess.TimeoutExpired."""
        assert self._process is not None, "not started"
        with contextlib.suppress(KeyboardInterrupt):
            return self._process.wait(timeout_s)
        return None

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        start = said = time.monotonic()
        while not self._answers():
            if process.poll() is not None:
                raise FloraError(f"the server ended with status {process.returncode}; {self._end_of_log()}")
            if time.monotonic() - start > READY_S:
                raise FloraError(f"the server was not ready after {READY_S:.0f} s; {self._end_of_log()}")
            # One line that is written over and over, or where none can be, a new one twice a minute.
            if time.monotonic() - said > (0.9 if sys.stderr.isatty() else 30):
                said = time.monotonic()
                self._say(f"  vLLM is starting, {said - start:.0f} s", end="\r" if sys.stderr.isatty() else "\n")
            time.sleep(0.25)
        self._say(f"  ready after {time.monotonic() - start:.0f} s    ")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _end_of_log(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if not NOISE.match(line)]
        return f"the end of {self._log.name}:\n" + "\n".join(lines[-LOG_LINES:])

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for number, patience_s in ((signal.SIGINT, 15.0), (signal.SIGKILL, 15.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
                break
        end_group(process.pid)
        self._log.close()

    def _say(self, text: str, end: str = "\n") -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True, end=end)


def end_group(leader: int, patience_s: float = ENGINE_END_S) -> None:
    """Wait for what outlives the ended leader of its group: an engine has files to remove. Then kill it."""
    with contextlib.suppress(ProcessLookupError):
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            os.killpg(leader, 0)
            time.sleep(0.05)
        os.killpg(leader, signal.SIGKILL)


def vllm_command() -> list[str]:
    """What runs `vllm` of this Python's environment."""
    beside = Path(sys.executable).with_name("vllm")
    command = str(beside) if beside.exists() else shutil.which("vllm")
    return [command] if command else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def engine_threads() -> int:
    """OpenMP threads of a CPU engine: OMP_NUM_THREADS, else all cores but one, which the HTTP server needs.

    An engine on every core waits at each of a step's barriers for the thread that the server has displaced.
    """
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) - 1))


def server_environment() -> dict[str, str]:
    """Ours where the user has not set it: vLLM would otherwise pin every CPU engine to the first core."""
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(engine_threads()),
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**defaults, **os.environ}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
