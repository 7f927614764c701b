"""Runs a generated program of one of eight languages where it can do no harm, and says whether its tests passed.

A program gets an empty directory, limits on time, memory and file size, an environment without secrets, and
no network where the kernel lets an ordinary user make a namespace. That stops accidents, not an attacker: run the
benchmark where nothing is worth attacking.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TIME_S = 15
LIMITS = ("prlimit", f"--cpu={TIME_S}", f"--as={4 << 30}", f"--fsize={64 << 20}", "--core=0", "--")


@dataclass(frozen=True)
class Language:
    """The file a program is written to, the commands that run it, and a program that shows all it needs is there.

    `is_silent`: a program that passes writes no errors; Racket's rackunit ends with status 0 whatever its checks say.
    """

    file: str
    commands: tuple[tuple[str, ...], ...]
    probe: str
    is_silent: bool = False


LANGUAGES = {
    "lua": Language("main.lua", (("lua", "main.lua"),), 'require("luaunit")\n'),
    "perl": Language("main.pl", (("perl", "main.pl"),), "use Test::Deep;\n"),
    "rust": Language("main.rs", (("rustc", "-A", "warnings", "main.rs"), ("./main",)), "fn main() {}\n"),
    "racket": Language("main.rkt", (("racket", "main.rkt"),), "#lang racket\n(require rackunit)\n", True),
    "d": Language("main.d", (("ldc2", "-unittest", "-main", "main.d"), ("./main",)), "unittest {}\n"),
    "ruby": Language("main.rb", (("ruby", "main.rb"),), "require 'test/unit'\n"),
    "go": Language(
        "main_test.go", (("go", "test", "main_test.go"),), 'package p\nimport "testing"\nfunc TestP(t *testing.T) {}\n'
    ),
    "php": Language("main.php", (("php", "main.php"),), "<?php\n"),
}


def missing(language: str) -> str | None:
    """Why programs of `language` can't be run here, or None if they can."""
    wanted = LANGUAGES[language]
    tool = wanted.commands[0][0]
    if _find(tool) is None:
        return f"{tool} is not installed"
    if not run(language, wanted.probe):
        return f"{tool} is there, but this fails: {wanted.probe.strip()!r}"
    return None


def run(language: str, program: str) -> bool:
    """Whether `program` runs to its end with status 0 within the limits."""
    wanted = LANGUAGES[language]
    with tempfile.TemporaryDirectory(prefix="flora-sandbox-") as folder:
        Path(folder, wanted.file).write_text(program, encoding="utf-8")
        return all(_passes(command, Path(folder), wanted.is_silent) for command in wanted.commands)


def _passes(command: tuple[str, ...], folder: Path, is_silent: bool) -> bool:
    tool = command[0] if command[0].startswith("./") else _find(command[0])
    assert tool is not None, f"{command[0]} is not installed"
    home = {"HOME": str(folder), "TMPDIR": str(folder), "GOCACHE": str(folder / ".cache")}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*LIMITS, *_without_network(), tool, *command[1:]],
            cwd=folder,
            env={"PATH": os.defpath + os.pathsep + str(Path(tool).parent), "LANG": "C.UTF-8", **home},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=TIME_S) == 0 and not (is_silent and errors.tell())
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Whatever the program started goes with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@cache
def _without_network() -> tuple[str, ...]:
    """The words that put a command into a network namespace of its own, none where that isn't allowed (said once)."""
    words = ("unshare", "--map-root-user", "--net", "--")
    try:
        subprocess.run([*words, "true"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        print("sandbox: no network namespace here; programs could reach the network", file=sys.stderr)
        return ()
    return words


@cache
def _find(tool: str) -> str | None:
    found = shutil.which(tool)
    if found is None or tool != "rustc":
        return found
    # rustup's stand-in looks for its settings in HOME, which a program doesn't get.
    try:
        sysroot = subprocess.run([found, "--print", "sysroot"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return str(Path(sysroot.strip(), "bin", "rustc"))
