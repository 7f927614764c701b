"""The configuration of a FLoRA adapter; what it saves is contract C1 of the checkpoint.

Two fields matter to training only and are saved beside C1's own: `flora_dropout` and `init_weights`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from flora_vllm.errors import ConfigError
from flora_vllm.formats.activation import ALLOWED as INVOCATIONS
from flora_vllm.formats.activation import EVERYWHERE, is_invocation
from flora_vllm.formats.card import CARD_NAME, card_for
from flora_vllm.training.peft_type import add_peft_type

REDUCTIONS = ("mean", "sum")
# What PEFT adds to modules_to_save by itself.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class FloraConfig(PeftConfig):
    """FLoRA: `y = c · Σ_j B[:, j] ∘ W(A[j] ∘ x) + bias` (arXiv 2312.05677, eq. 4-6), PEFT's names otherwise.

    r: rank of a module that `rank_pattern` doesn't name; at most the smaller side of the layer.
    target_modules, exclude_modules, layers_to_transform, layers_pattern: as for LoRA, "all-linear" included.
    reduction: "mean" (c = 1/r, the default and the paper's) or "sum" (c = 1).
    rank_pattern: module name or regular expression -> rank.
    flora_dropout: drops inputs of the update only, `W x + (W_s - W) dropout(x)`: plain dropout on a multiplicative
      layer would drop the base model too. Costs one more base product while training.
    init_weights: True starts as the exact identity; False at random factors near 1, for tests and debugging.
    alora_invocation_tokens: as for LoRA (aLoRA): the adapter applies from the last occurrence of these tokens in the
      prompt on, the base model before it. None: to every token.
    modules_to_save: as for LoRA: modules trained and saved whole beside the factors. Tasks that need a trained head
      (SEQ_CLS) name theirs here by themselves.

    Raises ConfigError naming every field that is wrong.
    """

    r: int = field(default=1, metadata={"help": "Rank; FLoRA is cheapest at 1 and the paper reports 1."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "As in LoraConfig."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "As in LoraConfig."})
    reduction: str = field(default="mean", metadata={"help": "mean (product divided by the rank) or sum"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module name or regex -> rank."})
    flora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the update's input."})
    init_weights: bool = field(default=True, metadata={"help": "True: start as the identity. False: random."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "As in LoraConfig."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "As in LoraConfig."})
    alora_invocation_tokens: list[int] | None = field(default=None, metadata={"help": "As in LoraConfig."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "As in LoraConfig."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = dict(self.rank_pattern or {})
        faults = self._faults()
        if faults:
            raise ConfigError("FloraConfig: " + "; ".join(faults))

    def _faults(self) -> list[str]:
        faults = [
            f"{where}={rank!r}, a rank is a whole number of at least 1"
            for where, rank in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1
        ]
        if self.reduction not in REDUCTIONS:
            faults.append(f"reduction={self.reduction!r}, allowed are {' and '.join(map(repr, REDUCTIONS))}")
        if not 0.0 <= self.flora_dropout < 1.0:
            faults.append(f"flora_dropout={self.flora_dropout!r}, allowed is 0 <= p < 1")
        if not isinstance(self.init_weights, bool):
            faults.append(f"init_weights={self.init_weights!r}, allowed are True and False")
        if not is_invocation(self.alora_invocation_tokens):
            faults.append(f"alora_invocation_tokens={self.alora_invocation_tokens!r}, allowed: {INVOCATIONS}")
        if self.alora_invocation_tokens and (whole := self.modules_to_save or _HEADS.get(self.task_type or "")):
            faults.append(f"modules_to_save={[*whole]!r}: {EVERYWHERE}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                faults.append(f"{name} needs target_modules as a list, not the expression {self.target_modules!r}")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            faults.append("layers_pattern needs layers_to_transform")
        return faults

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; sets are sorted so that the same adapter gives the same file."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, and the section of the model card that says how such an adapter is loaded and served."""
        super().save_pretrained(save_directory, **kwargs)
        rank = max(self.r, *self.rank_pattern.values(), 1)
        Path(save_directory, CARD_NAME).write_bytes(card_for(save_directory, self.base_model_name_or_path, rank))
