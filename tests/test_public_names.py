"""The public names are exactly those documented, each is importable, typed and documented."""

import inspect
import pickle
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import flora_vllm
from flora_vllm import errors

ROOT = Path(flora_vllm.__file__).resolve().parent.parent
PUBLIC = {
    "LLM",
    "AdapterError",
    "ClusterError",
    "ConfigError",
    "FloraError",
    "HookError",
    "StepError",
    "__version__",
    "read_adapter",
    "write_flora",
}


def test_list_is_complete():
    assert set(flora_vllm.__all__) == PUBLIC
    assert set(dir(flora_vllm)) == PUBLIC
    assert set(flora_vllm._HOME) == PUBLIC - {"__version__"}


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_each_name_is_the_one_at_home_and_documented(name):
    value = getattr(flora_vllm, name)
    assert value is getattr(import_module(flora_vllm._HOME[name]), name)
    assert inspect.getdoc(value)


def test_type_checkers_see_the_same_names():
    source = Path(flora_vllm.__file__).read_text()
    block = source[source.index("if TYPE_CHECKING:") : source.index("__version__ =")]
    seen = {name.strip() for line in re.findall(r"import (.*)", block) for name in line.split(",")}
    assert seen == PUBLIC - {"__version__"}
    assert (Path(flora_vllm.__file__).parent / "py.typed").exists()


def test_unknown_name_lists_the_known():
    with pytest.raises(AttributeError, match=r"no attribute 'lm'.*LLM, AdapterError"):
        _ = flora_vllm.lm  # pyright: ignore[reportAttributeAccessIssue]


def test_version_is_that_of_the_changelog():
    (newest, *_) = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert flora_vllm.__version__ == newest


def test_star_import_works():
    code = "from flora_vllm import *; print(LLM.__name__, FloraError.__name__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["LLM", "FloraError"]


@pytest.mark.parametrize("name", [name for name in sorted(PUBLIC) if name.endswith("Error")])
def test_errors_cross_process_borders(name):
    kind = getattr(errors, name)
    error = pickle.loads(pickle.dumps(kind("what, where and what to do")))
    assert type(error) is kind
    assert str(error) == "what, where and what to do"
    assert issubclass(kind, flora_vllm.FloraError)
