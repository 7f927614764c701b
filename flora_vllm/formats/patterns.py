"""Regular expressions that come with an adapter, matched as Python's `re` does, in bounded time.

A pattern is untrusted text that is tried on every module of the model, inside a worker that serves everybody: `re`
may backtrack for ever and cannot be stopped. `regex` can, and means the same by a pattern wherever `speaks_re` holds.
"""

import functools
import re
import time
from collections.abc import Callable

import regex

from flora_vllm.errors import AdapterError

# A pattern may take this long once, and this long a module on average: thousands of times what honest ones take.
BURST_S, MEAN_S = 1.0, 1e-3
# Written in a pattern these are plain text or sets to `re`, but fuzzy matching and POSIX classes to `regex`.
_OTHER_MEANING = re.compile(r"\{(?!\d*,?\d*\})|\[\[:")


def speaks_re(pattern: str) -> bool:
    """Whether `pattern` is a valid expression that `re` and `regex` read alike."""
    if _OTHER_MEANING.search(pattern):
        return False
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError):
        return False
    return True


def full_match(pattern: str, text: str) -> bool:
    """`re.fullmatch(pattern, text) is not None`. Raises AdapterError if the pattern takes too long."""
    return _stopwatch(pattern).run(regex.compile(pattern).fullmatch, text) is not None


def match_start(pattern: str, text: str) -> "regex.Match[str] | None":
    """`re.match(pattern, text)`. Raises AdapterError if the pattern takes too long."""
    return _stopwatch(pattern).run(regex.compile(pattern).match, text)


class _Stopwatch:
    """The time one pattern has taken so far, over all modules and loads."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._left_s = pattern, BURST_S

    def run(self, match: Callable[..., "regex.Match[str] | None"], text: str) -> "regex.Match[str] | None":
        self._left_s = min(BURST_S, self._left_s + MEAN_S)
        start = time.process_time()
        try:
            return match(text, timeout=max(self._left_s, MEAN_S))
        except TimeoutError:
            raise AdapterError(
                f"adapter_config.json: the pattern {self._pattern[:100]!r} takes too long to match module names; "
                "write one without nested repeats, or list the modules by name"
            ) from None
        finally:
            self._left_s -= time.process_time() - start


@functools.lru_cache(maxsize=1024)
def _stopwatch(pattern: str) -> _Stopwatch:
    return _Stopwatch(pattern)
