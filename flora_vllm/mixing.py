"""A mix of adapters as one: `W + Σ w_i (W_i - W)`, from the slot contents of its parts.

Terms add up by standing side by side, weighted: `plain = 1 - Σ w_i + Σ w_i plain_i`, factors joined with one side
weighted, offsets summed. So a mix of any families takes one slot and costs what one adapter of the summed ranks does.
A part that turns the layer's input or swaps its outputs is no sum of its own and `W x`: it can only be used alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.ops.rare import RareTerm
from flora_vllm.ops.terms import LayerTerms, SliceTerms

# What is left of 1 - Σ w_i by rounding is no weight: it would cost a base product.
_ZERO = 2.0**-40


@dataclass
class _Joined:
    """A slice of `size` outputs while parts are added to it."""

    size: int
    plain: torch.Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64))
    factors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    offset_O: torch.Tensor | None = None
    rare: list[RareTerm] = field(default_factory=list)

    def add(self, weight: float, part: SliceTerms) -> None:
        self.plain = self.plain - weight + (0 if part.plain_O is None else weight * part.plain_O.double())
        for name in ("a_RI", "down_RI"):
            self._append(name, getattr(part, name), 1.0)
        for name in ("b_RO", "up_RO"):
            self._append(name, getattr(part, name), weight)
        if part.offset_O is not None:
            offset_O = weight * part.offset_O
            self.offset_O = offset_O if self.offset_O is None else self.offset_O + offset_O
        self.rare += [term.gained(torch.full((self.size,), weight)) for term in part.rare]

    def _append(self, name: str, factor: torch.Tensor | None, weight: float) -> None:
        if factor is not None:
            self.factors.setdefault(name, []).append(factor if weight == 1 else factor * weight)

    def finished(self) -> SliceTerms:
        is_absent = bool((self.plain.abs() < _ZERO).all())
        joined = {name: torch.cat(parts) for name, parts in self.factors.items()}
        plain = None if is_absent else self.plain.float()
        return SliceTerms(plain, **joined, offset_O=self.offset_O, rare=tuple(self.rare))


def mixed(
    parts: Sequence[tuple[float, Mapping[str, LayerTerms]]], sizes: Mapping[str, Sequence[int]]
) -> dict[str, LayerTerms]:
    """Layer name -> slot contents of the mix of (weight, layer name -> slot contents).

    `sizes`: outputs of each slice of a layer, of this rank.

    Raises AdapterError naming the layers of parts that cannot be weighted or stand beside others.
    """
    if len(parts) == 1 and parts[0][0] == 1:
        return dict(parts[0][1])
    _refuse_what_is_no_sum(parts)
    layers: dict[str, LayerTerms] = {}
    for name in dict.fromkeys(name for _, layers_of_part in parts for name in layers_of_part):
        shares = [(weight, layers_of_part[name]) for weight, layers_of_part in parts if name in layers_of_part]
        layers[name] = tuple(
            _mixed_slice([(weight, terms[i]) for weight, terms in shares], size) for i, size in enumerate(sizes[name])
        )
    return layers


def _mixed_slice(parts: Sequence[tuple[float, SliceTerms | None]], size: int) -> SliceTerms | None:
    present = [(weight, part) for weight, part in parts if part is not None]
    if not present:
        return None
    joined = _Joined(size)
    for weight, part in present:
        joined.add(weight, part)
    return joined.finished()


def _refuse_what_is_no_sum(parts: Sequence[tuple[float, Mapping[str, LayerTerms]]]) -> None:
    alone = sorted(
        {
            (number, name)
            for number, (_, layers) in enumerate(parts, 1)
            for name, terms in layers.items()
            if any(term.stage != "added" for part in terms if part is not None for term in part.rare)
        }
    )
    if alone:
        number, name = alone[0]
        raise AdapterError(
            f"part {number} turns the input, swaps the outputs or routes the tokens of {len(alone)} layers, the first "
            f"{name!r}: such an "
            "adapter adds to no other and has no share; use it alone, with weight 1"
        )


def mix_faults(layers: Mapping[str, LayerTerms], flora: int | None, lora: int | None) -> Iterator[str]:
    """Where a mix is built with more than one adapter may be: scaled products, low-rank terms; None: no limit."""
    for limit, flag, factor in ((flora, "flora", "a_RI"), (lora, "lora", "down_RI")):
        ranks = {
            name: max(len(rows) for part in terms if part is not None and (rows := getattr(part, factor)) is not None)
            for name, terms in layers.items()
            if any(part is not None and getattr(part, factor) is not None for part in terms)
        }
        worst = max(ranks, key=lambda name: ranks[name], default=None)
        if worst is not None and limit is not None and ranks[worst] > limit:
            yield (
                f"the mix is built with rank {ranks[worst]} in layer {worst!r}, above the limit of {limit}; start the "
                f"server with --max-{flag}-rank {ranks[worst]} or mix fewer adapters"
            )
