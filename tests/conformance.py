"""vLLM's own LoRA tests, from its source distribution, on stock vLLM and with our flag: `make conformance`.

What passes on stock must pass with the flag, or be among the intended differences (conformance_differences.py). Nothing
of vLLM's tests is kept here: they are read where the package index's source distribution was unpacked, with the hub's
models and adapters replaced by tiny ones (conformance_hub.py). Without an index it says that nothing was run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conformance_differences import ENDLESS, UPSTREAM
from conformance_hub import write_hub
from vllm_sources import source_distribution

from flora_vllm.environment import cache_root

HERE = Path(__file__).resolve().parent
# vLLM's tests import these; they are put beside the sources, not into the environment.
PACKAGES = ("pytest-asyncio", "tblib")
# Without an engine, and through code that we replace: in `make test`.
QUICK = (
    "tests/entrypoints/serve/lora/test_serving_models.py",
    "tests/entrypoints/openai/completion/test_lora_resolvers.py",
    "tests/plugins_tests/lora_resolvers/test_filesystem_resolver.py",
    "tests/lora/test_resolver.py",
)
ALL = (
    *QUICK,
    "tests/lora/test_peft_helper.py",
    "tests/lora/test_lora_weights.py",
    "tests/lora/test_lora_utils.py",
    "tests/lora/test_utils.py",
    "tests/lora/test_layers_utils.py",
    "tests/lora/test_lora_manager.py",
    "tests/lora/test_worker.py",
    "tests/lora/test_lora_functions.py",
    "tests/entrypoints/serve/lora/test_lora_adapters.py",
    "tests/entrypoints/serve/sagemaker/test_sagemaker_lora_adapters.py",
)
Outcomes = Mapping[str, str]


def compare(tree: Path, hub: Path, selection: Sequence[str]) -> list[str]:
    """Faults: tests that pass on stock vLLM and not with the flag, unless intended; differences that are none."""
    stock, ours = (_outcomes(tree, hub, selection, flora=flora) for flora in (False, True))
    passed = {name for name, outcome in stock.items() if outcome == "passed"}
    if not passed:
        return ["no test of vLLM's passes on stock vLLM here"]
    faults = [
        f"{name}: passes on stock vLLM, {ours.get(name, 'did not run')} with --enable-flora"
        for name in sorted(passed)
        if ours.get(name) != "passed" and name not in UPSTREAM
    ]
    faults += [f"{name}: is no difference" for name in UPSTREAM if name in passed and ours.get(name) == "passed"]
    print(
        f"{len(passed)} of {len(stock)} pass on stock vLLM, of those {len(passed) - len(faults)} as intended with ours"
    )
    return faults


def _outcomes(tree: Path, hub: Path, selection: Sequence[str], *, flora: bool) -> Outcomes:
    """Test -> passed, failed or skipped."""
    report = tree / f"{'flora' if flora else 'stock'}.xml"
    report.unlink(missing_ok=True)
    paths = [str(HERE), str(HERE.parent), str(tree / "packages"), str(tree), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # Their server is started as `vllm`.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **({} if flora else {"VLLM_PLUGINS": ""}),
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--timeout", "600"]
    command += ["-c", str(tree / "pyproject.toml"), f"--junitxml={report}", "--tb=short"]
    command += ["-o", "asyncio_default_fixture_loop_scope=function"]
    if flora:
        command += ["-p", "conformance_plugin", *(f"--deselect={name}" for name in ENDLESS)]
    done = subprocess.run(
        [*command, *selection], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    (tree / f"{report.stem}.log").write_text(done.stdout + done.stderr)
    if not report.is_file():
        raise RuntimeError(f"vLLM's tests did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found: dict[str, str] = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}::{case.get('name')}"] = _WORDS[next(iter(sorted(kinds)), "")]
    return found


_WORDS = {"": "passed", "error": "failed", "failure": "failed", "skipped": "skipped"}


def upstream_tree(cache: Path) -> Path:
    """A directory with vLLM's `tests`, its pytest settings and PACKAGES; without vLLM itself, which is installed.

    Skips the test, aloud, where the package index cannot be reached.
    """
    sources, tree = source_distribution("0.32"), cache / "conformance"
    tree.mkdir(parents=True, exist_ok=True)
    for name in ("tests", "pyproject.toml"):
        (tree / name).unlink(missing_ok=True)
        (tree / name).symlink_to(sources / name)
    if not (tree / "packages").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tree / "packages")]
        done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(tree / "packages", ignore_errors=True)
            pytest.skip(f"VLLM'S OWN TESTS NOT RUN: {', '.join(PACKAGES)} cannot be had: {done.stderr[-300:]}")
    return tree


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("selection", nargs="*", help="vLLM's test files; default: all that say something about LoRA")
    parser.add_argument("--quick", action="store_true", help="only those that start no engine")
    given = parser.parse_args(arguments)
    try:
        tree = upstream_tree(cache_root())
    except pytest.skip.Exception as reason:
        print(reason)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_hub(Path(folder))
        faults = compare(tree, Path(folder), given.selection or (QUICK if given.quick else ALL))
    print(*faults, f"logs: {tree}/stock.log, {tree}/flora.log", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
