"""Imports point one way, heavy libraries stay where they belong, files stay small, no machine leaks into the tree."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flora_vllm"
MOST_LINES = 450


@dataclass(frozen=True)
class Part:
    """What modules under `prefix` may import: our other parts, and libraries beyond Python's own."""

    prefix: str
    parts: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


# The longest prefix that fits a module names its part. A new module that fits none fails the test: add a row.
PARTS = (
    Part("errors"),
    Part("environment"),
    Part("options", ("errors",)),
    Part("pacing"),
    Part("exposition"),
    Part("ops.rare", (), ("torch",)),
    Part("ops.terms", ("ops.rare",), ("torch",)),
    Part("terms", ("errors", "ops.rare", "ops.terms"), ("torch",)),
    Part("adapter", ("terms",), ("torch",)),
    Part("formats", ("errors", "adapter", "pacing", "terms"),
         ("torch", "numpy", "regex", "safetensors", "huggingface_hub", "sklearn", "transformers", "tokenizers")),
    Part("ops.paths"),
    Part("ops", ("environment", "errors", "ops.paths", "ops.rare", "ops.terms"), ("numpy", "torch", "triton")),
    Part("slots", ("adapter", "ops.terms", "terms"), ("torch",)),
    Part("compact", ("ops.terms", "pacing", "slots"), ("torch",)),
    Part("plans", ("adapter", "compact", "pacing", "slots", "terms"), ("torch",)),
    Part("mixing", ("errors", "ops.rare", "ops.terms"), ("torch",)),
    Part("step", ("errors", "ops", "ops.terms"), ("torch",)),
    Part("direct_calls", ("errors", "ops"), ("torch",)),
    Part("layers", ("handles", "step", "direct_calls", "ops", "ops.terms"), ("torch",)),
    Part("feed_forward", ("layers", "ops", "ops.rare", "ops.terms"), ("torch",)),
    Part("handles", (), ("torch",)),
    Part("embedding", ("handles", "step", "ops.rare", "ops.terms"), ("torch",)),
    Part("norms", ("handles", "step", "ops.terms"), ("torch",)),
    Part("experts", ("handles", "step", "ops", "ops.terms"), ("torch",)),
    Part("plugin.names", ("formats",)),
    Part("plugin.options", ("errors", "options", "ops.paths", "plugin.names")),
    Part("plugin", ("adapter", "step", "compact", "embedding", "errors", "experts", "exposition", "feed_forward",
                    "formats", "layers", "mixing", "norms", "ops", "ops.terms", "options", "pacing", "plans",
                    "plugin.names", "plugin.options", "slots", "terms"),
         ("safetensors", "torch", "vllm")),
    Part("train_request", ("errors", "options")),
    Part("training", ("adapter", "errors", "formats", "ops", "ops.terms", "options", "terms", "train_request"),
         ("torch", "peft", "transformers", "safetensors", "trl", "datasets", "tqdm", "jinja2", "numpy", "yaml", "av")),
    Part("cluster.rules", ("errors",), ("numpy",)),
    Part("cluster.vllm_engine", ("errors", "formats", "plugin", "plugin.options", "cluster"), ("vllm",)),
    Part("cluster", ("errors", "exposition", "cluster.rules", "cluster.vllm_engine", "formats", "options",
                     "plugin.options"),
         ("numpy", "ray", "yaml", "fsspec", "fastapi", "starlette", "pydantic", "jsonschema")),
    Part("demo.model_conversion", (), ("numpy", "tokenizers", "torch", "transformers")),
    Part("demo.model_assets", ("errors", "formats", "demo.model_conversion"), ("safetensors", "torch")),
    Part("demo.adapters"),
    Part("demo", ("environment", "errors", "commands.server_process", "demo.model_assets"), ("openai", "tqdm")),
    Part("commands.bootstrap"),
    Part("commands.cli", ("", "environment", "errors")),
    Part("commands.own_server", (), ("yaml",)),
    Part("commands.server_process", ("errors",), ("torch",)),
    Part("commands", ("", "commands.cli", "commands.own_server", "commands.server_process", "errors", "adapter",
                      "formats", "ops", "options", "terms", "train_request", "training", "plugin", "demo.model_assets"),
         ("torch", "tqdm", "peft", "transformers", "safetensors", "matplotlib", "rich")),
    Part("", ("errors", "formats", "plugin")),
)  # fmt: skip
# Read by everything that serves; must not wait for, or need, any of these.
HEAVY = {"torch", "vllm", "ray", "peft", "transformers", "triton", "fastapi", "numpy"}


def find_modules() -> dict[str, Path]:
    """Dotted name below flora_vllm ("" is the package itself) -> file."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        words = path.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return modules


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def part_of(module: str) -> Part:
    fitting = [p for p in PARTS if p.prefix == module or (p.prefix and module.startswith(p.prefix + "."))]
    assert fitting, f"flora_vllm.{module} belongs to no part: add a row to PARTS"
    return max(fitting, key=lambda part: len(part.prefix))


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of the modules that the import statements among `nodes` name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("flora_vllm.") in MODULES else node.module


def ours(name: str) -> str | None:
    """`name` below flora_vllm, or None if it is another's."""
    return "" if name == "flora_vllm" else name.removeprefix("flora_vllm.") if name.startswith("flora_vllm.") else None


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    part = part_of(module)
    allowed = set(part.parts) | {part.prefix}
    faults = []
    for name in imported(ast.walk(TREES[module])):
        own = ours(name)
        if own is not None:
            if part_of(own).prefix not in allowed:
                faults.append(f"imports flora_vllm.{own}, of part {part_of(own).prefix!r}")
        elif (top := name.split(".")[0]) not in sys.stdlib_module_names and top not in part.libraries:
            faults.append(f"imports {name}")
    assert not faults, f"flora_vllm.{module} (part {part.prefix!r}) " + "; ".join(faults)


def test_the_package_of_the_cluster_rules_is_empty():
    assert not list(imported(ast.walk(TREES["cluster"])))


def test_parts_have_no_cycle():
    graph = {part.prefix: set(part.parts) - {part.prefix, "", "cluster"} for part in PARTS}
    TopologicalSorter(graph).prepare()


def test_modules_have_no_cycle_at_import_time():
    graph = {
        module: {own for name in imported(at_import_time(tree)) if (own := ours(name)) is not None} - {module}
        for module, tree in TREES.items()
    }
    TopologicalSorter(graph).prepare()


def at_import_time(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("module", MODULES)
def test_libraries_a_reader_may_lack_are_imported_where_used(module):
    """Modules that the core and the command line import may not need more than torch at their top."""
    part = part_of(module)
    if part.prefix in ("training", "demo.model_conversion") or part.prefix.startswith("cluster"):
        return
    optional = {"ray", "peft", "transformers", "openai", "fsspec", "yaml", "datasets", "trl"}
    if part.prefix != "plugin":
        optional.add("vllm")
    at_top = {name.split(".")[0] for name in imported(at_import_time(TREES[module]))}
    assert not at_top & optional


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flora_vllm", HEAVY),
        ("flora_vllm.commands.cli", HEAVY),
        ("flora_vllm.errors", HEAVY),
        ("flora_vllm.plugin", HEAVY - {"numpy"}),
        ("flora_vllm.plugin.options", HEAVY),
        ("flora_vllm.cluster.config", HEAVY - {"numpy"}),
        ("flora_vllm.formats", {"vllm", "ray", "peft", "transformers", "triton", "fastapi"}),
        ("flora_vllm.ops.table", {"vllm", "ray", "peft", "transformers", "fastapi"}),
        ("flora_vllm.cluster.rules.policy", HEAVY - {"numpy"}),
    ],
)
def test_import_loads_nothing_heavy(module, absent):
    code = f"import sys, {module}; print(*sorted(set({sorted(absent)!r}) & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def tracked_text() -> Iterator[tuple[Path, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "patches")
        paths = [path for folder in folders for path in folder.rglob("*")]
    for path in paths:
        if path.is_file():
            content = path.read_bytes()
            if b"\0" not in content:
                yield path.relative_to(ROOT), content.decode()


def test_files_are_small():
    code = {path: text.count("\n") for path, text in tracked_text() if path.suffix in {".py", ".cpp", ".h"}}
    assert len(code) > 50
    too_long = {str(path): lines for path, lines in code.items() if lines > MOST_LINES}
    assert not too_long, "split by idea"


def test_no_machine_and_no_registry_in_the_tree():
    machine = re.compile(r"(?<![\w.}$])/(?:work|root|home|tmp|opt|Users)/\w[^\s'\"]*")
    # PyTorch's index of CPU builds is public and cannot be left out: the set-up and README name it.
    registry = re.compile(r"(?:pypi\.org|pythonhosted|npmjs\.(?:org|com)|deb\.debian)[^\s'\"]*")
    here = Path(__file__).relative_to(ROOT)
    found = {
        f"{path}: {match[0]}"
        for path, text in tracked_text()
        if path != here
        for pattern in (machine, registry)
        for match in pattern.finditer(text)
    }
    assert not found


def test_the_search_for_machines_finds_one(monkeypatch):
    """The patterns above can match."""
    path = Path("/") / "home" / "somebody" / "model"
    monkeypatch.setattr(sys.modules[__name__], "tracked_text", lambda: iter([(Path("x.py"), f"read('{path}')")]))
    with pytest.raises(AssertionError):
        test_no_machine_and_no_registry_in_the_tree()
