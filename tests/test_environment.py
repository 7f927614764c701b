"""One place for what is kept, one table of our environment variables."""

import re
from pathlib import Path

import flora_vllm
from flora_vllm import environment
from flora_vllm.environment import OF_SUPERVISOR, VARIABLES, cache_root

PACKAGE = Path(flora_vllm.__file__).parent


def test_the_table_names_every_variable_that_is_read_and_no_other() -> None:
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "environment.py"]
    named = set(re.findall(r"\"(FLORA_[A-Z_]{3,})\"", "\n".join(sources)))
    assert named == {*VARIABLES, *OF_SUPERVISOR} - {"FLORA_CACHE"}


def test_what_is_kept_lies_in_one_place(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("FLORA_CACHE")
    assert cache_root() == PACKAGE.parent / ".cache", "in a clone: where make puts it"
    monkeypatch.setattr(environment, "_CLONE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "flora-vllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "flora-vllm"
