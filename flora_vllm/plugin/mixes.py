"""Mixes of loaded adapters: how clients write one, and how the engine is told of it.

A client names parts and weights, in text (`mix:a*0.7+b*0.3`) or as an object (`{"a": 0.7, "b": 0.3}`). The engine gets
them in the path of a LoRARequest: which content of which directory, by digest, with which weight. So a mix needs no
part to stay loaded, is evicted and comes back like an adapter, and another content or weight is another identity.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.formats.limits import shown
from flora_vllm.plugin.identity import split_identity

PREFIX = "mix:"
MOST_PARTS = 8
_PART = re.compile(r"(?P<name>.+)\*(?P<weight>-?(\d+\.?\d*|\.\d+)(e-?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """`weight` of the adapter that the engine knows as `name` (`name@digest`) and that lies at `path`."""

    weight: float
    name: str
    path: str


def is_mix(path: str) -> bool:
    return path.startswith(PREFIX)


def text_of(weights: Mapping[str, float]) -> str:
    """The name under which a mix goes that was given none."""
    return PREFIX + "+".join(f"{name}*{weight!r}" for name, weight in weights.items())


def weights_in(text: str) -> dict[str, float]:
    """Part -> weight of `mix:a*0.7+b*0.3` or `mix:{"a": 0.7, "b": 0.3}`. Raises AdapterError."""
    if text.startswith(f"{PREFIX}{{"):
        try:
            weights = json.loads(text.removeprefix(PREFIX))
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"mix {shown(text)} is not what JSON calls an object: {error}") from error
        return checked(weights)
    found: dict[str, float] = {}
    for piece in text.removeprefix(PREFIX).split("+"):
        match = _PART.fullmatch(piece)
        if match is None or match["name"] in found:
            raise AdapterError(
                f"mix {text!r}: {piece!r} must be a name, * and a weight, each name once: mix:a*0.7+b*0.3"
            )
        found[match["name"]] = float(match["weight"])
    return checked(found)


def checked(weights: Any) -> dict[str, float]:
    """Part -> weight of a request's object. Raises AdapterError."""
    fits = isinstance(weights, Mapping) and all(
        isinstance(name, str)
        and isinstance(weight, int | float)
        and not isinstance(weight, bool)
        and _is_finite(weight)
        for name, weight in weights.items()
    )
    if not fits or not 0 < len(weights) <= MOST_PARTS:
        raise AdapterError(
            f"a mix must be an object of 1 to {MOST_PARTS} names of loaded adapters, each with a finite weight; got "
            f"{shown(weights)}"
        )
    return {name: float(weight) for name, weight in weights.items()}


def _is_finite(weight: float) -> bool:
    try:
        return math.isfinite(float(weight))
    except OverflowError:
        return False


def parts_of(weights: Mapping[str, float], loaded: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts by what is `loaded` under their names (LoRARequests); those of a mix take its place.

    Raises AdapterError for names that are not, and for more than MOST_PARTS parts.
    """
    missing = sorted(set(weights) - set(loaded))
    if missing:
        raise AdapterError(f"mix {dict(weights)!r}: {missing} are not loaded; load them first")
    parts: list[Part] = []
    for name, weight in weights.items():
        inner = decoded(loaded[name].lora_path)
        parts += (
            [Part(weight, loaded[name].lora_name, loaded[name].lora_path)]
            if inner is None
            else [Part(weight * part.weight, part.name, part.path) for part in inner]
        )
    if len(parts) > MOST_PARTS:
        raise AdapterError(f"mix {dict(weights)!r} has {len(parts)} parts; at most {MOST_PARTS} can be mixed")
    return tuple(parts)


def encoded(parts: Sequence[Part]) -> str:
    """What stands in place of a path."""
    return PREFIX + json.dumps([[part.weight, part.name, part.path] for part in parts], separators=(",", ":"))


def decoded(path: str) -> tuple[Part, ...] | None:
    """The parts that `encoded` wrote; None: it is a path."""
    if not path.startswith(f"{PREFIX}[["):
        return None
    return tuple(Part(*part) for part in json.loads(path.removeprefix(PREFIX)))


def digest_of_mix(parts: Sequence[Part]) -> str:
    """Hex SHA-256 of contents and weights; names and places do not matter."""
    content = [[part.weight, split_identity(part.name)[1] or part.path] for part in parts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
