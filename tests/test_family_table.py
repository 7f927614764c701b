"""README's table is the rows': every family that PEFT has is in it, served or refused with its reason."""

from pathlib import Path

import pytest
from peft import PeftType

from flora_vllm.errors import ConfigError
from flora_vllm.formats.families.table import REFUSED, ROWS
from flora_vllm.formats.family_table import family_table, write_into

README = Path(__file__).resolve().parent.parent / "README.md"


def test_readme_has_the_table(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    write_into(copy)
    assert copy.read_text() == README.read_text(), "run `make table`"


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
        write_into(tmp_path / "README.md")
