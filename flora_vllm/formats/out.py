"""Where a command may put what it makes: looked at before the work, so that nothing is made that has no place."""

import os
from collections.abc import Collection
from pathlib import Path

from flora_vllm.errors import AdapterError


def replaceable(out: Path, names: Collection[str] = ()) -> Path:
    """Where `out` leads, links followed, if one rename can put a directory there.

    Nothing is there, or a directory of nothing but `names`. Raises AdapterError, what to do instead in it.
    """
    real = Path(os.path.realpath(out))
    if real.exists():
        if real.samefile("."):
            raise AdapterError(f"{out} is the directory that you are in; give a new one, such as ./adapter")
        if real.is_mount():
            raise AdapterError(f"{out} is a mount point and cannot be replaced; give a new directory in it")
        if not real.is_dir() or {entry.name for entry in real.iterdir()} - set(names):
            if names:
                raise AdapterError(
                    f"{out} exists and holds more than an adapter's {' and '.join(names)}; use a new directory"
                )
            raise AdapterError(f"{out} exists and is not an empty directory; give a new one")
    above = next(parent for parent in real.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise AdapterError(f"{out} can't be written: {above} is no directory that you may write to; give another place")
    return real
