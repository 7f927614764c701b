"""Folders in the temporary directory that go with the process that made them, however it ends.

vLLM's server kills its workers as it stops (unless `--shutdown-timeout` gives them time), so what a process could not
remove is removed by the next that makes such a folder. Whether a folder's process lives is told by a lock on a file in
it, which the system gives back when the process is gone; process numbers would mean nothing across containers.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

HANDED = "flora-handed-"  # what the folders of adapters that were handed over begin with
# An environment variable by which a supervisor names its own such folder to its server.
KEPT_UPLOADS = "FLORA_KEPT_UPLOADS"
_LOCK = ".held"
_held: dict[Path, int] = {}


def make(prefix: str) -> Path:
    """A new folder whose name begins with `prefix`; those of that name whose processes are gone are removed."""
    for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        _remove_if_left(other)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    # Locked before it has the name that others try.
    held = os.open(folder / f"{_LOCK}.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: nobody can take it either
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / f"{_LOCK}.new").rename(folder / _LOCK)
    _held[folder] = held
    return folder


def remove(folder: Path) -> None:
    """Remove a folder that `make` made."""
    shutil.rmtree(folder, ignore_errors=True)
    if (held := _held.pop(folder, None)) is not None:
        os.close(held)


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another user's, another's who is faster, or still held
        held = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(held)
