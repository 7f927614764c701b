"""Which modules a PEFT config names: PEFT 0.21's matching rules, without peft.

Sources: `peft/tuners/tuners_utils.py::check_target_module_exists`, `peft/utils/other.py::get_pattern_key`,
`peft/tuners/ia3/model.py::_check_target_module_feedforward`. The asymmetries below are PEFT's.
Patterns come with the adapter: every function raises AdapterError for one that takes too long to match.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_vllm.errors import AdapterError
from flora_vllm.formats.patterns import IN_GROUP, any_match_start, full_match, match_start, name_patterns

ALL_LINEAR = "all-linear"
OUTPUT_LAYERS = frozenset({"lm_head", "embed_out", "score", "classifier"})
# Each is tried on each module.
MAX_LAYERS_PATTERNS = 64


@dataclass(frozen=True)
class Targets:
    """The modules an adapter config selects; the fields are the config's keys of the same name.

    Lists are asked once for each module: give long ones as sets, as `from_config` does.
    """

    target_modules: str | Collection[str]
    exclude_modules: str | Collection[str] | None = None
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None  # patterns, too: what lies in one of these is not adapted

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Targets":
        """Raises AdapterError for more than MAX_LAYERS_PATTERNS patterns."""
        layers = config.get("layers_pattern")
        if isinstance(layers, list) and len(layers) > MAX_LAYERS_PATTERNS:
            raise AdapterError(
                f"adapter_config.json: 'layers_pattern' has {len(layers)} entries; "
                f"at most {MAX_LAYERS_PATTERNS} are read"
            )
        return cls(
            _as_set(config["target_modules"]),
            _as_set(config.get("exclude_modules")),
            _as_set(config.get("layers_to_transform")),
            layers,
            config.get("modules_to_save"),
        )

    @property
    def is_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def select(self, module: str) -> bool:
        """Whether PEFT would adapt `module`, a path such as `model.layers.0.self_attn.q_proj`."""
        if self._is_excluded(module):
            return False
        if isinstance(self.target_modules, str):
            if self.is_all_linear:
                return module.rpartition(".")[2] not in OUTPUT_LAYERS
            return full_match(self.target_modules, module)
        if module in self.target_modules:
            # An entry that is the whole path wins over layers_to_transform, as in PEFT.
            return True
        return _ends_with_one_of(module, self.target_modules) and self._layer_is_chosen(module)

    def _is_excluded(self, module: str) -> bool:
        if any_match_start(tuple(rf"(^|.*\.){saved}($|\..*)" for saved in self.modules_to_save or ()), module):
            return True
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


def match_pattern(patterns: Mapping[str, Any], module: str, default: Any, place: str = IN_GROUP) -> Any:
    """The value of the first key of `rank_pattern` or `alpha_pattern` that fits `module`, else `default`.

    `place`: what PEFT makes of a key.
    """
    if not patterns:
        return default
    keys = tuple(patterns)
    first = name_patterns(keys, place).first(module)
    return patterns.get(module, default) if first is None else patterns[keys[first]]


def is_feedforward(feedforward_modules: str | Iterable[str], module: str) -> bool:
    """IA3: whether the vector scales the input of `module`. PEFT compares bare endings, without a dot."""
    if isinstance(feedforward_modules, str):
        return full_match(feedforward_modules, module)
    return module.endswith(tuple(feedforward_modules))


def _as_set(value: Any) -> Any:
    return frozenset(value) if isinstance(value, list) else value


def _ends_with_one_of(module: str, names: Collection[str]) -> bool:
    """Whether `module` ends with a dot and one of `names`; with a set, in the time its own parts take."""
    return any(ending in names for ending in _endings(module))


def _endings(module: str) -> Iterator[str]:
    dot = module.find(".")
    while dot >= 0:
        yield module[dot + 1 :]
        dot = module.find(".", dot + 1)
