"""The plugin's options, and how they reach every process of an engine.

They live in vLLM's `additional_config["flora"]`, so one way serves the command line, YAML, Python and Ray. vLLM only
logs a plugin that fails to import and would then serve without us; therefore the options travel as `CarriedOptions`,
whose unpickling installs the worker side or fails: a process without a working plugin cannot even read its config.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from flora_vllm.errors import ConfigError
from flora_vllm.ops.dispatch import PathChoice

KEY = "flora"


@dataclass(frozen=True)
class FloraOptions:
    """`max_rank`: largest rank of a Hadamard family (the file's r). `path`: how adapted rows are computed.

    `adapter_root`: directory that adapter paths arriving by request must lie in; None leaves them free.
    `graph_rows`: steps whose adapter tokens need at most so many base products may replay CUDA graphs that hold the op;
    0 runs every step with adapter tokens without graphs. `max_dense_bytes`: of an adapter's whole matrices.
    """

    max_rank: int = 16
    path: PathChoice = "auto"
    adapter_root: str | None = None
    graph_rows: int = 0
    max_dense_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if isinstance(self.max_rank, bool) or not isinstance(self.max_rank, int) or self.max_rank < 1:
            raise ConfigError(
                f"max_rank (--max-flora-rank) must be a whole number of at least 1, got {self.max_rank!r}"
            )
        if self.path not in get_args(PathChoice):
            raise ConfigError(
                f"path (--flora-path) must be one of {', '.join(get_args(PathChoice))}, got {self.path!r}"
            )
        if isinstance(self.graph_rows, bool) or not isinstance(self.graph_rows, int) or self.graph_rows < 0:
            raise ConfigError(
                f"graph_rows (--flora-graph-rows) must be a whole number of at least 0, got {self.graph_rows!r}"
            )
        if (
            isinstance(self.max_dense_bytes, bool)
            or not isinstance(self.max_dense_bytes, int)
            or self.max_dense_bytes < 0
        ):
            raise ConfigError(
                f"max_dense_bytes (--max-flora-dense-bytes) must be a whole number of at least 0, "
                f"got {self.max_dense_bytes!r}"
            )
        if self.adapter_root is not None and not isinstance(self.adapter_root, str):
            raise ConfigError(f"adapter_root (--flora-adapter-root) must be a directory, got {self.adapter_root!r}")

    @classmethod
    def from_mapping(cls, values: Any) -> "FloraOptions":
        """Raises ConfigError for anything but a mapping of known keys to allowed values."""
        known = [f.name for f in fields(cls)]
        if not isinstance(values, Mapping):
            raise ConfigError(f'additional_config["flora"] must be a mapping with keys {known}, got {values!r}')
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f'additional_config["flora"] has unknown keys {unknown}; allowed are {known}')
        return cls(**values)


class CarriedOptions(dict):
    """A plain dict of options whose unpickling in another process installs the worker side there, or raises."""

    def __reduce__(self) -> tuple:
        return _arrive, (dict(self),)


def _arrive(values: dict[str, Any]) -> CarriedOptions:
    from flora_vllm.plugin import install

    install.install_worker_side()
    return CarriedOptions(values)


def carried(options: FloraOptions) -> CarriedOptions:
    return CarriedOptions(asdict(options))


def options_of(additional_config: Any) -> FloraOptions | None:
    """The options in a vLLM config's `additional_config`; None if FLoRA is not asked for."""
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    return FloraOptions.from_mapping(additional_config[KEY])
