"""The tables are the rows': every family that PEFT has is in them, served or refused with its reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftType

from flora_vllm.errors import ConfigError
from flora_vllm.formats.families.table import REFUSED, ROWS
from flora_vllm.formats.family_table import COMBINED, GROUPS, family_table, group_table, write_into

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("file", "table"), [("README.md", group_table), ("flora_vllm/formats/README.md", family_table)]
)
def test_the_file_has_its_table(file: str, table: Callable[[], str], tmp_path: Path) -> None:
    text = (ROOT / file).read_text()
    (tmp_path / "copy.md").write_text(text)
    write_into(tmp_path / "copy.md", table())
    assert (tmp_path / "copy.md").read_text() == text, "run `make table`"


def test_readme_does_not_overstate_the_families() -> None:
    lines = group_table().splitlines()[2 : -1 - len(COMBINED)]
    assert len(lines) <= len(GROUPS)
    served = [name for line in lines for name in line.split("|")[2].split(", ")]
    assert "more than forty families" in (ROOT / "README.md").read_text()
    assert len(served) > 40


def test_every_peft_type_is_served_or_refused_with_a_reason() -> None:
    served = {family.type_name for family in ROWS}
    assert {peft_type.value for peft_type in PeftType} <= served | set(REFUSED)
    assert not served & set(REFUSED)


def test_every_row_says_what_it_becomes() -> None:
    assert not [family.name for family in ROWS if not family.kinds]
    assert len({family.name for family in ROWS}) == len({family.title for family in ROWS}) == len(ROWS)
    assert len(family_table().splitlines()) > len(ROWS) + 2


def test_a_file_without_marks(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no table here\n")
    with pytest.raises(ConfigError, match="has no lines"):
        write_into(tmp_path / "README.md", "")
