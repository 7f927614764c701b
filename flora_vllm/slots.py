"""From an adapter's terms to a layer's slot: how a packed, sharded layer maps to the modules that checkpoints know.

An engine packs several linear layers of the checkpoint into one (q, k, v; gate, up) and gives each rank a part.
`LinearLayout` states that for one layer of this rank; `layer_terms` has an adapter's terms cut to it and folded
(`terms.fold`). The result has the layer's dtype, is contiguous and can be written into a slot without further checks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flora_vllm.adapter import ModuleTerms
from flora_vllm.ops.terms import LayerTerms, SliceTerms
from flora_vllm.terms import Arena, Cut, fold


@dataclass(frozen=True)
class SliceLayout:
    """One slice of a packed layer, as this rank holds it.

    `module`: the checkpoint module it comes from; `size`: this rank's out features;
    `start`: its first row within that module, `fused_start`: within the module of the whole packed layer.
    """

    module: str
    size: int
    start: int
    fused_start: int
    full_size: int  # out features of `module`


@dataclass(frozen=True)
class LinearLayout:
    """One linear layer of this rank. `module`: its own path, under which a fused checkpoint tensor may come.

    `sums`: its outputs are one rank's part of a sum. `adds_bias`: this rank is the one that adds the bias to the sum.
    `holds_qkv`: its slices are queries, keys and values. `is_alone`: no other rank has a part of it.
    """

    module: str
    in_features: int  # this rank's
    in_start: int
    full_in_features: int
    slices: tuple[SliceLayout, ...]
    full_out_features: int
    sums: bool = False
    adds_bias: bool = True
    holds_qkv: bool = False
    is_alone: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(s.size for s in self.slices)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (O, I) for each name under which a checkpoint can address this layer."""
        named = {s.module: (s.full_size, self.full_in_features) for s in self.slices}
        return {self.module: (self.full_out_features, self.full_in_features)} | named


def layer_terms(
    layout: LinearLayout,
    modules: Mapping[str, ModuleTerms],
    dtype: torch.dtype,
    bias_O: torch.Tensor | None = None,
    device: torch.device | None = None,
    arena: Arena | None = None,
    inputs: dict[tuple, torch.Tensor] | None = None,
) -> LayerTerms | None:
    """The slot contents of one layer, on the host, or None if the adapter leaves the whole layer alone.

    `bias_O`: this rank's base bias, also one that the layer's caller adds later. `device`: where factors that adapters
    share are kept. `arena`: where factors are written. `inputs`: the input sides that the adapter's other layers
    wrote, for factors that they share; one dict an adapter, whose `modules` outlive it. Raises AdapterError where this
    rank cannot hold a term.
    """
    fused = modules.get(layout.module)
    parts = [modules.get(s.module) if fused is None else fused for s in layout.slices]
    if not any(parts):
        return None
    columns = slice(layout.in_start, layout.in_start + layout.in_features)
    inputs = {} if inputs is None else inputs  # a fused module's slices share their input side, too
    contents: list[SliceTerms | None] = []
    begin = 0
    for part, terms in zip(layout.slices, parts, strict=True):
        start = part.start if fused is None else part.fused_start
        bias = None if bias_O is None else bias_O[begin : begin + part.size].cpu()
        begin += part.size
        if terms is None:
            contents.append(None)
            continue
        rows = slice(start, start + part.size)
        place = torch.device("cpu") if device is None else device
        cut = Cut(rows, columns, dtype, place, bias, layout.adds_bias, layout.sums, inputs, arena)
        contents.append(fold(terms.terms, cut))
    return tuple(contents)


def overflowed(terms: LayerTerms) -> bool:
    """Whether a factor that was finite in the checkpoint left the range of the layer's dtype."""
    return any(not is_finite(t) for part in terms if part is not None for t in part.tensors())


def is_finite(tensor: torch.Tensor) -> bool:
    # Minimum and maximum carry NaN and Inf along, and cost a twentieth of isfinite on bfloat16.
    return not tensor.is_floating_point() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
