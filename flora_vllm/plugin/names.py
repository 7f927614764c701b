"""Which names an adapter may have: they reach logs, metrics' labels, other clients' `/v1/models` and the file system.

The documented alphabet is the default; `adapter_names` (--flora-adapter-names) is a regular expression of the
operator's in its place. Whatever it says, a name is at most MAX_LETTERS printable letters without `..` as a part.
"""

import functools
import re

# A file's name has at most 255, and an identity adds 17.
MAX_LETTERS = 200
# Letters, digits and . _ - + = : @ / ; the first is a letter or a digit. Hub ids, `team/name` and `model:name` fit.
DEFAULT = r"[A-Za-z0-9][A-Za-z0-9._+=:@/-]*"
_ALPHABET = "letters, digits and . _ - + = : @ /, the first a letter or a digit"


def name_fault(name: str, pattern: str = DEFAULT) -> str | None:
    """Why no adapter may be called `name`, in words for the client that sent it; None if it may."""
    # Here, for the options name this module and must not wait for torch.
    from flora_vllm.formats.limits import brief

    if not name:
        return "an adapter's name must not be empty"
    if len(name) > MAX_LETTERS:
        return f"the adapter name {brief(name)} is too long; at most {MAX_LETTERS} letters are allowed"
    if not name.isprintable():
        return f"the adapter name {brief(name)} has letters that cannot be printed"
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts:
        return f"the adapter name {brief(name)} has an empty part, '.' or '..' between slashes"
    if _compiled(pattern).fullmatch(name) is None:
        allowed = _ALPHABET if pattern == DEFAULT else f"what matches {pattern}"
        return f"the adapter name {brief(name)} is not allowed; allowed: {allowed}"
    return None


def is_expression(value: object) -> bool:
    """Whether `value` can stand for DEFAULT."""
    try:
        return isinstance(value, str) and _compiled(value) is not None
    except re.error:
        return False


@functools.lru_cache(maxsize=8)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
