"""Which modules a PEFT config names: PEFT 0.21's matching rules, without peft.

Sources: `peft/tuners/tuners_utils.py::check_target_module_exists`, `peft/utils/other.py::get_pattern_key`,
`peft/tuners/ia3/model.py::_check_target_module_feedforward`. The asymmetries below are PEFT's.
Patterns come with the adapter: every function raises AdapterError for one that takes too long to match.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_vllm.formats.patterns import full_match, match_start

ALL_LINEAR = "all-linear"
OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", "score", "classifier"})


@dataclass(frozen=True)
class Targets:
    """The modules an adapter config selects; the fields are the config's keys of the same name."""

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Targets":
        return cls(
            config["target_modules"],
            config.get("exclude_modules"),
            config.get("layers_to_transform"),
            config.get("layers_pattern"),
        )

    def select(self, module: str) -> bool:
        """Whether PEFT would adapt `module`, a path such as `model.layers.0.self_attn.q_proj`."""
        if self._is_excluded(module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return module.rpartition(".")[2] not in OUTPUT_LAYERS
            return full_match(self.target_modules, module)
        if module in self.target_modules:
            # An entry that is the whole path wins over layers_to_transform, as in PEFT.
            return True
        return _ends_with_one_of(module, self.target_modules) and self._layer_is_chosen(module)

    def _is_excluded(self, module: str) -> bool:
        if not self.exclude_modules:
            return False
        if isinstance(self.exclude_modules, str):
            return full_match(self.exclude_modules, module)
        return module in self.exclude_modules or _ends_with_one_of(module, self.exclude_modules)

    def _layer_is_chosen(self, module: str) -> bool:
        chosen = self.layers_to_transform
        if chosen is None or (not isinstance(chosen, int) and len(chosen) == 0):
            return True
        patterns = self.layers_pattern or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            # With no pattern PEFT wants something before the list's name ("model.layers.3."), else not.
            start = r"(?:^|.*?\.)" if self.layers_pattern else r".*?\."
            match = match_start(rf"{start}{pattern}\.(?P<idx>\d+)\.", module)
            if match is not None:
                layer = int(match["idx"])
                return layer == chosen if isinstance(chosen, int) else layer in chosen
        return False


def match_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key of `rank_pattern` or `alpha_pattern` that fits `module`, else `default`."""
    for pattern, value in patterns.items():
        if match_start(rf"(.*\.)?({pattern})$", module):
            return value
    return patterns.get(module, default)


def is_feedforward(feedforward_modules: str | Iterable[str], module: str) -> bool:
    """IA3: whether the vector scales the input of `module`. PEFT compares bare endings, without a dot."""
    if isinstance(feedforward_modules, str):
        return full_match(feedforward_modules, module)
    return any(module.endswith(ending) for ending in feedforward_modules)


def _ends_with_one_of(module: str, names: Iterable[str]) -> bool:
    return any(module.endswith(f".{name}") for name in names)
