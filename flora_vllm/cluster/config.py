"""The cluster's configuration file: frozen dataclasses, every fault reported at once, unknown keys refused.

    models:
      - name: smol
        source: HuggingFaceTB/SmolLM2-135M-Instruct
        adapters: [./adapters, /shared/adapters, "s3://bucket/adapters"]
        slots: 8
        replicas: 2
        adapter_options: {poems: {min_copies: 2, tenant: acme}}
    store: {cache_dir: /var/cache/flora}

Every key and its default is a field below.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from flora_vllm.cluster.rules.placement import UNLIMITED
from flora_vllm.cluster.rules.policy import PolicyOptions
from flora_vllm.cluster.rules.routing import RoutingOptions
from flora_vllm.errors import ConfigError
from flora_vllm.options import from_mapping
from flora_vllm.plugin.options import FloraOptions, faults_without_server

# Ray's ingress splits adapter ids at the first colon, and an at sign separates name and version.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


# Paths of the configuration file that are relative to it.
RELATIVE = ("./", "../")


def name_fault(name: str) -> str | None:
    """Why `name` cannot name a model or adapter; None if it can."""
    if NAME.fullmatch(name):
        return None
    return f"the name {name!r} is not allowed: letters, digits, '.', '_' and '-' only (no ':', '@' or '/')"


@dataclass(frozen=True)
class AdapterOptions:
    """What the operator asks for one adapter."""

    min_copies: int = 0
    max_copies: int = UNLIMITED
    tenant: str = "default"

    def __post_init__(self) -> None:
        if not 0 <= self.min_copies <= self.max_copies or self.max_copies < 1:
            raise ConfigError(
                f"need 0 <= min_copies <= max_copies and max_copies >= 1, got {self.min_copies} and {self.max_copies}"
            )


@dataclass(frozen=True)
class Autoscale:
    """Replicas between two bounds, by requests and by adapters that want room."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 8.0
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1 or self.target_requests <= 0:
            raise ConfigError(
                "autoscale: need 0 <= min_replicas <= max_replicas, max_replicas >= 1 and target_requests > 0, got "
                f"{self.min_replicas}, {self.max_replicas} and {self.target_requests}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """One base model and its replicas.

    slots: adapters in memory per replica. max_rank: largest rank served. adapter_bytes: memory for adapters per
    replica, None for no limit but the slots. device: "gpu" or "cpu". cpus: CPU cores reserved per replica. engine:
    further vLLM engine arguments. flora: the plugin's other options, by their names in Python. environment: variables
    for the replicas. max_requests: requests running or queued on one replica.
    """

    name: str
    source: str
    adapters: tuple[str, ...] = ()
    slots: int = 8
    max_rank: int = 16
    adapter_bytes: int | None = None
    replicas: int = 1
    autoscale: Autoscale | None = None
    device: str = "gpu"
    accelerator_type: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    cpus: float = 1.0
    replicas_per_node: int | None = None
    max_requests: int = 64
    engine: Mapping[str, Any] = field(default_factory=dict)
    flora: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    defaults: AdapterOptions = AdapterOptions()
    adapter_options: Mapping[str, AdapterOptions] = field(default_factory=dict)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    routing: RoutingOptions = field(default_factory=RoutingOptions)

    def __post_init__(self) -> None:
        faults = [f for f in (name_fault(self.name), *map(name_fault, self.adapter_options)) if f]
        positive = ("slots", "max_rank", "replicas", "tensor_parallel", "pipeline_parallel", "max_requests")
        faults += [f"{key} must be >= 1, got {getattr(self, key)}" for key in positive if getattr(self, key) < 1]
        if self.cpus < 0:
            faults.append(f"cpus must be >= 0, got {self.cpus}")
        if self.device not in ("gpu", "cpu"):
            faults.append(f"device must be gpu or cpu, got {self.device!r}")
        faults += [
            f"adapters: {uri!r} must be an absolute path, one that begins with './', or a URL such as s3://bucket/path"
            for uri in self.adapters
            if "://" not in uri and not uri.startswith(("/", *RELATIVE))
        ]
        if self.slots <= self.policy.reserve_slots:
            faults.append(f"slots {self.slots} leave none after policy.reserve_slots {self.policy.reserve_slots}")
        reserved = {"model", "tensor_parallel_size", "pipeline_parallel_size", "enable_lora", "max_loras"}
        reserved |= {
            "max_cpu_loras",
            "max_lora_rank",
            "additional_config",
            "lora_modules",
            "distributed_executor_backend",
        }
        faults += [f"engine: {key} is set from other keys of this file" for key in sorted(reserved & set(self.engine))]
        try:
            faults += [f"flora: {fault}" for fault in faults_without_server(self.flora_options)]
        except ConfigError as error:
            faults.append(str(error))
        if faults:
            raise ConfigError(f"model {self.name}: " + "; ".join(faults))

    @property
    def flora_options(self) -> FloraOptions:
        """What each replica's engine is started with."""
        return from_mapping(FloraOptions, self.flora, "flora", max_rank=self.max_rank)

    def options_for(self, adapter: str) -> AdapterOptions:
        return self.adapter_options.get(adapter, self.defaults)


@dataclass(frozen=True)
class StoreConfig:
    """cache_dir: where a node keeps fetched adapters; the oldest unused go when it exceeds cache_bytes."""

    cache_dir: str = "~/.cache/flora-vllm/adapters"
    cache_bytes: int = 20 * 2**30
    scan_s: float = 5.0

    def __post_init__(self) -> None:
        if self.cache_bytes < 0 or self.scan_s <= 0:
            raise ConfigError(f"store: need cache_bytes >= 0 and scan_s > 0, got {self.cache_bytes} and {self.scan_s}")


@dataclass(frozen=True)
class IngressConfig:
    """retry_s: how long a request whose replica died before its first byte is tried elsewhere.

    cpus: reserved for each ingress; more than 0 keeps it off nodes whose CPUs the engines use up.
    """

    replicas: int = 1
    cpus: float = 0.0
    host: str = "127.0.0.1"
    port: int = 8000
    retry_s: float = 60.0

    def __post_init__(self) -> None:
        if self.replicas < 1 or not 0 < self.port < 65536 or self.retry_s < 0 or self.cpus < 0:
            raise ConfigError(
                "ingress: need replicas >= 1, 0 < port < 65536, retry_s >= 0 and cpus >= 0, got "
                f"{self.replicas}, {self.port}, {self.retry_s} and {self.cpus}"
            )


@dataclass(frozen=True)
class TimingConfig:
    """sync_s: how often replicas report. lost_s: silence after which a replica is taken off the plan.

    plan_s: period of planning. settle_s: wait for further replicas before the first plan.
    """

    sync_s: float = 0.5
    lost_s: float = 5.0
    plan_s: float = 1.0
    settle_s: float = 2.0

    def __post_init__(self) -> None:
        if min(self.sync_s, self.plan_s, self.settle_s) <= 0 or self.lost_s <= 2 * self.sync_s:
            raise ConfigError(f"timing: all values must be > 0 and lost_s > 2 sync_s, got {self}")


@dataclass(frozen=True)
class ClusterConfig:
    """Everything `flora-vllm cluster up` needs."""

    models: tuple[ModelConfig, ...]
    name: str = "flora"
    store: StoreConfig = StoreConfig()
    ingress: IngressConfig = IngressConfig()
    timing: TimingConfig = TimingConfig()

    def __post_init__(self) -> None:
        fault = name_fault(self.name)
        if fault is not None:
            raise ConfigError(fault)
        names = [m.name for m in self.models]
        # Ray names deployments so.
        if not names or len({name.replace(".", "_") for name in names}) != len(names):
            raise ConfigError(f"models: need at least one and distinct names ('.' counts as '_'), got {names}")


T = TypeVar("T")


def parse(kind: type[T], data: Any, where: str = "config") -> T:
    """A `kind` from plain YAML data. Raises ConfigError with every fault found."""
    faults: list[str] = []
    value = _build(kind, data, where, faults)
    if faults:
        raise ConfigError("\n".join(faults))
    assert isinstance(value, kind), "no fault was reported"
    return value


def _build(kind: Any, data: Any, where: str, faults: list[str]) -> Any:
    if not isinstance(data, Mapping):
        faults.append(f"{where} must be a mapping, got {data!r}")
        return None
    hints, known = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in known:
            faults.append(f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}")
    before = len(faults)
    values = {key: _convert(hints[key], data[key], f"{where}.{key}", faults) for key in known if key in data}
    for key, f in known.items():
        if key not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            faults.append(f"{where}: {key} is missing")
    if len(faults) > before:
        return None
    try:
        return kind(**values)
    except ConfigError as error:
        faults.append(f"{where}: {error}")
        return None


def _convert(hint: Any, data: Any, where: str, faults: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else _convert(next(a for a in args if a is not type(None)), data, where, faults)
    if dataclasses.is_dataclass(hint):
        return _build(hint, data, where, faults)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            faults.append(f"{where} must be a list, got {data!r}")
            return ()
        return tuple(_convert(args[0], item, f"{where}[{i}]", faults) for i, item in enumerate(data))
    if origin is Mapping or hint is Mapping:
        if not isinstance(data, Mapping):
            faults.append(f"{where} must be a mapping, got {data!r}")
            return {}
        return {str(k): _convert(args[1], v, f"{where}.{k}", faults) for k, v in data.items()}
    if hint is Any:
        return data
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, hint) or (hint is int and isinstance(data, bool)):
        faults.append(f"{where} must be {hint.__name__}, got {data!r}")
    elif hint is float and not math.isfinite(data):
        # Every comparison with .nan is false, so the checks of a value's bounds let it pass.
        faults.append(f"{where} must be a finite number, got {data!r}")
    return data


def to_data(value: Any) -> Any:
    """Plain data that `parse` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(v) for v in value]
    return value


def _anchored(config: ClusterConfig, folder: Path) -> ClusterConfig:
    """Relative paths made absolute: replicas run in directories of their own."""

    def anchor(path: str) -> str:
        return str((folder / path).resolve()) if path.startswith(RELATIVE) else path

    models = (
        dataclasses.replace(m, source=anchor(m.source), adapters=tuple(map(anchor, m.adapters))) for m in config.models
    )
    store = dataclasses.replace(config.store, cache_dir=anchor(config.store.cache_dir))
    return dataclasses.replace(config, models=tuple(models), store=store)


def read_config(path: str | Path) -> ClusterConfig:
    """Reads the YAML file; `./` and `../` paths in it are relative to it. Raises ConfigError with every fault."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    try:
        return _anchored(parse(ClusterConfig, data), Path(path).parent)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error
