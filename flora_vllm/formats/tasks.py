"""One file, several tasks (Poly, MTL-LoRA): `directory#task` addresses one of them."""

import hashlib
from pathlib import Path


def split_task(path: str) -> tuple[str, str | None]:
    """(directory, task) of `directory#task`; a directory whose own name has a # is taken as it is."""
    directory, mark, task = path.rpartition("#")
    return (directory, task) if mark and directory and task and not _is_directory(path) else (path, None)


def _is_directory(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # a name that is too long for the file system
        return False


def digest_of_task(digest: str, task: str | None) -> str:
    """The digest of one task of the files with `digest`; None: of all there is."""
    return digest if task is None else hashlib.sha256(f"{digest}#{task}".encode()).hexdigest()
