"""`flora-vllm serve MODEL …`: `vllm serve MODEL --enable-flora …` with settings that fit this machine.

With --restart a server that has served and then ends is started again, with the adapters that it had by then, mixes
and uploads among them, but those whose directory is gone or that have a fault now (plugin/restarted.py). One that never
came up is not: the same command would fail again. One that has served and cannot come up again is tried without end,
after TRIES times with its command's adapters alone.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from types import FrameType

from flora_vllm.commands.own_server import adapters_in, address_in
from flora_vllm.commands.server_process import end_group, on_cpu, server_environment, vllm_command
from flora_vllm.plugin import restarted, scratch
from flora_vllm.plugin.access import CHOICE
from flora_vllm.plugin.mix_paths import CHOOSER_PREFIX, PREFIX, paths_in

EXAMPLES = """\
examples:
  flora-vllm serve MODEL --max-loras 16 --lora-modules poems=./poems
  flora-vllm serve MODEL --restart --flora-adapter-root ./adapters
  flora-vllm serve MODEL --help=FLoRA          # the options of adapters; `vllm serve --help` has all

Every other option is vLLM's and is passed on. On a CPU the engine gets all cores but one, which the HTTP server needs,
and is not pinned to one core, unless OMP_NUM_THREADS and VLLM_CPU_OMP_THREADS_BIND say otherwise; and of its memory
what is free, where --gpu-memory-utilization and --kv-cache-memory-bytes say nothing and other programs use some of it.
"""
MEMORY_FLAGS = {"--gpu-memory-utilization", "--kv-cache-memory-bytes", "--config"}
DEFAULT_SHARE = 0.92  # of a memory node, vLLM's
# What other programs use grows before the engine looks, a minute later; where they use nothing they do not.
IDLE_SHARE, KEPT = 0.95, 0.8
NODES = Path("/sys/devices/system/node")
WATCH_S = 2.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
TRIES = 3
# An upload that no adapter is from goes then: longer than one takes to arrive and be loaded.
UPLOAD_KEPT_S = 1800.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a model and adapters of every family: vllm serve MODEL --enable-flora, set up for here."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--restart", action="store_true", help="start a server that died again, with its adapters")
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    parser.add_argument("options", metavar="OPTIONS", nargs=argparse.REMAINDER, help="options of `vllm serve`")


def run(args: argparse.Namespace) -> int:
    """The server's exit status; 130 after Ctrl-C."""
    options = [word for word in args.options if word != "--restart"]
    command = [*vllm_command(), "serve", args.model, "--enable-flora", *options]
    if on_cpu():
        command += memory_options(command)
    if not (args.restart or len(options) < len(args.options)):
        sys.stdout.flush()
        os.execvpe(command[0], command, server_environment())
        raise AssertionError("exec returned")
    return Supervisor(command).run()


def memory_options(command: Sequence[str]) -> list[str]:
    """The share of a CPU's memory that is free, if vLLM's default is not: it would end with a traceback."""
    if not MEMORY_FLAGS.isdisjoint(word.partition("=")[0].replace("_", "-") for word in command):
        return []
    free = min(map(free_share, NODES.glob("node[0-9]*/meminfo")), default=1.0)
    if free >= IDLE_SHARE:
        return []
    share = math.floor(100 * KEPT * free) / 100
    _say(f"other programs use memory: --gpu-memory-utilization {share} in place of vLLM's {DEFAULT_SHARE}")
    return ["--gpu-memory-utilization", str(share)]


def free_share(meminfo: Path) -> float:
    """The part of a memory node that a program can have: as vLLM counts it, caches of files are free."""
    kilobytes = {words[2].rstrip(":"): int(words[3]) for words in map(str.split, meminfo.read_text().splitlines())}
    free = sum(kilobytes[name] for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
    return free / kilobytes["MemTotal"]


class Supervisor:
    """Runs `command` again and again until it is told to stop or the server never comes up."""

    def __init__(self, command: Sequence[str], watch_s: float = WATCH_S, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._command, self._watch_s, self._first_pause_s = list(command), watch_s, first_pause_s
        self._address = address_in(self._command)
        self._adapters: dict[str, str] | None = None  # None: those of its command
        self._is_followed = True
        self._process: subprocess.Popen[bytes] | None = None
        self._told: int | None = None

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        self._uploads = scratch.make(scratch.HANDED)
        try:
            return self._run()
        finally:
            scratch.remove(self._uploads)

    def _run(self) -> int:
        pause_s, fruitless, ever_served = self._first_pause_s, 0, False
        while True:
            started = time.monotonic()
            status, has_served = self._serve_once()
            if self._told is not None:
                return 130 if self._told == signal.SIGINT else status
            ever_served |= has_served
            if not ever_served:
                _say(f"the server ended with status {status} before it served; not started again")
                return status or 1
            fruitless = 0 if has_served else fruitless + 1
            if fruitless >= TRIES and self._adapters:
                _say(f"it did not come up with {', '.join(self._adapters)}; now with the adapters of its command alone")
                self._adapters = None
            pause_s = self._first_pause_s if time.monotonic() - started > LONGEST_PAUSE_S else pause_s
            count = "its command's" if self._adapters is None else len(self._adapters)
            _say(f"the server ended with status {status}; again in {pause_s:.0f} s with {count} adapter(s)")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _serve_once(self) -> tuple[int, bool]:
        """Run the server to its end: its status, and whether it ever answered."""
        has_served = False
        environment = {**server_environment(), scratch.KEPT_UPLOADS: str(self._uploads)}
        if self._adapters is not None:
            own = {name: restarted.place_of(path) for name, path in adapters_in(self._command).items()}
            environment[restarted.RESTARTED] = json.dumps(own)
        # Ctrl-C reaches this process alone, which passes it on once.
        with subprocess.Popen(self._with_adapters(), env=environment, start_new_session=True) as process:
            self._process = process
            while process.poll() is None:
                if self._follow():
                    has_served = True
                    self._remove_uploads()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self._watch_s)
            end_group(process.pid)  # a killed server's engine does not notice, and has the memory
            self._process = None
            return process.returncode, has_served

    def _with_adapters(self) -> list[str]:
        """The command with the adapters that the last server had; those whose directory is gone are left out."""
        if self._adapters is None:
            return self._command
        there = {name: root for name, root in self._adapters.items() if all(map(Path.is_dir, _directories(root)))}
        for name in self._adapters.keys() - there.keys():
            _say(f"adapter {name}: {self._adapters[name]} is gone; serving without it")
        kept, words = [], iter(self._command)
        for word in words:
            if word == "--lora-modules":
                word = next((w for w in words if w.startswith("-")), "")
            kept += [word] if word else []
        # As JSON: vLLM takes nothing else that has a comma, as mixes do, and no name is then taken for an option.
        modules = [json.dumps({"name": name, "path": path}) for name, path in there.items()]
        return [*kept, "--lora-modules", *modules] if there else kept

    def _follow(self) -> bool:
        """Whether the server answers; learns name -> directory of the adapters that it has, if it tells.

        Mixes that requests made are not among them: whoever asks for one makes it again, and may be the only one to.
        """
        try:
            status, body = self._address.get("/v1/models")
            if status == HTTPStatus.UNAUTHORIZED:
                self._cannot_follow("asks for a key, and none of --api-key or VLLM_API_KEY fits")
            if status != HTTPStatus.OK:
                return True  # it serves, and cannot say now what
            adapters = {card["id"]: card["root"] for card in json.loads(body)["data"] if card.get("parent")}
        except ssl.SSLEOFError:
            return False  # it ended meanwhile
        except ssl.SSLError as error:
            self._cannot_follow(f"refuses the supervisor's TLS ({error.reason})")
            return True
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
            return False
        self._adapters = {name: root for name, root in adapters.items() if not _is_made_by_a_request(name, root)}
        return True

    def _remove_uploads(self) -> None:
        """Those that no adapter is from any more."""
        used = {path for root in (self._adapters or {}).values() for path in paths_in(root) or [root]}
        for path in filter(Path.is_dir, self._uploads.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # it has got its name meanwhile
                if str(path) not in used and time.time() - path.stat().st_mtime > UPLOAD_KEPT_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _cannot_follow(self, reason: str) -> None:
        if self._is_followed:
            self._is_followed = False
            _say(f"the server {reason}: adapters that are loaded while it serves will not come back after a restart")

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._told = number
        if self._process is None:
            raise SystemExit(128 + number)
        self._process.send_signal(number)


def _is_made_by_a_request(name: str, root: str) -> bool:
    """Whether a mix was made by a request (mix_requests.py, choosers.py), and not loaded under a name."""
    return (name.startswith(PREFIX) or CHOICE in name) and paths_in(root) is not None


def _directories(root: str) -> list[Path]:
    """What must be there for an adapter to be loaded again: of a mix, its parts' directories."""
    paths = paths_in(root) or [root.removeprefix(CHOOSER_PREFIX)]
    # The path of one task of several is directory#task.
    return [Path(path if Path(path).is_dir() else path.rpartition("#")[0] or path) for path in paths]


def _say(text: str) -> None:
    print(f"flora-vllm serve: {text}", file=sys.stderr, flush=True)
