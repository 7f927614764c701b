"""What files leave out and everyone draws again: sizes over all targets, random cells.

PEFT draws on the host with a seeded generator, so the numbers are the same everywhere; it then keeps them in the base
model's dtype.
"""

from functools import lru_cache

import torch

from flora_vllm.errors import AdapterError
from flora_vllm.formats.families.family import Config
from flora_vllm.formats.matching import Targets
from flora_vllm.terms import Probe


def targets_in_order(probe: Probe, config: Config) -> list[str]:
    """The modules that the config selects, in the order of the Hugging Face model."""
    targets = Targets.from_config(config)
    return [module for module in probe.modules if targets.select(module)]


def largest_sides(probe: Probe, config: Config) -> tuple[int, int]:
    """(O, I), each the largest of all targets. Raises AdapterError if nothing is selected."""
    sizes = [probe.modules[module] for module in targets_in_order(probe, config)]
    if not sizes:
        raise AdapterError("the config selects no module of the base model")
    return max(size for size, _ in sizes), max(size for _, size in sizes)


def sides(probe: Probe) -> tuple[int, int]:
    """(O, I) of the probe's own module."""
    return probe.shape


@lru_cache(maxsize=16)
def random_cells(out_features: int, in_features: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns), int64, of `count` different cells (`peft/tuners/fourierft/layer.py::update_layer`)."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(out_features * in_features, generator=generator)[:count].clone()
    return cells // in_features, cells % in_features
