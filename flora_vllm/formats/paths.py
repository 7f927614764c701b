"""Where an adapter path that arrives by request may lead: nowhere but below the operator's root."""

import os
from pathlib import Path

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.files import FILE_NAMES


def resolve_under(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """The real directory of `path` (relative to `root`, or absolute) if it and its files lie under `root`.

    Raises AdapterError for `..`, for a path outside, and for symbolic links of the directory, one of its parents
    or one of its files whose target is outside. Whether the files exist is the reader's business.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise adapter_error(repr(text), ["the path contains a NUL byte"])
    if ".." in Path(text).parts:
        raise adapter_error(text, [f"the path contains '..'; give a path below {os.fspath(root)}"])
    real_root = Path(os.path.realpath(root))
    directory = _real(real_root / text, text)
    faults = []
    if directory == real_root or not directory.is_relative_to(real_root):
        faults.append("the path does not lead to a directory below the adapter root")
    else:
        for name in FILE_NAMES:
            if not _real(directory / name, text).is_relative_to(real_root):
                faults.append(f"{name}: a symbolic link that leaves the adapter root; put the file itself there")
    if faults:
        raise adapter_error(text, faults)
    return directory


def _real(path: Path, text: str) -> Path:
    try:
        return Path(os.path.realpath(path))
    except OSError as error:
        raise AdapterError(f"adapter {text}: the path cannot be resolved ({error.strerror})") from None
