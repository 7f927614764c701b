"""Which replica serves a request: the rule alone, on row numbers, so that the router and the replay share it.

Warm replicas first, the shortest queue of a few drawn at random: several ingresses with stale queues then do not all
run to the same one. A request leaves the warm ones only when they are all deep in queue and a cold one is clearly
better. Cold ones are ranked by rendezvous hashing, so that ingresses that know nothing of each other agree on where an
adapter goes and a replica that leaves moves only its own adapters.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flora_vllm.errors import ConfigError


@dataclass(frozen=True)
class RoutingOptions:
    """`spill_queue`: requests on a warm replica before a cold one is looked at (its batch size is a good value).

    `spill_ratio`: how many times shorter the cold queue must be. `choices`: replicas compared per request.
    """

    spill_queue: int = 8
    spill_ratio: float = 2.0
    choices: int = 4

    def __post_init__(self) -> None:
        if self.spill_queue < 1 or self.spill_ratio < 1 or self.choices < 1:
            raise ConfigError(
                "routing: spill_queue, spill_ratio and choices must be >= 1, got "
                f"{self.spill_queue}, {self.spill_ratio} and {self.choices}"
            )


def key_of(name: str) -> int:
    """64 bits of a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def rendezvous(key: int, replica_keys: np.ndarray) -> np.ndarray:
    """(R,) uint64 scores of the replicas for one adapter; the highest is its home."""
    mixed = replica_keys ^ np.uint64(key)
    # splitmix64: each input bit reaches every output bit.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def cold_order(key: int, replica_keys: np.ndarray, taken: Sequence[int], count: int) -> list[int]:
    """The first `count` replica rows by rendezvous, without the `taken` ones."""
    scores = rendezvous(key, replica_keys)
    need = min(len(scores), count + len(taken))
    top = np.argpartition(scores, len(scores) - need)[len(scores) - need :] if need < len(scores) else None
    rows = np.arange(len(scores)) if top is None else top
    ranked = rows[np.argsort(scores[rows], kind="stable")[::-1]].tolist()
    skip = set(taken)
    return [r for r in ranked if r not in skip][:count]


def choose(
    key: int,
    warm: Sequence[int],
    replica_keys: np.ndarray,
    queue: Callable[[int], int],
    held: Callable[[int], int],
    options: RoutingOptions,
    rng: random.Random,
) -> list[int]:
    """Replica rows to try, best first; the caller goes on with any other if all of these refuse.

    warm: rows that have the adapter in memory. queue: requests running or waiting on a row. held: adapters in memory
    there; of the first few by rendezvous the emptiest is taken. Empty without replicas.
    """
    drawn = list(warm) if len(warm) <= options.choices else rng.sample(list(warm), options.choices)
    rng.shuffle(drawn)
    drawn.sort(key=queue)
    if drawn and queue(drawn[0]) < options.spill_queue:
        return drawn
    cold = cold_order(key, replica_keys, warm, options.choices)
    home = cold[:]
    cold.sort(key=lambda r: (queue(r) >= options.spill_queue, queue(r) if drawn else held(r), home.index(r)))
    if not drawn:
        return cold
    if cold and queue(cold[0]) * options.spill_ratio < queue(drawn[0]):
        return [*cold[:1], *drawn]
    return [*drawn, *cold]
