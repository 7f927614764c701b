"""From an adapter's terms to a layer's slot: the only place that slices for tensor parallelism and folds scales.

An engine packs several linear layers of the checkpoint into one (q, k, v; gate, up) and gives each rank a part.
`LinearLayout` states that for one layer of this rank; `layer_terms` cuts an adapter's terms to it. The result has
the layer's dtype, is contiguous and can be written into a slot without any further check.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flora_vllm.adapter import ModuleTerms
from flora_vllm.ops.terms import LayerTerms, SliceTerms


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
    """One linear layer of this rank. `module`: its own path, under which a fused checkpoint tensor may come."""

    module: str
    in_features: int  # this rank's
    in_start: int
    full_in_features: int
    slices: tuple[SliceLayout, ...]
    full_out_features: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(s.size for s in self.slices)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (O, I) for each name under which a checkpoint can address this layer."""
        named = {s.module: (s.full_size, self.full_in_features) for s in self.slices}
        return {self.module: (self.full_out_features, self.full_in_features)} | named


def layer_terms(layout: LinearLayout, modules: Mapping[str, ModuleTerms], dtype: torch.dtype) -> LayerTerms | None:
    """The slot contents of one layer, on the host, or None if the adapter leaves the whole layer alone."""
    fused = modules.get(layout.module)
    if fused is not None:
        shared: dict[int, torch.Tensor] = {}
        return tuple(_slice_terms(layout, s.size, s.fused_start, fused, dtype, shared) for s in layout.slices)
    parts = [modules.get(s.module) for s in layout.slices]
    if not any(parts):
        return None
    return tuple(
        None if terms is None else _slice_terms(layout, s.size, s.start, terms, dtype, {})
        for s, terms in zip(layout.slices, parts, strict=True)
    )


def _slice_terms(
    layout: LinearLayout, size: int, start: int, terms: ModuleTerms, dtype: torch.dtype, shared: dict[int, torch.Tensor]
) -> SliceTerms:
    rows = slice(start, start + size)
    columns = slice(layout.in_start, layout.in_start + layout.in_features)

    def input_side(factor_RI: torch.Tensor) -> torch.Tensor:
        # Slices of one fused checkpoint module share their input factor: keep one copy of it.
        if id(factor_RI) not in shared:
            shared[id(factor_RI)] = factor_RI[:, columns].to(dtype).contiguous()
        return shared[id(factor_RI)]

    def output_side(factor_OR: torch.Tensor, scale: float) -> torch.Tensor:
        return (factor_OR[rows].float() * scale).to(dtype).T.contiguous()

    hadamard, low_rank, gain = terms.hadamard, terms.low_rank, terms.gain
    a_RI = b_RO = down_RI = up_RO = gain_O = None
    if hadamard is not None:
        a_RI = input_side(hadamard.input_factor)
        if hadamard.output_factor is None:
            b_RO = torch.full((1, size), hadamard.scale, dtype=dtype)
        else:
            b_RO = output_side(hadamard.output_factor, hadamard.scale)
    if low_rank is not None:
        down_RI = input_side(low_rank.down)
        up_RO = output_side(low_rank.up, low_rank.scale)
    if gain is not None:
        gain_O = gain.gain[rows].to(dtype).contiguous()
    return SliceTerms(
        a_RI=a_RI,
        b_RO=b_RO,
        identity=hadamard is not None and hadamard.identity,
        down_RI=down_RI,
        up_RO=up_RO,
        gain_O=gain_O,
        gain_bias=gain is not None and gain.scales_bias,
    )


def overflowed(terms: LayerTerms) -> bool:
    """Whether a factor that was finite in the checkpoint left the range of the layer's dtype."""
    return any(not torch.isfinite(t).all() for part in terms if part is not None for t in part.tensors())
