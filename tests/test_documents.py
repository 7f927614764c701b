"""What the documents point to is there, and README stays one that is read to its end."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path for path in [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *(ROOT / "flora_vllm").rglob("*.md")]
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+(.*)$", text, re.M)
    }
    missing = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        if file and not (path.parent / file).exists():
            missing.append(target)
        if not file and heading not in headings:
            missing.append(target)
    assert not missing


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_readmes_commands_are_there() -> None:
    """Every `flora-vllm` command that a document names is one, and every make target."""
    from flora_vllm.commands.cli import COMMANDS

    known = {command.name for command in COMMANDS}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^|\. )flora-vllm ([a-z]+)", text, re.M))
        assert named <= known, path
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)) <= targets, path
