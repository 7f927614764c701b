"""The canonical form every adapter family is read into: for each module a tuple of terms.

Terms (`flora_vllm.terms`) are what the checkpoint says, on the host, in the checkpoint's dtype; they know nothing of
vLLM. Scales and gains are kept apart here and folded in one place, `terms.fold`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from flora_vllm.terms import Term, kind_of

_Kind = TypeVar("_Kind")


@dataclass(frozen=True, eq=False)
class ModuleTerms:
    """All an adapter does to one linear layer of the checkpoint's model. No Product named means plain `W x`."""

    terms: tuple[Term, ...] = ()

    @property
    def in_features(self) -> int | None:
        """I as the tensors tell it; None if none of them does (IA3 on the output)."""
        return next((size for _, size in self._shapes() if size is not None), None)

    @property
    def out_features(self) -> int | None:
        """O as the tensors tell it; None if none of them does (IA3 on the input)."""
        return next((size for size, _ in self._shapes() if size is not None), None)

    def of(self, kind: type[_Kind]) -> tuple[_Kind, ...]:
        """The terms of one kind."""
        return tuple(term for term in self.terms if isinstance(term, kind))

    def tensors(self) -> Iterator[torch.Tensor]:
        for term in self.terms:
            yield from kind_of(term).tensors(term)

    def _shapes(self) -> Iterator[tuple[int | None, int | None]]:
        return (kind_of(term).shape(term) for term in self.terms)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One checkpoint in canonical form.

    `modules` is keyed by the module's path in the Hugging Face model (`model.layers.0.self_attn.q_proj`);
    `rank` is the largest rank the file states; `digest` is the hex SHA-256 of the files' content.
    `invocation_tokens`: the adapter acts from their last occurrence in the prompt on; None: everywhere.
    """

    family: str
    rank: int
    modules: Mapping[str, ModuleTerms]
    digest: str
    base_model: str | None = None
    invocation_tokens: tuple[int, ...] | None = None
    # "<module>.weight" or "<module>.bias" -> what the file holds whole of a module, in the base's place; it is no
    # change where it equals the base's, which its reader cannot know.
    saved: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its own factors as stored; one that its modules share counts once, one that adapters share not."""
        seen = {id(t): t for terms in self.modules.values() for t in terms.tensors()}
        return sum(t.numel() * t.element_size() for t in seen.values())


@dataclass(frozen=True)
class ExpertsLayout:
    """The experts of one layer, whose linear layers are `<path>.<number>.<gate, up or down>`.

    Some checkpoints hold them as two parameters, `<path>.gate_up_proj` and `<path>.down_proj`, with an axis for the
    number. `is_interleaved`: there the outputs of gate and up alternate; else all of gate come first.
    """

    number: int
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    is_interleaved: bool = False

    @property
    def inputs(self) -> tuple[str, str]:
        """What reads the layer's input."""
        return self.gate, self.up


@dataclass(frozen=True)
class ModelLayout:
    """What the base model can have adapted, so that a checkpoint's shapes are judged with its other faults.

    `shapes`: module path -> (O, I) of the whole layer, before tensor-parallel slicing.
    `refused`: module path (or its last part) -> why it cannot be adapted.
    `rename`: a checkpoint's module path -> the path used here (engines rename modules; several names may mean one).
    `fused`: as `shapes`, of layers that some checkpoints hold as one tensor and others as the parts that `shapes` has.
    `experts`: path of a mixture's experts -> what they are; their linear layers are among `shapes`.
    `tied`: embedding -> the output layer whose weight is the embedding's, both as paths used here.
    `norms`: those in `shapes`, there as (width, width), that norm their input and scale it instead of multiplying it.
    `embeddings`: those in `shapes`, there as (tokens, width), that look their input up instead of multiplying it.
    `never_run`: how paths begin of modules that checkpoints may have and the engine never runs (`mtp.`).
    """

    shapes: Mapping[str, tuple[int, int]]
    refused: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] = str
    fused: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    experts: Mapping[str, ExpertsLayout] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    norms: frozenset[str] = frozenset()
    never_run: tuple[str, ...] = ()

    def is_of_expert(self, path: str) -> bool:
        """Whether `path`, as this layout calls it, is a linear layer of an expert."""
        return bool(self.experts) and path.rsplit(".", 2)[0] in self.experts

    def never_runs(self, tensor: str) -> bool:
        """Whether a checkpoint's tensor is of such a module, by vLLM's rule (`LoRAModel._should_skip_module`)."""
        return any(tensor.startswith(start) or f".{start}" in tensor for start in self.never_run)

    def shape_of(self, module: str) -> tuple[int, int] | None:
        """(O, I) of a checkpoint's module; None if the model has no such module."""
        path = self.rename(module)
        return self.shapes.get(path) or self.fused.get(path)
