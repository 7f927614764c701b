"""Opens directories and files that must lie below a root, in a way that no rename or link made meanwhile can lead out.

Each step is taken from the open descriptor of the directory before it (openat), links are followed here and not by the
kernel, and `..` goes back to a descriptor that was passed on the way: what is read is what was checked. Links within
the root are allowed, relative ones and absolute ones that name the root by its real path.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from flora_vllm.errors import AdapterError

# As many as the kernel follows.
_MAX_LINKS = 40
_OUTSIDE = "it leads out of the adapter root; put the files themselves below it"


class Directory:
    """An open directory, and the way to it from its root; without a root the kernel follows links as it likes.

    A context manager. Raises OSError where the way cannot be gone, AdapterError where it leads out of the root.
    """

    def __init__(self, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> None:
        self._root = None if root is None else os.path.realpath(root)
        self._way: list[int] = []
        try:
            if self._root is None:
                self._way.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            else:
                self._way.append(os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                last = self._walk(self._below_root(os.fspath(path)))
                if last is not None:
                    self._way.append(os.open(last, os.O_RDONLY | os.O_DIRECTORY | _STEP, dir_fd=self._way[-1]))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def descriptor(self) -> int:
        return self._way[-1]

    def close(self) -> None:
        while self._way:
            os.close(self._way.pop())

    def open(self, name: str, flags: int) -> int:
        """A new descriptor of the file `name` in the directory."""
        if self._root is None:
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=self.descriptor)
        with self._kept_way():
            last = self._walk([name])
            if last is None:
                raise IsADirectoryError(21, "Is a directory", name)
            return os.open(last, flags | _STEP, dir_fd=self._way[-1])

    @contextlib.contextmanager
    def _kept_way(self) -> Iterator[None]:
        way, self._way = self._way, [os.dup(step) for step in self._way]
        try:
            yield
        finally:
            self.close()
            self._way = way

    def _below_root(self, path: str) -> list[str]:
        """The steps from the root to `path`, which is relative to it or names it."""
        if not Path(path).is_absolute():
            return [*Path(path).parts]
        assert self._root is not None
        if not Path(path).is_relative_to(self._root):
            raise AdapterError(_OUTSIDE)
        return [*Path(path).relative_to(self._root).parts]

    def _walk(self, steps: list[str]) -> str | None:
        """Go all steps but the last and return that: the name of what is no link. None if they end on the way."""
        pending, links = steps[::-1], 0
        while pending:
            step = pending.pop()
            if step in ("", "."):
                continue
            if step == "..":
                if len(self._way) == 1:
                    raise AdapterError(_OUTSIDE)
                os.close(self._way.pop())
                continue
            found = os.stat(step, dir_fd=self._way[-1], follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                if (links := links + 1) > _MAX_LINKS:
                    raise OSError(40, "Too many levels of symbolic links", step)
                target = os.readlink(step, dir_fd=self._way[-1])
                if Path(target).is_absolute():
                    pending += self._below_root(target)[::-1]
                    while len(self._way) > 1:
                        os.close(self._way.pop())
                else:
                    pending += Path(target).parts[::-1]
                continue
            if not any(rest not in ("", ".") for rest in pending):
                return step
            self._way.append(os.open(step, os.O_RDONLY | os.O_DIRECTORY | _STEP, dir_fd=self._way[-1]))
        return None


# What was no link a moment ago may be one now: then this fails, and nothing is followed.
_STEP = os.O_NOFOLLOW | os.O_CLOEXEC
