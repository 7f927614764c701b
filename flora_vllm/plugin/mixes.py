"""Mixes of loaded adapters: how clients write one, and how the engine is told of it.

A client names parts and weights, in text (`mix:a*0.7+b*0.3`) or as an object (`{"a": 0.7, "b": 0.3}`), and maybe one of
PEFT's merge methods in place of the exact sum (`{"mix": {...}, "method": "ties", "density": 0.5}`). Or it names LoRAs
among which each token chooses: `arrow:a+b`, `{"adapters": ["a", "b"], "top_k": 1}`. The engine gets them in the path of
a LoRARequest: which content of which directory, by digest, with which weight. So a mix needs no part to stay loaded, is
evicted and comes back like an adapter, and another content, weight or option is another identity.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.formats.arrow import Routing
from flora_vllm.formats.limits import shown
from flora_vllm.formats.merge_methods import Method, method_of
from flora_vllm.plugin.identity import split_identity
from flora_vllm.plugin.mix_paths import ARROW_PREFIX, CHOOSER_PREFIX, ENCODED, PREFIX

MIX = "MIX"  # the family of a sum
MOST_PARTS = 8
MOST_ROUTED = 64
_ROUTED = "arrow"
_PART = re.compile(r"(?P<name>.+)\*(?P<weight>-?(\d+(\.\d*)?|\.\d+)(e-?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """`weight` of the adapter that the engine knows as `name` (`name@digest`) and that lies at `path`."""

    weight: float
    name: str
    path: str


@dataclass(frozen=True)
class Mix:
    """`parts` as the exact weighted sum, merged by `method`, or each token's choice among them."""

    parts: tuple[Part, ...]
    method: Method | Routing | None = None


@dataclass(frozen=True)
class Asked:
    """A mix as a client wrote it: loaded names and weights."""

    weights: Mapping[str, float]
    method: Method | Routing | None = None


def is_mix(path: str) -> bool:
    return path.startswith((PREFIX, ARROW_PREFIX))


def text_of(weights: Mapping[str, float]) -> str:
    """The name under which a mix goes that was given none."""
    return PREFIX + "+".join(f"{name}*{weight!r}" for name, weight in weights.items())


def first_part(name: str) -> str:
    """Of the name of a mix that was given none, the first adapter in it; any other name as it is."""
    match = _PART.fullmatch(name.removeprefix(PREFIX).split("+")[0]) if name.startswith(PREFIX) else None
    return name if match is None else match["name"]


def asked_in(text: str) -> Asked:
    """Of `mix:a*0.7+b*0.3`, `mix:{"a": 0.7, "b": 0.3}` or `mix:{"mix": {...}, "method": ...}`, and of `arrow:a+b` or
    `arrow:{"adapters": [...], "top_k": ...}`. Raises AdapterError."""
    if text.startswith(ARROW_PREFIX):
        inside = text.removeprefix(ARROW_PREFIX)
        return _routed(_object_in(text, inside) if inside.startswith("{") else {"adapters": inside.split("+")})
    if text.startswith(f"{PREFIX}{{"):
        asked = _object_in(text, text.removeprefix(PREFIX))
        if isinstance(asked.get("mix"), dict):
            options = {key: value for key, value in asked.items() if key != "mix"}
            if "method" not in options:
                raise AdapterError(f"mix {shown(text)}: options of a merge need its method")
            return Asked(checked(asked["mix"]), _servable(method_of(options)))
        return Asked(checked(asked))
    found: dict[str, float] = {}
    for piece in text.removeprefix(PREFIX).split("+"):
        match = _PART.fullmatch(piece)
        if match is None or match["name"] in found:
            raise AdapterError(
                f"mix {text!r}: {piece!r} must be a name, * and a weight, each name once: mix:a*0.7+b*0.3"
            )
        found[match["name"]] = float(match["weight"])
    return Asked(checked(found))


def _object_in(text: str, inside: str) -> dict[str, Any]:
    try:
        return json.loads(inside)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"mix {shown(text)} is not what JSON calls an object: {error}") from error


def _routed(asked: Mapping[str, Any]) -> Asked:
    """An arrow's adapters, the weight of each 1: its gate weighs. Without `top_k` it is PEFT's 3, or all of fewer."""
    known = ("adapters", "top_k", "temperature", "seed")
    if strange := sorted(map(str, asked.keys() - set(known))):
        raise AdapterError(f"{shown(strange)} are no options of an arrow; allowed: {', '.join(known)}")
    names: Any = asked.get("adapters")
    fits = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not fits or not 2 <= len(names) <= MOST_ROUTED or len({*names}) < len(names):
        raise AdapterError(
            f"an arrow's adapters must be 2 to {MOST_ROUTED} different names of loaded LoRAs; got {shown(names)}"
        )
    options = {"top_k": min(Routing.top_k, len(names)), **asked}
    del options["adapters"]
    return Asked(dict.fromkeys(names, 1.0), Routing(**options))


def _servable(method: Method) -> Method:
    if method.decomposes:
        raise AdapterError(
            f"method {method.method} decomposes a matrix of every module, for which a server has no time: write the "
            "merged adapter with `flora-vllm merge --method` and load that"
        )
    return method


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


def mix_of(asked: Asked, loaded: Mapping[str, Any]) -> Mix:
    """The parts by what is `loaded` under their names (LoRARequests); those of a sum take its place in a sum.

    Raises AdapterError for names that are not, for more than MOST_PARTS parts, and for a merge that is a part or has
    one that is a mix: no method says what that would be.
    """
    weights = asked.weights
    missing = sorted(set(weights) - set(loaded))
    if missing:
        raise AdapterError(f"mix {dict(weights)!r}: {missing} are not loaded; load them first")
    parts: list[Part] = []
    for name, weight in weights.items():
        if loaded[name].lora_path.startswith(CHOOSER_PREFIX):
            raise AdapterError(
                f"mix {dict(weights)!r}: {name!r} chooses by the prompt, which no mix has; name it alone"
            )
        inner = decoded(loaded[name].lora_path)
        if inner is not None and (asked.method or inner.method):
            raise AdapterError(f"mix {dict(weights)!r}: {name!r} is a mix itself; a merge's parts are adapters")
        parts += (
            [Part(weight, loaded[name].lora_name, loaded[name].lora_path)]
            if inner is None
            else [Part(weight * part.weight, part.name, part.path) for part in inner.parts]
        )
    if len(parts) > MOST_PARTS and not isinstance(asked.method, Routing):
        raise AdapterError(f"mix {dict(weights)!r} has {len(parts)} parts; at most {MOST_PARTS} can be mixed")
    return Mix(tuple(parts), asked.method)


def encoded(mix: Mix) -> str:
    """What stands in place of a path."""
    parts = [[part.weight, part.name, part.path] for part in mix.parts]
    return PREFIX + json.dumps([*parts, *_options(mix)], separators=(",", ":"))


def decoded(path: str) -> Mix | None:
    """The mix that `encoded` wrote; None: it is a path."""
    if not path.startswith(ENCODED):
        return None
    written = json.loads(path.removeprefix(PREFIX))
    method = _method_in(written.pop()) if isinstance(written[-1], dict) else None
    return Mix(tuple(Part(*part) for part in written), method)


def family_of(mix: Mix) -> str:
    """What its family is called where adapters are listed: merges are LoRAs, or an Arrow."""
    return MIX if mix.method is None else "ARROW" if isinstance(mix.method, Routing) else "LORA"


def _method_in(options: dict[str, Any]) -> Method | Routing:
    return Routing(**options[_ROUTED]) if _ROUTED in options else method_of(options)


def digest_of_mix(mix: Mix) -> str:
    """Hex SHA-256 of contents, weights and method; names and places do not matter."""
    content = [[part.weight, split_identity(part.name)[1] or part.path] for part in mix.parts]
    return hashlib.sha256(json.dumps([*content, *_options(mix)]).encode()).hexdigest()


def _options(mix: Mix) -> list[dict[str, Any]]:
    if isinstance(mix.method, Routing):
        return [{_ROUTED: asdict(mix.method)}]
    return [] if mix.method is None else [mix.method.options()]
