"""A user's mistake on a server's command line ends in one line that says it; everything else keeps its traceback."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flora_vllm.errors import AdapterError, ConfigError, StepError
from flora_vllm.formats import write_flora
from flora_vllm.plugin import mistakes


def script(raised: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        "from flora_vllm.errors import *\nfrom flora_vllm.plugin.mistakes import tell_in_one_line\n"
        f"tell_in_one_line(); tell_in_one_line()\nraise {raised}"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **environment},
    )


@pytest.mark.parametrize(
    "raised", ["ConfigError('no such option')", "ValueError('adapter x cannot be served (1 fault):')"]
)
def test_what_ends_the_process_is_one_line(raised: str) -> None:
    done = script(raised)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("flora-vllm: error: ")
    assert "Traceback" in script(raised, VLLM_LOGGING_LEVEL="debug").stderr


@pytest.mark.parametrize("raised", ["StepError('lost')", "ValueError('no')", "KeyError('x')"])
def test_other_errors_keep_their_traceback(raised: str) -> None:
    assert "Traceback" in script(raised).stderr


def test_the_log_shows_the_message_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(handler.format(record))
    log = logging.getLogger("vllm.test_mistakes")
    logging.getLogger("vllm").addHandler(handler)
    try:
        mistakes.log_in_one_line()
        make = logging.getLogRecordFactory()
        mistakes.log_in_one_line()
        assert logging.getLogRecordFactory() is make
        for error in (AdapterError("adapter x has 3% of what it needs"), StepError("lost"), ZeroDivisionError("zero")):
            try:
                raise error
            except Exception:
                log.exception("Invocation of %s failed", "add_lora")
    finally:
        logging.getLogger("vllm").removeHandler(handler)
    assert lines[0] == "Invocation of add_lora failed adapter x has 3% of what it needs"
    assert all("Traceback" in line for line in lines[1:])
    assert len(lines) == 3


def test_lora_modules_are_looked_at_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "adapter_config.json").write_text("{}")
    names = ("empty", "good", "absent")
    modules = [SimpleNamespace(name=name, path=str(tmp_path / name)) for name in names]
    with pytest.raises(ConfigError) as caught:
        mistakes.check_lora_modules([*modules, SimpleNamespace(name="hub", path="somebody/adapter")])
    message = str(caught.value)
    assert message.startswith("--lora-modules: empty=")
    assert "no adapter_config.json" in message
    assert f"absent={tmp_path}/absent: no such directory" in message
    assert "good=" not in message
    assert "hub=" not in message
    mistakes.check_lora_modules(None)
    mistakes.check_lora_modules([SimpleNamespace(name="task", path=f"{tmp_path}/good#3")])


@pytest.mark.engine
@pytest.mark.parametrize("mistake", ["key", "directory", "rank"])
def test_a_server_that_cannot_start_says_why_in_one_line(
    mistake: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    factors = {"model.layers.0.self_attn.q_proj": (torch.ones(3, 64), torch.ones(64, 3))}
    adapter = write_flora(tmp_path / "a", factors)
    options, said = {
        "key": (["--additional-config", json.dumps({"flora": {"max_ranks": 3}})], "unknown keys max_ranks"),
        "directory": (["--enable-flora", "--lora-modules", f"a={tmp_path}/b"], "no such directory"),
        "rank": (
            ["--enable-flora", "--max-flora-rank", "2", "--lora-modules", f"a={adapter}"],
            "rank 3 is above the limit 2; start the server with --max-flora-rank 3",
        ),
    }[mistake]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model("llama"))]
    command += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "64", "--port", "0"]
    command += ["--kv-cache-memory-bytes", str(16 << 20), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"},
    )
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output[-12000:]
    assert [line for line in done.stderr.splitlines() if line.startswith("flora-vllm: error: ")], output[-5000:]
    assert said in done.stderr
