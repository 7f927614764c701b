"""The canonical form every adapter family is read into.

For one token x of a linear layer `y = W x + bias` the adapted output is

    y = g ∘ [ s_h · Σ_j b_j ∘ W(a_j ∘ x)  +  s_l · U (V x) ] + h ∘ bias

(a: input side, b: output side; h = g if the gain scales the bias, else 1). Each term may be absent; with no
Hadamard term the sum is plain `W x`. Scales are kept apart here and folded in one place, `slots.write_slot`.
Terms are what the checkpoint says, on the host, in the checkpoint's dtype; they know nothing of vLLM.
Shape letters: R rank, I in features, O out features.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from flora_vllm.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Hadamard:
    """`scale · Σ_j output_factor[:, j] ∘ W(input_factor[j] ∘ x)`, plus `W x` itself if `identity`.

    FLoRA (arXiv 2312.05677, eq. 4) has scale 1/R or 1 and no identity; HiRA is the same with identity.
    `output_factor=None` stands for a column of ones (IA3 on the input; its checkpoint does not know O).
    """

    input_factor: torch.Tensor  # (R, I)
    output_factor: torch.Tensor | None  # (O, R)
    scale: float = 1.0
    identity: bool = False

    def __post_init__(self) -> None:
        if self.input_factor.ndim != 2:
            raise AdapterError(f"input factor must be (rank, in), got {tuple(self.input_factor.shape)}")
        if self.output_factor is None:
            if self.rank != 1:
                raise AdapterError(f"without an output factor the rank must be 1, got {self.rank}")
        elif self.output_factor.ndim != 2 or self.output_factor.shape[1] != self.rank:
            raise AdapterError(
                f"output factor must be (out, {self.rank}) to fit the input factor, "
                f"got {tuple(self.output_factor.shape)}"
            )

    @property
    def rank(self) -> int:
        return self.input_factor.shape[0]


@dataclass(frozen=True, eq=False)
class LowRank:
    """`scale · up (down x)`, added to the base output."""

    down: torch.Tensor  # (R, I)
    up: torch.Tensor  # (O, R)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise AdapterError(
                f"low-rank factors must be (rank, in) and (out, rank), got {tuple(self.down.shape)} "
                f"and {tuple(self.up.shape)}"
            )

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, eq=False)
class Gain:
    """The output times `gain`; the bias too if `scales_bias`."""

    gain: torch.Tensor  # (O,)
    scales_bias: bool

    def __post_init__(self) -> None:
        if self.gain.ndim != 1:
            raise AdapterError(f"gain must be (out,), got {tuple(self.gain.shape)}")


@dataclass(frozen=True, eq=False)
class ModuleTerms:
    """All an adapter does to one linear layer of the checkpoint's model."""

    hadamard: Hadamard | None = None
    low_rank: LowRank | None = None
    gain: Gain | None = None

    @property
    def in_features(self) -> int | None:
        """I as the tensors tell it; None if none of them does (IA3 on the output)."""
        if self.hadamard is not None:
            return self.hadamard.input_factor.shape[1]
        return None if self.low_rank is None else self.low_rank.down.shape[1]

    @property
    def out_features(self) -> int | None:
        """O as the tensors tell it; None if none of them does (IA3 on the input)."""
        if self.hadamard is not None and self.hadamard.output_factor is not None:
            return self.hadamard.output_factor.shape[0]
        if self.low_rank is not None:
            return self.low_rank.up.shape[0]
        return None if self.gain is None else self.gain.gain.shape[0]

    def tensors(self) -> Iterator[torch.Tensor]:
        if self.hadamard is not None:
            yield self.hadamard.input_factor
            if self.hadamard.output_factor is not None:
                yield self.hadamard.output_factor
        if self.low_rank is not None:
            yield self.low_rank.down
            yield self.low_rank.up
        if self.gain is not None:
            yield self.gain.gain


@dataclass(frozen=True, eq=False)
class Adapter:
    """One checkpoint in canonical form.

    `modules` is keyed by the module's path in the Hugging Face model (`model.layers.0.self_attn.q_proj`);
    `rank` is the largest rank the file states; `digest` is the hex SHA-256 of the files' content.
    """

    family: str
    rank: int
    modules: Mapping[str, ModuleTerms]
    digest: str
    base_model: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all factors as stored; a factor shared by modules counts once."""
        seen = {id(t): t for terms in self.modules.values() for t in terms.tensors()}
        return sum(t.numel() * t.element_size() for t in seen.values())


@dataclass(frozen=True)
class ModelLayout:
    """What the base model can have adapted, so that a checkpoint's shapes are judged with its other faults.

    `shapes`: module path -> (O, I) of the whole layer, before tensor-parallel slicing.
    `refused`: module path (or its last part) -> why it cannot be adapted.
    `rename`: a checkpoint's module path -> the path used here (engines rename modules; several names may mean one).
    """

    shapes: Mapping[str, tuple[int, int]]
    refused: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] = str
