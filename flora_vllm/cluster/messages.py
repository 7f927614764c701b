"""What replicas, controller and ingress tell each other. Plain frozen data: it crosses process borders."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flora_vllm.cluster.store import Entry


@dataclass(frozen=True)
class Report:
    """A replica's state, sent with every sync. Everything the controller knows of it is in here.

    busy_s: request-seconds per adapter id since the last sync. faults: ids this engine refuses, with the reason;
    troubles: ids it could not get the last time. retired: ids it refuses as no longer in the catalogue.
    """

    replica: str
    node: str
    slots: int
    nbytes: int
    max_rank: int
    is_warming: bool
    resident: tuple[str, ...]
    busy_s: Mapping[str, float] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)
    retired: tuple[str, ...] = ()
    in_use: int = 0
    loads: int = 0


@dataclass(frozen=True)
class Orders:
    """What a replica should do. `wanted` is None while there is no plan yet.

    stale: of the ids in memory, refused or retired there, those that left the catalogue.
    """

    wanted: tuple[Entry, ...] | None
    stale: tuple[str, ...]
    replicas_wanted: int


@dataclass(frozen=True)
class CatalogueNews:
    """Changes since the number the asker had.

    With `is_full` they are everything the teller knows; if a source has not told it all yet (`is_complete` is false),
    what the asker had is still good.
    """

    born: str
    number: int
    is_full: bool
    entries: tuple[Entry, ...]
    removed: tuple[str, ...]
    is_complete: bool = True
