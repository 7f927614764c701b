"""The files of an adapter directory, two and an optional third, read once and as one version.

The directory is opened first and the files through it, so a directory that is replaced by a rename while we read
gives one version, old or new. Files written in place are noticed: size, mtime, ctime and inode must be the
same before and after, for all files, when everything has been read.
"""

import hashlib
import itertools
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.beneath import Directory
from flora_vllm.formats.limits import MAX_CONFIG_BYTES, MAX_SIDECAR_BYTES, MAX_WEIGHTS_BYTES
from flora_vllm.formats.tasks import digest_of_task, split_task

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What a method needs to be computed and its own files leave out; part of the adapter where it is there.
SIDECAR_NAME = "flora_sidecar.json"
FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME, SIDECAR_NAME)
MAX_BYTES = {CONFIG_NAME: MAX_CONFIG_BYTES, WEIGHTS_NAME: MAX_WEIGHTS_BYTES, SIDECAR_NAME: MAX_SIDECAR_BYTES}
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# How often to start over when the whole directory was replaced meanwhile.
_ATTEMPTS = 10
# How many entries of a directory are looked at for a hint.
_MAX_LISTED = 1000
_CHANGED = "changed while it was read; publish adapters by renaming a complete directory"


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """What was on disk. `weights` is writable memory that tensors may share; nobody writes into it."""

    config: bytes
    weights: bytearray
    digest: str


def read_files(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> AdapterFiles:
    """The files of the adapter directory at `path`. Raises AdapterError listing everything that is wrong."""
    files, faults = collect_files(path, root)
    if faults:
        raise adapter_error(str(path), faults)
    return AdapterFiles(bytes(files[CONFIG_NAME]), files[WEIGHTS_NAME], digest_of(files))


def content_digest(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> str:
    """Hex SHA-256 of the files' names and bytes: the same as `read_adapter(path).digest`. Raises AdapterError.

    Of `directory#task` it is another for each task. `root`: see `collect_files`.
    """
    directory, task = split_task(os.fspath(path))
    return digest_of_task(read_files(directory, root).digest, task)


def digest_of(files: Mapping[str, bytes | bytearray]) -> str:
    """SHA-256 over name, size and content of each file, names in order."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def collect_files(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
) -> tuple[dict[str, bytearray], list[str]]:
    """The files that could be read, by name, and the faults; the two that must be are there if there is no fault.

    With a `root` nothing outside it is opened, whatever is renamed or linked meanwhile; `path` may be relative to it.
    """
    files: dict[str, bytearray] = {}
    faults: list[str] = []
    for _ in range(_ATTEMPTS):
        try:
            directory = Directory(path, root)
        except (OSError, ValueError) as error:
            return {}, [_directory_fault(error)]
        with directory:
            try:
                files, faults = _collect_from(directory)
            except OSError as error:  # of the directory itself, which a network file system may lose while it is open
                files, faults = {}, [_directory_fault(error)]
            if not faults or not _was_replaced(path if root is None else Path(root, path), directory.descriptor):
                break
    return files, faults


def _was_replaced(path: str | os.PathLike[str], directory: int) -> bool:
    """Whether `path` now leads to another directory than the open one (which its publisher may be deleting)."""
    try:
        return not os.path.samestat(Path(path).stat(), os.fstat(directory))
    except OSError:
        return True


def _directory_fault(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the path does not exist; give the directory that holds adapter_config.json"
    if isinstance(error, NotADirectoryError):
        return f"the path is not a directory; give the directory that holds {CONFIG_NAME}"
    if isinstance(error, AdapterError):
        return str(error)
    return f"the path cannot be opened ({error.strerror if isinstance(error, OSError) else 'not a path'})"


def _collect_from(directory: Directory) -> tuple[dict[str, bytearray], list[str]]:
    if _is_empty(directory.descriptor):
        return {}, [f"the directory is empty; it must hold {CONFIG_NAME} and {WEIGHTS_NAME}"]
    files: dict[str, bytearray] = {}
    states: dict[str, tuple[int, ...]] = {}
    faults: list[str] = []
    for name in FILE_NAMES:
        try:
            files[name], states[name] = read_one(directory, name, MAX_BYTES[name])
        except FileNotFoundError:
            if name != SIDECAR_NAME:
                faults.append(_missing(name, directory.descriptor))
        except OSError as error:
            faults.append(f"{name}: cannot be read ({error.strerror})")
        except AdapterError as error:
            faults.append(f"{name}: {error}")
    # Through the name, after all reading: this sees a change of any of them, and a file that took its place.
    for name in (*states, SIDECAR_NAME):
        try:
            now = _state(os.stat(name, dir_fd=directory.descriptor))
        except OSError:
            now = None
        if now != states.get(name) and not any(fault.startswith(f"{name}: ") for fault in faults):
            faults.append(f"{name}: {_CHANGED}")
    return files, faults


def _is_empty(directory: int) -> bool:
    with os.scandir(directory) as entries:
        return next(entries, None) is None


def _missing(name: str, directory: int) -> str:
    """What is said of a missing file: what else the directory holds is not told, but for pickled weights."""
    if name == WEIGHTS_NAME:
        with os.scandir(directory) as entries:
            some = itertools.islice(entries, _MAX_LISTED)
            pickles = sorted(entry.name for entry in some if entry.name.endswith(_PICKLE_ENDINGS))[:4]
        if pickles:
            named = ", ".join(name if name.isprintable() else ascii(name) for name in pickles)
            return (
                f"{named}: pickle files are never read, they can run code; "
                f"save the adapter as {WEIGHTS_NAME} (PEFT: save_pretrained(..., safe_serialization=True)), or run "
                "`flora-vllm convert --pickle DIR OUT` and serve OUT"
            )
    return f"{name}: missing; an adapter's directory holds {CONFIG_NAME} and {WEIGHTS_NAME}"


def read_one(directory: Directory, name: str, most_bytes: int) -> tuple[bytearray, tuple[int, ...]]:
    """(content of a file in the directory, its state: the same when it is unchanged). Raises OSError, AdapterError."""
    # O_NONBLOCK: opening a FIFO must not wait for its writer.
    descriptor = directory.open(name, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise AdapterError("not a regular file")
        if before.st_size > most_bytes:
            raise AdapterError(f"has {before.st_size} bytes; at most {most_bytes} are read")
        data = bytearray(before.st_size)
        view, filled = memoryview(data), 0
        while filled < len(data):
            count = file.readinto(view[filled:])
            if not count:
                raise AdapterError(_CHANGED)
            filled += count
    return data, _state(before)


def _state(result: os.stat_result) -> tuple[int, ...]:
    return result.st_dev, result.st_ino, result.st_size, result.st_mtime_ns, result.st_ctime_ns
