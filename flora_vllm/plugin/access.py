"""Who may use which adapters: API keys, the tenants of an `--adapter-acl` file, and whose request is being answered.

Nothing here knows of HTTP or vLLM. `CURRENT` is set once a request (gate.py) and read where adapters are looked up:
`ScopedRequests` stands in for the server's table of adapters and shows each tenant its own. Work that no request asked
for (start-up, background releases before the first request) runs as the operator.

    {"tenants": [{"name": "acme", "key_sha256": ["<printf %s KEY | sha256sum>"], "adapters": ["acme/*"],
                  "may_load": true, "directory": "acme"}]}

`adapters`: shell patterns of the names that the tenant sees and uses. `may_load`: whether it may also load and unload
them; the paths it gives then lie below `directory` of the adapter root.
"""

import fnmatch
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flora_vllm.errors import ConfigError

logger = logging.getLogger(__name__)

_RECHECK_S = 1.0
# What follows it in a name says which of its adapters a chooser took (choosers.py); patterns are for what is before it.
CHOICE = "?"


@dataclass(frozen=True)
class Tenant:
    """Whose key a request bears. `directory`: below the adapter root; "" is all of it."""

    name: str
    adapters: tuple[str, ...] = ("*",)
    may_load: bool = True
    directory: str = ""

    def may_use(self, adapter: str) -> bool:
        name, _, _ = adapter.partition(CHOICE)
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.adapters)


OPERATOR = Tenant("operator")
NOBODY = Tenant("nobody", adapters=(), may_load=False)
CURRENT: ContextVar[Tenant] = ContextVar("flora_tenant", default=OPERATOR)
# Whose share of the engine the present request takes (shares.py); "" if nobody's key asked for it.
SHARE: ContextVar[str] = ContextVar("flora_share", default="")


def is_operators(static: Iterable[Any] | None, name: str, path: str) -> bool:
    """Whether the command line names this adapter (among `static`): its path is not confined to the adapter root.

    A tenant that gives the same may have put something else there since.
    """
    return CURRENT.get() is OPERATOR and any(given.name == name and given.path == path for given in static or ())


def root_of_request(adapter_root: str | None) -> str | None:
    """The root that paths of the present request are confined to: the tenant's part of the operator's."""
    directory = CURRENT.get().directory
    if not directory:
        return adapter_root
    assert adapter_root is not None, "the rules were refused without one"
    return str(Path(adapter_root, directory))


@dataclass(frozen=True)
class Keys:
    """SHA-256 of a key -> whose it is. Without any key everybody is the operator, as in vLLM."""

    tenants: Mapping[bytes, Tenant]

    def holder(self, authorization: str | None) -> Tenant | None:
        """Whose request this is by its Authorization header; None if the key is missing or unknown."""
        if not self.tenants:
            return OPERATOR
        scheme, given = _given(authorization)
        found = None
        for known, tenant in self.tenants.items():
            if secrets.compare_digest(given, known):  # all of them, in the same time
                found = tenant
        return found if scheme.lower() == "bearer" else None

    def share(self, holder: Tenant | None, authorization: str | None) -> str:
        """By whom the engine is shared: tenants, and the operator's keys, each for itself."""
        if holder is None or not self.tenants:
            return ""
        return f"key {_given(authorization)[1].hex()[:16]}" if holder is OPERATOR else f"tenant {holder.name}"


def _given(authorization: str | None) -> tuple[str, bytes]:
    """The scheme and the SHA-256 of the key of an Authorization header."""
    scheme, _, key = (authorization or "").partition(" ")
    return scheme, hashlib.sha256(key.encode("latin-1")).digest()


class AccessRules:
    """The keys there are: the operator's, and those of the file, which is read again when it changes."""

    def __init__(self, api_keys: Sequence[str], acl_file: str | None, *, has_root: bool) -> None:
        """Raises ConfigError for a file that makes no sense."""
        self._operators = {hashlib.sha256(key.encode()).digest(): OPERATOR for key in api_keys}
        self._file, self._has_root = acl_file, has_root
        self._read_at, self._state = 0.0, None
        self.has_tenants = acl_file is not None
        self._keys = Keys(self._operators)
        if acl_file is not None:
            self._state = _state(acl_file)
            self._keys = self._read(acl_file)

    def keys(self) -> Keys:
        if self._file is not None and time.monotonic() - self._read_at > _RECHECK_S:
            self._read_at = time.monotonic()
            try:
                if (state := _state(self._file)) != self._state:
                    self._keys, self._state = self._read(self._file), state
                    logger.info("read %s again: %d tenants' keys", self._file, len(self._keys.tenants))
            except ConfigError as error:
                logger.error("the adapter ACL is not changed: %s", error)
        return self._keys

    def _read(self, path: str) -> Keys:
        return Keys({**read_tenants(path, has_root=self._has_root), **self._operators})


def _state(path: str) -> tuple[int, int, int]:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise ConfigError(f"adapter_acl (--adapter-acl) {path}: {error.strerror}") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_tenants(path: str, *, has_root: bool) -> dict[bytes, Tenant]:
    """SHA-256 of each key -> its tenant. Raises ConfigError with the first fault."""
    where = f"adapter_acl (--adapter-acl) {path}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read ({error})") from None
    if not isinstance(content, dict) or set(content) != {"tenants"} or not isinstance(content["tenants"], list):
        raise ConfigError(f'{where}: must be {{"tenants": [...]}}')
    found: dict[bytes, Tenant] = {}
    for entry in content["tenants"]:
        tenant, keys = _tenant(entry, where)
        if tenant.may_load and not (has_root and tenant.directory):
            raise ConfigError(
                f"{where}: tenant {tenant.name!r} may load, so it needs a 'directory', below --flora-adapter-root"
            )
        for key in keys:
            if found.setdefault(key, tenant) is not tenant:
                raise ConfigError(f"{where}: tenants {found[key].name!r} and {tenant.name!r} have the same key")
    return found


def _tenant(entry: Any, where: str) -> tuple[Tenant, list[bytes]]:
    known = {field.name for field in fields(Tenant)} | {"key_sha256"}
    if not isinstance(entry, dict) or not {"name", "key_sha256", "adapters"} <= set(entry) <= known:
        raise ConfigError(f"{where}: a tenant has name, key_sha256, adapters, and may have may_load and directory")
    values = {"may_load": False, "directory": "", **entry}
    keys, adapters, directory = values.pop("key_sha256"), values.pop("adapters"), values["directory"]
    if not _are_texts(keys) or not all(re.fullmatch("[0-9a-f]{64}", key) for key in keys):
        raise ConfigError(f"{where}: key_sha256 is a list of 64 hexadecimal digits each (printf %s KEY | sha256sum)")
    if not _are_texts(adapters):
        raise ConfigError(f"{where}: adapters is a list of shell patterns, got {adapters!r}")
    if not isinstance(values["name"], str) or not isinstance(values["may_load"], bool):
        raise ConfigError(f"{where}: name is a text and may_load true or false, got {entry!r}")
    if not isinstance(directory, str) or Path(directory).is_absolute() or ".." in Path(directory).parts:
        raise ConfigError(f"{where}: directory is a path below the adapter root, got {directory!r}")
    return Tenant(adapters=tuple(adapters), **values), [bytes.fromhex(key) for key in keys]


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, str) and entry for entry in value)


class ScopedRequests(dict[str, Any]):
    """Adapter name -> the server's LoRARequest, of which a request sees those that its tenant may use.

    A dict, since vLLM's handlers look adapters up in a dict of this name in many places: scoping the table scopes them
    all, and those to come. Iteration, `len` and `pop` are scoped alike.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parts: dict[str, tuple[str, ...]] = {}

    def open_by_parts(self, name: str, parts: Iterable[str]) -> None:
        """Who may use all of `parts` may use `name`, and nobody else: no pattern is meant for a mix without a name."""
        self._parts[name] = tuple(parts)

    def parts_of(self, names: Iterable[str]) -> tuple[str, ...]:
        """These, and in place of such mixes among them what they are mixed of."""
        return tuple(part for name in names for part in self._parts.get(name, (name,)))

    def _may_use(self, name: str) -> bool:
        return all(map(CURRENT.get().may_use, self._parts.get(name, (name,))))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._may_use(name) and super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, default) if name in self else default

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self:
            if default:
                return default[0]
            raise KeyError(name)
        self._parts.pop(name, None)
        return super().pop(name)

    def __delitem__(self, name: str) -> None:
        self.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in super().__iter__() if self._may_use(name)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keys(self) -> Any:
        return dict.fromkeys(self).keys()

    def values(self) -> Any:
        return [super(ScopedRequests, self).__getitem__(name) for name in self]

    def items(self) -> Any:
        return [(name, super(ScopedRequests, self).__getitem__(name)) for name in self]


class TenantTable(MutableMapping[str, Any]):
    """A table in which each tenant has entries of its own, the operator too: the same key may have one for each."""

    def __init__(self) -> None:
        self._entries: dict[tuple[bool, str], dict[str, Any]] = {}

    def _own(self) -> dict[str, Any]:
        tenant = CURRENT.get()
        return self._entries.setdefault((tenant == OPERATOR, tenant.name), {})

    def __getitem__(self, key: str) -> Any:
        return self._own()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._own()[key] = value

    def __delitem__(self, key: str) -> None:
        del self._own()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own())

    def __len__(self) -> int:
        return len(self._own())
