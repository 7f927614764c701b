"""Regular expressions that come with an adapter, matched as Python's `re` does, in bounded time and memory.

A pattern is untrusted text that is tried on every module of the model, inside a worker that serves everybody: `re`
may backtrack for ever and cannot be stopped. `regex` can, and means the same by a pattern wherever `speaks_re` holds.
`regex` writes repeats out when it compiles, so what they amount to is counted first, from the parse of `re`.
"""

import functools
import importlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import regex

from flora_vllm.errors import AdapterError
from flora_vllm.formats.limits import MAX_PATTERN_ATOMS, MAX_PATTERN_LETTERS, MAX_PATTERNS, MAX_PATTERNS_LETTERS, brief

# The patterns of one config key may take this long once, and this long a module on average: thousands of times what
# honest ones take.
BURST_S, MEAN_S = 0.5, 5e-4
# Written in a pattern these are plain text or sets to `re`, but fuzzy matching and POSIX classes to `regex`.
_OTHER_MEANING = re.compile(r"\{(?!\d*,?\d*\})|\[\[:")
# Letters beyond ASCII: no module's name has them, and `re` needs seconds for their ranges when case is ignored.
_WIDE = re.compile(r"[^\x20-\x7e]|\\[uUNx]")
# A module's name, as a pattern: nothing in it but letters, and dots that stand for themselves or for any letter.
_NAME = re.compile(r"\^?(?:\w|\.|\\\.|-)+", re.ASCII)
_parser: Any = importlib.import_module(
    "re._parser"
)  # the parse that `re` itself compiles; private, the same in 3.11-3.14


def speaks_re(pattern: str) -> bool:
    """Whether `pattern` is a valid expression that `re` and `regex` read alike and that is small written out."""
    if len(pattern) > MAX_PATTERN_LETTERS or _OTHER_MEANING.search(pattern) or _WIDE.search(pattern):
        return False
    try:
        if _atoms(_parser.parse(pattern)) > MAX_PATTERN_ATOMS:
            return False
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError):
        return False
    return True


def all_speak_re(patterns: Iterable[str], within: str) -> bool:
    """Whether each of `patterns` speaks `re` in its place `within`; no more of them are compiled than may be."""
    others = [pattern for pattern in patterns if not _NAME.fullmatch(pattern)]
    if len(others) > MAX_PATTERNS or sum(map(len, others)) > MAX_PATTERNS_LETTERS:
        return False
    return all(speaks_re(within.format(pattern)) for pattern in others)


def _atoms(parsed: Any) -> int:
    """How many atoms a parsed pattern has when each repeat is written out as often as it must occur, and once more."""
    total = 0
    for operation, argument in parsed:
        if str(operation).endswith("_REPEAT"):
            least, _, body = argument
            total += _atoms(body) * (least + 1)
        else:
            total += 1 + sum(map(_atoms, _bodies(argument)))
        if total > MAX_PATTERN_ATOMS:
            break
    return total


def _bodies(argument: Any) -> Iterable[Any]:
    """The patterns inside the argument of one operation: of groups, branches and assertions."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _bodies(part)


def full_match(pattern: str, text: str) -> bool:
    """`re.fullmatch(pattern, text) is not None`. Raises AdapterError if the pattern takes too long."""
    return _stopwatch(pattern).run(_compiled(pattern).fullmatch, text, pattern) is not None


def match_start(pattern: str, text: str) -> "regex.Match[str] | None":
    """`re.match(pattern, text)`. Raises AdapterError if the pattern takes too long."""
    return _stopwatch(pattern).run(_compiled(pattern).match, text, pattern)


def any_match_start(patterns: tuple[str, ...], text: str) -> bool:
    """Whether `re.match` finds any; they have the time of one pattern together. Raises AdapterError likewise."""
    stopwatch = _stopwatch(patterns)
    return any(stopwatch.run(_compiled(pattern).match, text, pattern) is not None for pattern in patterns)


@functools.lru_cache(maxsize=4 * MAX_PATTERNS)
def _compiled(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern)


# The expressions that PEFT makes of a key: of most patterns (`utils/other.py::get_pattern_key`), and of FourierFT's
# (`tuners/fourierft/model.py`), which needs something before the name and whose alternatives are the whole's.
IN_GROUP, AFTER_DOT = r"(.*\.)?({})$", r".*\.{}$"


class NamePatterns:
    """The keys of a `rank_pattern` or its like: which is the first that PEFT would take for a module.

    PEFT tries `place`, one of the two above, of one after another. Keys that are names are looked up instead, so that a
    config with one key for each module costs what its modules do, not their square.
    """

    def __init__(self, keys: Sequence[str], place: str = IN_GROUP) -> None:
        """Raises AdapterError if more than MAX_PATTERNS keys are of different forms."""
        self._keys, self._place = tuple(keys), place
        # (letters, from the start, places of dots that stand for any letter) -> name with these left out -> index
        self._names: dict[tuple[int, bool, tuple[int, ...]], dict[str, int]] = {}
        self._patterns: list[int] = []
        for index, key in enumerate(self._keys):
            if _NAME.fullmatch(key):
                form, name = _name_form(key)
                self._names.setdefault(form, {}).setdefault(name, index)
            else:
                self._patterns.append(index)
        if (forms := len(self._names) + len(self._patterns)) > MAX_PATTERNS:
            raise AdapterError(
                f"adapter_config.json: {len(self._keys)} patterns of {forms} different forms; at most {MAX_PATTERNS} "
                "are read; write the modules' names"
            )
        self._stopwatch = _Stopwatch()

    def first(self, module: str) -> int | None:
        """The index of the first key that fits. Raises AdapterError if the patterns take too long."""
        found = min(self._names_that_fit(module), default=len(self._keys))
        for index in self._patterns:
            if index > found:
                break
            pattern = self._place.format(self._keys[index])
            if self._stopwatch.run(_compiled(pattern).match, module, self._keys[index]) is not None:
                return index
        return found if found < len(self._keys) else None

    def _names_that_fit(self, module: str) -> Iterable[int]:
        for (letters, from_start, dots), names in self._names.items():
            start = len(module) - letters
            if start < (self._place == AFTER_DOT) or (start > 0 and (from_start or module[start - 1] != ".")):
                continue
            index = names.get(_without(module[start:], dots))
            if index is not None:
                yield index


def _name_form(key: str) -> tuple[tuple[int, bool, tuple[int, ...]], str]:
    tokens = re.findall(r"\\?.", key.removeprefix("^"))
    dots = tuple(place for place, token in enumerate(tokens) if token == ".")
    name = "".join(token[-1] for token in tokens)
    return (len(name), key.startswith("^"), dots), _without(name, dots)


def _without(name: str, places: tuple[int, ...]) -> str:
    letters = list(name)
    for place in places:
        letters[place] = "."
    return "".join(letters)


@functools.lru_cache(maxsize=64)
def name_patterns(keys: tuple[str, ...], place: str = IN_GROUP) -> NamePatterns:
    """The table of these keys, kept: a config asks it once a module. Raises AdapterError."""
    return NamePatterns(keys, place)


class _Stopwatch:
    """The time that one pattern, or those of one config key together, have taken so far, over all modules and loads."""

    def __init__(self) -> None:
        self._left_s = BURST_S

    def run(
        self, match: Callable[..., "regex.Match[str] | None"], text: str, pattern: str
    ) -> "regex.Match[str] | None":
        self._left_s = min(BURST_S, self._left_s + MEAN_S)
        start = time.thread_time()
        try:
            return match(text, timeout=max(self._left_s, MEAN_S))
        except TimeoutError:
            raise AdapterError(
                f"adapter_config.json: the pattern {brief(pattern)} takes too long to match module names; "
                "write one without nested repeats, or list the modules by name"
            ) from None
        finally:
            self._left_s -= time.thread_time() - start


@functools.lru_cache(maxsize=1024)
def _stopwatch(_of: str | tuple[str, ...]) -> _Stopwatch:
    return _Stopwatch()
