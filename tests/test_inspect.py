"""`flora-vllm inspect`: one JSON object or a readable summary, never a traceback."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formats_support import edit_config, edit_tensors, save_peft_adapter, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from flora_vllm.commands import inspect as inspect_command
from flora_vllm.errors import in_kinds
from flora_vllm.formats import content_digest

torch.set_num_threads(1)

KEYS = {"family", "rank", "modules", "bytes", "digest", "servable", "caution", "faults"}


def inspect(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    return inspect_command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A base model, and a LoRA adapter of its query projections, rank 4."""
    path = tmp_path_factory.mktemp("saved")
    model = tiny_model("llama")
    model.save_pretrained(path / "base")
    save_peft_adapter(model, LoraConfig(r=4, target_modules=["q_proj"]), path / "adapter")
    return path


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copy / name).write_bytes((saved / "adapter" / name).read_bytes())
    return copy


def json_of(capsys, *arguments: str | Path) -> tuple[int, dict]:
    status = inspect(*arguments, "--json")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    found = json.loads(captured.out)
    assert set(found) == KEYS
    assert found["servable"] is (status == 0) is (not found["faults"])
    return status, found


def test_json_of_a_good_adapter(saved: Path, capsys) -> None:
    for extra in ([], ["--base", saved / "base"]):
        status, found = json_of(capsys, saved / "adapter", *extra)
        assert status == 0
        assert found == {
            "family": "LORA",
            "rank": 4,
            "modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(2)],
            "bytes": 2 * 4 * (64 + 64) * 4,
            "digest": content_digest(saved / "adapter"),
            "servable": True,
            "caution": None,
            "faults": [],
        }


def test_text_of_a_good_adapter(saved: Path, capsys) -> None:
    assert inspect(saved / "adapter") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == KEYS - {"faults", "caution"}
    assert (lines["family"], lines["rank"], lines["modules"], lines["servable"]) == ("LORA", "4", "2", "yes")


def test_all_faults_are_shown(adapter: Path, capsys) -> None:
    edit_config(adapter, use_magic=1, r=0)
    status, found = json_of(capsys, adapter)
    assert status == 1
    assert (found["family"], found["rank"], found["modules"], found["bytes"]) == ("LORA", None, [], None)
    assert found["digest"] == content_digest(adapter)
    assert len(found["faults"]) == 2
    assert inspect(adapter) == 1
    text = capsys.readouterr().out
    assert "servable  no" in text
    assert all(f"  - {fault}" in text for fault in found["faults"])


def test_faults_of_one_kind_are_one_line(saved: Path, adapter: Path, capsys) -> None:
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in range(2)]
    edit_tensors(adapter, **{name: torch.full((4, 64), torch.nan) for name in names})
    _, found = json_of(capsys, adapter)
    assert len(found["faults"]) == 2, "machines get all of them"
    assert inspect(adapter) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  - ")]
    assert len(lines) == 1
    assert lines[0].endswith("(and 1 more like it)")
    assert names[0] in lines[0]
    assert in_kinds(["a", "b", "a"]) == ["a (and 1 more like it)", "b"]


def test_base_model_is_checked(saved: Path, adapter: Path, capsys) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(adapter, **{name: torch.ones(63, 4)})
    assert json_of(capsys, adapter)[0] == 0
    status, found = json_of(capsys, adapter, "--base", saved / "base")
    assert status == 1
    assert name in found["faults"][0]
    assert "64 (out features)" in found["faults"][0]


@pytest.mark.parametrize("base", ["./nowhere", "no such model", "org/not-in-the-cache"])
def test_base_model_that_is_not_there(base: str, adapter: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, found = json_of(capsys, adapter, "--base", base)
    assert status == 1
    assert f"base model {base}" in found["faults"][0]


def test_any_bytes_give_an_answer(adapter: Path, capsys) -> None:
    names = {name: (adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}

    # The directory is the same for every example; each writes both files anew.
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.sampled_from(sorted(names)), st.integers(0, 2000), st.binary(min_size=1, max_size=16))
    def check(name: str, at: int, junk: bytes) -> None:
        for other, content in names.items():
            (adapter / other).write_bytes(content)
        (adapter / name).write_bytes(names[name][:at] + junk + names[name][at + len(junk) :])
        json_of(capsys, adapter)

    check()


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON_VALUES |= st.lists(JSON_VALUES, max_size=2) | st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=2)


def test_any_config_value_gives_an_answer(adapter: Path, capsys) -> None:
    config = adapter / "adapter_config.json"
    good = json.loads(config.read_text())

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.dictionaries(st.sampled_from(sorted(good)), JSON_VALUES, min_size=1, max_size=3))
    def check(changes: dict) -> None:
        config.write_text(json.dumps({**good, **changes}))
        json_of(capsys, adapter)

    check()


@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_help_teaches_by_example_and_needs_no_torch(command: str) -> None:
    code = (
        f"import argparse, sys; from flora_vllm.commands import {command} as c; p = argparse.ArgumentParser('x');"
        "c.add_arguments(p); print(p.format_help()); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "examples:\n  flora-vllm" in result.stdout
