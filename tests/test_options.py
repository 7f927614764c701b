"""Options said once: what a field becomes on the command line, in plain data and in Python, and what is refused."""

import argparse
from dataclasses import dataclass
from typing import Any

import pytest

from flora_vllm.errors import ConfigError
from flora_vllm.options import (
    add_flags,
    byte_count,
    check,
    flags_of,
    from_mapping,
    given,
    keywords,
    number_above,
    number_between,
    one_of,
    option,
    switch,
    text,
    whole,
)


@dataclass(frozen=True)
class Meal:
    guests: int | str = option(2, "--meal-guests", whole(1, "many", most=99), "People at 100% hunger.", metavar="N")
    dish: str = option("soup", "--dish", one_of(("soup", "stew")), "What.")
    hours: float | None = option(None, "--hours", number_above(0), "How long.")
    salt: float = option(0.5, "--salt", number_between(0, 1), "Share.")
    pot: int | str = option(1024, "--pot", byte_count("all"), "Size.")
    hot: bool = option(True, "--hot", switch(), "Warmed.")
    place: str | None = option(None, "--place", text("a room"), "Where.")

    def __post_init__(self) -> None:
        check(self)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(Meal, made)
    return made


def on_command_line(*words: str) -> dict[str, Any]:
    return given(Meal, parser().parse_args(list(words)))


GOOD = [
    ("guests", "--meal-guests 3", "3", 3),
    ("guests", "--meal-guests many", "many", "many"),
    ("dish", "--dish stew", "stew", "stew"),
    ("hours", "--hours 2e-1", "2e-1", 0.2),
    ("salt", "--salt .25", 0.25, 0.25),
    ("pot", "--pot 2KiB", "2 kib", 2048),
    ("pot", "--pot all", "all", "all"),
    ("pot", "--pot 7", 7, 7),
    ("hot", "--no-hot", False, False),
    ("hot", "--hot", "true", True),
    ("place", "--place kitchen", "kitchen", "kitchen"),
]


@pytest.mark.parametrize(("name", "words", "data", "value"), GOOD)
def test_a_value_is_the_same_by_flag_and_by_data(name: str, words: str, data: Any, value: Any) -> None:
    assert on_command_line(*words.split()) == {name: value}
    assert getattr(from_mapping(Meal, {name: data}, "meal"), name) == value


BAD = [
    ("guests", "0", 0),
    ("guests", "few", True),
    ("guests", "1.5", 1.5),
    ("guests", "100", 10**30),
    ("dish", "cake", None),
    ("hours", "0", 0),
    ("hours", "inf", float("nan")),
    ("hours", "1e999", float("inf")),
    ("salt", "1", 1),
    ("pot", "2 MB", -1),
    ("place", "", 3),
]


@pytest.mark.parametrize(("name", "word", "value"), BAD)
def test_a_bad_value_is_refused_everywhere_with_its_name(name: str, word: str, value: Any, capsys: Any) -> None:
    flag = flags_of(Meal, [name])
    with pytest.raises(SystemExit, match="2"):
        on_command_line(flag, word)
    assert flag in capsys.readouterr().err
    for bad in (value, word):
        with pytest.raises(ConfigError, match=rf"{name} \({flag}\) must be .* got "):
            from_mapping(Meal, {name: bad}, "meal")


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"guests .*; salt .*"):
        Meal(guests=0, salt=2.0)


def test_unknown_and_fixed_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="meal has unknown keys dessert; allowed are guests, dish"):
        from_mapping(Meal, {"dessert": 1}, "meal")
    with pytest.raises(ConfigError, match="meal has unknown keys guests; allowed are dish"):
        from_mapping(Meal, {"guests": 1}, "meal", guests=3)
    assert from_mapping(Meal, {"dish": "stew"}, "meal", guests=3) == Meal(3, "stew")
    with pytest.raises(ConfigError, match="meal must be a mapping"):
        from_mapping(Meal, "on", "meal")


def test_what_is_not_given_is_not_there() -> None:
    assert on_command_line() == {}
    assert from_mapping(Meal, {}, "meal") == Meal()


def test_help_shows_the_default_once() -> None:
    text = " ".join(parser().format_help().split())
    assert "--meal-guests N People at 100% hunger. Default: 2. --dish" in text
    assert "None" not in text


def test_python_keywords_are_the_flags_words() -> None:
    assert [(p.name, p.default) for p in keywords(Meal)][:2] == [("meal_guests", 2), ("dish", "soup")]
