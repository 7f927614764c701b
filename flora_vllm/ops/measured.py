"""What was measured on this machine, kept between runs: one JSON file in the cache for each thing measured."""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flora_vllm.environment import cache_root

logger = logging.getLogger(__name__)


def device_name(device: torch.device) -> str:
    """What a measurement on `device` is a measurement of."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def read(kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was kept for `key`, or None. A torn or foreign file only costs a new measurement."""
    try:
        stored = json.loads(_file(kind, key).read_text())
        return stored if stored["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(kind: str, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Keep `values` (not "key", of JSON's types) for `key`, instead of what is kept. Where nothing can be written, they
    are measured again at the next start."""
    file = _file(kind, key)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"key": key, **values}, indent=1))
        part.replace(file)
    except OSError as error:
        logger.warning("what was measured is not kept: %s", error)


def _file(kind: str, key: Mapping[str, Any]) -> Path:
    return cache_root() / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"


def cpu_name() -> str:
    """The CPU's model name and flags' digest, so that a cache shared between machines is not mixed up."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = hashlib.sha256(fields.get("flags", fields.get("Features", "")).encode()).hexdigest()[:12]
    return f"{fields.get('model name', platform.machine())} {flags}"
