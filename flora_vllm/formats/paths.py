"""Where an adapter path that arrives by request may lead: nowhere but below the operator's root."""

import os
from pathlib import Path

from flora_vllm.errors import adapter_error
from flora_vllm.formats.files import FILE_NAMES
from flora_vllm.formats.limits import brief

MAX_PATH_LETTERS = 4_000


def resolve_under(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """The real directory of `path` (relative to `root`, or absolute) if it and its files lie under `root`.

    What is read afterwards is read by `collect_files` with the same root, which holds against changes made meanwhile.
    Raises AdapterError for `..`, for a path outside, and for symbolic links of the directory, one of its parents
    or one of its files whose target is outside. Whether the files exist is the reader's business.
    """
    text = os.fspath(path)
    if fault := path_fault(text):
        raise adapter_error(brief(text), [fault])
    if ".." in Path(text).parts:
        raise adapter_error(text, ["the path contains '..'; give a path below the adapter root"])
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


def path_fault(path: str) -> str | None:
    """Why `path` cannot be a path, whatever the file system; None if it can."""
    if "\0" in path:
        return "the path contains a NUL byte"
    if len(path) > MAX_PATH_LETTERS:
        return f"the path has {len(path)} letters; at most {MAX_PATH_LETTERS} are allowed"
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return "the path contains letters that no file system has"
    return None


def _real(path: Path, text: str) -> Path:
    try:
        return Path(os.path.realpath(path))
    except OSError as error:
        raise adapter_error(text, [f"the path cannot be resolved ({error.strerror})"]) from None
