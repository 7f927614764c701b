"""An option said once, as a dataclass field that knows its flag, its allowed values and its help.

    rank: int = option(16, "--max-rank", whole(1), "Largest rank that is served.")

From such a dataclass come the flags (`add_flags`, `given`), the Python keywords (`keywords`), what YAML and JSON may
say (`from_mapping`), and the check of every value (`check`, called in `__post_init__`). A new option is a new field.
"""

import argparse
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flora_vllm.errors import ConfigError

T = TypeVar("T")
UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Values:
    """What an option may be.

    allowed: in words, after "must be". holds: the check. read: from text, raises ValueError for what is no such value.
    """

    allowed: str
    holds: Callable[[Any], bool]
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    is_switch: bool = False


def whole(least: int, *words: str, most: int | None = None) -> Values:
    """A whole number of at least `least` and at most `most`, or one of `words`."""

    def holds(value: Any) -> bool:
        if isinstance(value, str):
            return value in words
        return _is_whole(value) and value >= least and (most is None or value <= most)

    def read(text: str) -> int | str:
        return text if text in words else int(text)

    limit = "" if most is None else f" and at most {most}"
    return Values(" or ".join([f"a whole number of at least {least}{limit}", *words]), holds, read)


def number_above(least: float) -> Values:
    """A finite number above `least`."""
    return Values(f"a number above {least:g}", lambda value: _is_number(value) and least < value < math.inf, float)


def number_between(low: float, high: float) -> Values:
    """Between the two and neither of them."""
    return Values(
        f"a number between {low:g} and {high:g}", lambda value: _is_number(value) and low < value < high, float
    )


def byte_count(*words: str) -> Values:
    """Bytes, as a number or as text such as 64MiB, or one of `words`."""

    def holds(value: Any) -> bool:
        return value in words if isinstance(value, str) else _is_whole(value) and value >= 0

    def read(text: str) -> int | str:
        if text in words:
            return text
        found = re.fullmatch(r"(\d+) *([KMG]iB)?", text, re.IGNORECASE)
        if found is None:
            raise ValueError(text)
        return int(found[1]) * UNITS[(found[2] or "").upper()]

    return Values(" or ".join(["a number of bytes such as 1048576 or 64MiB", *words]), holds, read)


def one_of(choices: tuple[str, ...]) -> Values:
    return Values(f"one of {', '.join(choices)}", lambda value: value in choices, choices=choices)


def text(what: str) -> Values:
    """Text that is `what`: "a directory", "a name"."""
    return Values(what, lambda value: isinstance(value, str) and bool(value))


def switch() -> Values:
    """On or off; its flag has a --no- form."""

    def read(word: str) -> bool:
        if word.lower() not in ("true", "false"):
            raise ValueError(word)
        return word.lower() == "true"

    return Values("true or false", lambda value: isinstance(value, bool), read, is_switch=True)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def option(default: Any, flag: str, values: Values, help: str, *, metavar: str | None = None) -> Any:  # noqa: A002
    """A dataclass field. `help`: full sentences; the default is added. A default of None means: may be left out."""
    return dataclasses.field(
        default=default, metadata={"flag": flag, "values": values, "help": help, "metavar": metavar}
    )


def fields_of(kind: Any) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass that are options, by name."""
    return {field.name: field for field in dataclasses.fields(kind) if "flag" in field.metadata}


def check(instance: Any) -> None:
    """Raises ConfigError with every option of `instance` that is not what it may be."""
    faults = []
    for name, field in fields_of(instance).items():
        value, values = getattr(instance, name), field.metadata["values"]
        is_left_out = value is None and field.default is None
        if not is_left_out and not values.holds(value):
            faults.append(f"{name} ({field.metadata['flag']}) must be {values.allowed}, got {value!r}")
    if faults:
        raise ConfigError("; ".join(faults))


def from_mapping(kind: type[T], values: Any, where: str, **fixed: Any) -> T:
    """A `kind` from plain data; text is read as on a command line. `fixed`: fields that the data may not name.

    Raises ConfigError for anything but a mapping of known keys to allowed values; `where` begins the message.
    """
    known = fields_of(kind)
    allowed = [name for name in known if name not in fixed]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping with keys {', '.join(allowed)}, got {values!r}")
    unknown = sorted(set(map(str, values)) - set(allowed))
    if unknown:
        raise ConfigError(f"{where} has unknown keys {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    return kind(**{name: _read(known[name], value) for name, value in values.items()}, **fixed)


def _read(field: dataclasses.Field, value: Any) -> Any:
    """Text that is no allowed value as such, read; left as it is for `check` to refuse if it cannot be."""
    values = field.metadata["values"]
    if not isinstance(value, str) or values.holds(value):
        return value
    try:
        return values.read(value)
    except ValueError:
        return value


def add_flags(kind: Any, parser: Any) -> None:
    """Add the flags of `kind` to an argparse parser or group; those not given are None there (`given`)."""
    for field in fields_of(kind).values():
        values: Values = field.metadata["values"]
        more: dict[str, Any]
        if values.is_switch:
            more = {"action": argparse.BooleanOptionalAction}
        elif values.choices:
            more = {"choices": values.choices}
        else:
            more = {"type": _reader(field), "metavar": field.metadata["metavar"]}
        parser.add_argument(field.metadata["flag"], default=None, help=_help(field), **more)


def _help(field: dataclasses.Field) -> str:
    default = "" if field.default is None else f" Default: {field.default}."
    # The empty format keeps formatters that show argparse's own default, which is None here, from adding it.
    return field.metadata["help"].replace("%", "%%") + default + "%(default).0s"


def _reader(field: dataclasses.Field) -> Callable[[str], Any]:
    values: Values = field.metadata["values"]

    def read(word: str) -> Any:
        try:
            value = values.read(word)
        except ValueError:
            value = None
        if value is None or not values.holds(value):
            raise argparse.ArgumentTypeError(f"must be {values.allowed}, got {word!r}")
        return value

    return read


def given(kind: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The options of `kind` that were on the command line, by field name."""
    found = {name: getattr(args, keyword(field), None) for name, field in fields_of(kind).items()}
    return {name: value for name, value in found.items() if value is not None}


def flags_of(kind: Any, names: Iterable[str]) -> str:
    """The flags of the options `names`, for a message."""
    known = fields_of(kind)
    return ", ".join(known[name].metadata["flag"] for name in names)


def keyword(field: dataclasses.Field) -> str:
    """The Python keyword of an option: its flag's words."""
    return field.metadata["flag"].removeprefix("--").replace("-", "_")


def keywords(kind: Any) -> list[inspect.Parameter]:
    """The options of `kind` as keyword parameters of a signature."""
    return [
        inspect.Parameter(keyword(field), inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields_of(kind).values()
    ]
