"""The wheel installs alone: a new environment that has only what the package asks for, then doctor, inspect, deploy."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from flora_vllm import __version__
from flora_vllm.formats import write_flora

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out)]
    command += ["--disable-pip-version-check", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the wheel, and with this environment's packages behind it but for the flora_vllm that is installed here."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    behind = tmp_path_factory.mktemp("behind")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("flora_vllm", "_flora_vllm", "__editable__.flora")):
            (behind / entry.name).symlink_to(entry)
    (packages / "behind.pth").write_text(f"{behind}\n")
    # `vllm` is looked for beside Python.
    (place / "bin" / "vllm").write_text(
        f"#!{place}/bin/python\nimport sys\nfrom vllm.entrypoints.cli.main import main\nsys.exit(main())\n"
    )
    (place / "bin" / "vllm").chmod(0o755)
    return place


def run(environment: Path, command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The installed command, in a folder from which nothing of this repository can be imported."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(environment / "bin" / command[0]), *command[1:]]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False, timeout=800)


def test_it_holds_what_the_package_reads_at_run_time(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = [path for path in (ROOT / "flora_vllm").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {f"{path.relative_to(ROOT)}" for path in sources} <= names


def test_commands_run_from_it_alone(environment: Path, tmp_path: Path) -> None:
    shown = run(environment, ["python", "-c", "import flora_vllm; print(flora_vllm.__file__)"], tmp_path)
    assert shown.stdout.startswith(str(environment)), shown.stderr
    assert run(environment, ["flora-vllm", "--version"], tmp_path).stdout == f"flora-vllm {__version__}\n"
    factors = {"model.layers.0.self_attn.q_proj": (torch.ones(1, 8), torch.ones(4, 1))}
    write_flora(tmp_path / "adapter", factors)
    inspected = run(environment, ["flora-vllm", "inspect", "adapter"], tmp_path)
    assert "servable  yes" in inspected.stdout, inspected.stderr
    assert "kind: InferenceService" in run(environment, ["flora-vllm", "deploy", "kserve"], tmp_path).stdout


@pytest.mark.engine
def test_doctor_says_that_it_can_serve(environment: Path, tmp_path: Path) -> None:
    done = run(environment, ["flora-vllm", "doctor"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this installation can serve" in done.stdout
    assert shutil.which("vllm", path=str(environment / "bin"))
