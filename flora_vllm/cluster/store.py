"""Adapter sources and the node's cache: what there is, in which version, and a private copy of it.

A source is a directory, local or on any file system that fsspec opens (s3://, gs://, ...), with one adapter per
sub-directory. An adapter's version is a digest over its files' names, sizes and the store's own change marks (ETag,
checksum or modification time), so a scan reads no tensors. A fetch copies exactly the version asked for: it compares
the version before and after and fails with StaleVersionError if the source changed. Copies are never written again,
so a request that runs keeps its weights while the source moves on. A copy carries the digest of its content and is
checked against it before this process first uses it: a node that lost power may have kept half of one.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from flora_vllm.cluster.config import name_fault
from flora_vllm.cluster.rules.placement import UNLIMITED
from flora_vllm.errors import AdapterError, FloraError
from flora_vllm.formats.config_keys import check_config
from flora_vllm.formats.families.table import family_of
from flora_vllm.formats.limits import shown
from flora_vllm.formats.ranks import stated_rank
from flora_vllm.formats.tensor_file import load_json_object

log = logging.getLogger("ray.serve")

FILES = ("adapter_config.json", "adapter_model.safetensors")
# Part of some adapters (formats/files.py), absent from most.
SIDECAR = "flora_sidecar.json"
# Beside the files of a copy: what their content must be.
DIGEST = "digest"
VERSION_LETTERS = 12
# Where a directory is but the beginning of names, and there no more once its last file went. ("memory": fsspec's own.)
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "obs", "memory"))
# Change marks that stores give, most telling first: of content, then of time.
_MARKS = (
    *("ETag", "etag", "md5Hash", "crc32c", "contentHash", "blob_id", "xet_hash", "sha"),
    *("mtime", "LastModified", "last_modified", "modificationTime", "modified", "modify", "updated", "created"),
)


class StoreError(FloraError, OSError):
    """A source cannot be reached or read now."""


class StaleVersionError(FloraError, RuntimeError):
    """The source no longer has the version asked for; ask the catalogue again."""


@dataclass(frozen=True)
class Entry:
    """One adapter in one version. `rank` as its config says, where a limit counts it; `uri` of its directory."""

    name: str
    version: str
    uri: str
    nbytes: int
    rank: int

    @property
    def id(self) -> str:
        """The name under which replicas know this version."""
        return f"{self.name}@{self.version}"


@contextlib.contextmanager
def _reaching(uri: str, what: str) -> Iterator[None]:
    """Errors of a store become StoreError: its client library raises classes of its own, for lack of credentials too.

    A file that is not there stays FileNotFoundError.
    """
    try:
        yield
    except (FloraError, FileNotFoundError):
        raise
    except Exception as error:
        raise StoreError(f"cannot {what} {uri}: {type(error).__name__}: {error}") from error


def _open(uri: str) -> tuple[Any, str]:
    import fsspec

    with _reaching(uri, "open"):
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    return fs, path


def _ls(fs: Any, path: str) -> list[dict[str, Any]]:
    # Hugging Face's remembers listings, whatever it is told when it is opened.
    fs.invalidate_cache()
    return fs.ls(path, detail=True)


def _followed(fs: Any, info: dict[str, Any]) -> dict[str, Any]:
    """What a symbolic link leads to, under the link's name; of one that leads nowhere, the link."""
    if not info.get("islink") and info["type"] != "link":
        return info
    try:
        return fs.info(info["name"])
    except FileNotFoundError:
        return info


def _listing(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """The adapter's files by name, as the store describes them."""
    named = {PurePosixPath(i["name"]).name: i for i in _ls(fs, path)}
    infos = {name: _followed(fs, named[name]) for name in (*FILES, SIDECAR) if name in named}
    return {name: info for name, info in infos.items() if info["type"] == "file"}


def _version(files: dict[str, dict[str, Any]]) -> str:
    """Raises AdapterError for a file that a new version could take the place of unnoticed."""
    digest = hashlib.sha256()
    for name in sorted(files):
        info = files[name]
        marks = [str(info[m]) for m in _MARKS if info.get(m) is not None]
        if not marks:
            raise AdapterError(
                f"its store tells neither a checksum nor a time of change of {name}, so that a new version of equal "
                "size would not be noticed; keep adapters in a store that does"
            )
        # A file swapped in by rename may keep size and time; its inode tells.
        digest.update(repr((name, info["size"], marks[:1], info.get("ino"))).encode())
    return digest.hexdigest()[:VERSION_LETTERS]


@dataclass(frozen=True)
class Found:
    """What a source has, all by name. `unread`: why an adapter could not be read now; it is what it was."""

    entries: dict[str, Entry] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


class Source:
    """One directory of adapters. Remembers what it read of unchanged versions, and what it found last."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._ranks: dict[tuple[str, str], int] = {}
        self._entries: dict[str, Entry] = {}
        self._was_listed = False

    def scan(self) -> Found:
        """Raises StoreError if the source itself cannot be listed."""
        fs, root = _open(self.uri)
        found = Found()
        entries, faults = found.entries, found.faults
        try:
            with _reaching(self.uri, "list"):
                infos = sorted(_ls(fs, root), key=lambda info: info["name"])
        except FileNotFoundError as error:
            if not (self._was_listed and self.uri.partition("://")[0] in OBJECT_STORES):
                raise StoreError(f"cannot list {self.uri}: there is no such directory") from error
            infos = []
        self._was_listed = True
        for info in infos:
            directory = info["name"]
            name = PurePosixPath(directory).name
            try:
                with _reaching(directory, "read"):
                    if _followed(fs, info)["type"] != "directory":
                        continue
                    files = _listing(fs, directory)
                    fault = self._fault(name, files)
                    if fault is None:
                        entries[name] = self._entry(fs, name, directory, files)
                    elif fault:
                        faults[name] = fault
            except StoreError as error:
                # Says nothing of the adapter: replicas would unload it, and clients be told that it does not exist.
                found.unread[name] = str(error)
                if name in self._entries:
                    entries[name] = self._entries[name]
            except (FileNotFoundError, FloraError) as error:
                faults[name] = str(error)
        current = {(e.name, e.version) for e in entries.values()}
        self._ranks = {k: v for k, v in self._ranks.items() if k in current}
        self._entries = entries
        return found

    @staticmethod
    def _fault(name: str, files: Collection[str]) -> str | None:
        """Why it is not servable; "" for a directory that is no adapter at all."""
        if FILES[0] not in files:
            return ""
        if FILES[1] not in files:
            return f"has no {FILES[1]}"
        return name_fault(name)

    def _entry(self, fs: Any, name: str, directory: str, files: dict[str, dict[str, Any]]) -> Entry:
        version = _version(files)
        if (name, version) not in self._ranks:
            self._ranks[name, version] = _limited_rank(fs.cat_file(files[FILES[0]]["name"]))
        uri = fs.unstrip_protocol(directory)
        return Entry(name, version, uri, int(files[FILES[1]]["size"]), self._ranks[name, version])


def _limited_rank(text: bytes) -> int:
    """The largest rank that an adapter_config.json states, where a rank limit counts it; else 1. Raises AdapterError.

    Of another family's adapter the engine counts what it builds, when it loads it.
    """
    try:
        raw = load_json_object(text)
    except AdapterError as error:
        raise AdapterError(f"{FILES[0]}: {error}") from error
    _, family = family_of(raw)
    if family is None or family.limit is None:
        return 1
    ranks = {key: family.keys[key] for key in (family.rank_key, "rank_pattern") if key in family.keys}
    config = check_config({key: raw[key] for key in ranks if key in raw}, ranks)
    if config.faults:
        raise AdapterError("; ".join(config.faults))
    rank = stated_rank(config, family)
    if rank > UNLIMITED:
        # Placement counts in int64; and an error there would end the controller, for all adapters.
        raise AdapterError(f"{FILES[0]}: rank {shown(rank)} is above {UNLIMITED}, more than any layer has")
    return rank


def _digest(copy: Path) -> str:
    """SHA-256 over the files' digests."""
    digest = hashlib.sha256()
    for name in (*FILES, *([SIDECAR] if (copy / SIDECAR).exists() else [])):
        with (copy / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class Cache:
    """Private copies on this node, one directory per adapter version; several processes may share the root."""

    def __init__(self, root: str | Path, limit_bytes: int) -> None:
        self.root = Path(root).expanduser()
        self.limit_bytes = limit_bytes
        self._checked: set[Path] = set()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"store.cache_dir {self.root} cannot be made ({error.strerror}): name one that nodes can write to"
            ) from error

    def path(self, entry: Entry) -> Path:
        # The source belongs to the key: two sources may hold the same name, and modification times may agree.
        where = hashlib.sha256(entry.uri.encode()).hexdigest()[:8]
        return self.root / f"{entry.id}-{where}"

    def copy_of(self, entry: Entry) -> Path | None:
        """The copy of exactly this version if it is here; asks no store."""
        target = self.path(entry)
        return target if self._is_whole(target) else None

    def fetch(self, entry: Entry) -> Path:
        """The copy of exactly this version. Raises StaleVersionError or StoreError."""
        if (copy := self.copy_of(entry)) is not None:
            return copy
        target = self.path(entry)
        fs, path = _open(entry.uri)
        try:
            with _reaching(entry.uri, "fetch"), tempfile.TemporaryDirectory(prefix=".fetch-", dir=self.root) as made:
                scratch = Path(made) / target.name
                scratch.mkdir()
                self._copy(fs, path, entry, scratch)
                try:
                    scratch.rename(target)
                except OSError:
                    # Another process of this node was first with the same version.
                    if not target.is_dir():
                        raise
        except FileNotFoundError as error:
            raise StaleVersionError(f"{entry.uri} is gone: {error}") from error
        return target

    def _is_whole(self, target: Path) -> bool:
        """Whether a good copy is there, which then counts as used now; a damaged one is removed."""
        try:
            os.utime(target)
            if target not in self._checked:
                if (target / DIGEST).read_text() != _digest(target):
                    raise OSError("its content has another digest")
                self._checked.add(target)
        except OSError as error:
            if target.is_dir():
                log.warning("the copy %s is damaged and is fetched anew: %s", target, error)
                shutil.rmtree(target, ignore_errors=True)
            return False
        return True

    @staticmethod
    def _copy(fs: Any, path: str, entry: Entry, scratch: Path) -> None:
        """Exactly this version into `scratch`, with its digest."""

        def files() -> dict[str, dict[str, Any]]:
            found = _listing(fs, path)
            if set(found) - {SIDECAR} != set(FILES) or _version(found) != entry.version:
                raise StaleVersionError(f"{entry.uri} no longer has version {entry.version}")
            return found

        for name, info in files().items():
            fs.get_file(f"{path}/{name}", str(scratch / name))
            got = (scratch / name).stat().st_size
            if got != info["size"]:
                raise StoreError(f"cannot fetch {entry.uri}: {got} of {info['size']} bytes of {name} came")
        files()
        (scratch / DIGEST).write_text(_digest(scratch))

    def clean(self, keep: Iterable[Path], spare_s: float = 600.0) -> int:
        """Removes the longest unused copies until the limit holds; bytes removed.

        Copies in `keep` stay and count as used now; so do those used within `spare_s`, because other processes of the
        node keep theirs the same way.
        """
        kept = {path for path in keep if path.is_dir()}
        for path in kept:
            os.utime(path)
        copies = []
        for directory in self.root.iterdir():
            try:
                nbytes = sum(f.stat().st_size for f in directory.rglob("*"))
                copies.append((directory.stat().st_mtime, nbytes, directory))
            except (FileNotFoundError, NotADirectoryError):
                continue
        excess = sum(nbytes for _, nbytes, _ in copies) - self.limit_bytes
        removed = 0
        for used_s, nbytes, directory in sorted(copies):
            if removed >= excess:
                break
            if directory in kept or time.time() - used_s < spare_s:
                continue
            shutil.rmtree(directory, ignore_errors=True)
            removed += nbytes
        return removed


class Catalogue:
    """All sources of one base model together; a name in two sources belongs to the first.

    Sources are listed side by side, and one that does not answer within `patience_s` holds up nobody: it is a store
    fault until its answer comes.
    """

    def __init__(self, uris: Iterable[str], patience_s: float = 10.0) -> None:
        self._sources = [Source(uri) for uri in dict.fromkeys(uris)]
        self._patience_s = patience_s
        self._pool = ThreadPoolExecutor(max(1, len(self._sources)), thread_name_prefix="flora-scan")
        self._asked: dict[str, Future[Found]] = {}
        self._last: dict[str, Found] = {}
        self.entries: dict[str, Entry] = {}
        self.faults: dict[str, str] = {}
        # Why an adapter that was never read could not be.
        self.unread: dict[str, str] = {}
        self.store_faults: dict[str, str] = {}

    def scan(self) -> tuple[list[Entry], list[Entry]]:
        """(new or changed, removed) since the last scan. What cannot be reached stays as it was."""
        store_faults = self._list_sources()
        entries: dict[str, Entry] = {}
        faults: dict[str, str] = {}
        unread: dict[str, str] = {}
        for source in self._sources:
            found = self._last.get(source.uri, Found())
            for name, entry in found.entries.items():
                entries.setdefault(name, entry)
            for name, fault in found.faults.items():
                faults.setdefault(name, fault)
            unread |= found.unread
            if found.unread:
                first, count = next(iter(found.unread.values())), len(found.unread)
                store_faults.setdefault(source.uri, f"{count} of its adapters stay as they were: {first}")
        added = [e for n, e in entries.items() if self.entries.get(n) != e]
        removed = [e for n, e in self.entries.items() if n not in entries]
        self.entries, self.faults, self.store_faults = entries, faults, store_faults
        self.unread = {name: why for name, why in unread.items() if name not in entries}
        return added, removed

    def is_listed(self) -> bool:
        """Every source was listed at least once, so a name that is neither here nor `unread` does not exist."""
        return all(source.uri in self._last for source in self._sources)

    def _list_sources(self) -> dict[str, str]:
        """Brings `_last` up to date; faults by source."""
        for source in self._sources:
            if source.uri not in self._asked:
                self._asked[source.uri] = self._pool.submit(source.scan)
        done, _ = wait(self._asked.values(), timeout=self._patience_s)
        faults: dict[str, str] = {}
        for source in self._sources:
            future = self._asked[source.uri]
            if future not in done:
                faults[source.uri] = f"{source.uri} has not answered for {self._patience_s:g} s or more"
                continue
            del self._asked[source.uri]
            try:
                self._last[source.uri] = future.result()
            except StoreError as error:
                faults[source.uri] = str(error)
        return faults
