"""Adapters of every family changed at random: each mutant is refused by our own error, or read as PEFT reads it.

    make fuzz                          # 12,000 mutants
    python tests/fuzz.py --mutants 500 --seed 3

A mutant may cost MOST_S of one core and MOST_BYTES of memory, refused or not. What it must not do: raise anything
but AdapterError, or be accepted and mean something else than it means to PEFT. Families that PEFT lacks are held to
everything but that.
"""

import argparse
import contextlib
import copy
import json
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import peft
import test_families
import test_families_authors
import test_families_low
import test_families_maps
import test_families_shared
import torch
from families_support import Fill, ModelProbe, fill_normal, save_filled
from formats_support import linear_layout, tiny_model
from mutants import CONFIG, WEIGHTS, mutate
from safetensors.torch import load_file
from transformers import PreTrainedModel

from flora_vllm.adapter import Adapter, ModelLayout
from flora_vllm.errors import MAX_MESSAGE_BYTES, AdapterError
from flora_vllm.formats import activation, read_adapter
from flora_vllm.formats.config_keys import ANYTHING, BOOKKEEPING, NOTHING
from flora_vllm.formats.families.table import family_of
from flora_vllm.terms import merged, resolve
from flora_vllm.training import FloraConfig

TARGETS = {"q_proj", "v_proj", "down_proj"}
MOST_S = 3.0
MOST_BYTES = 1 << 30
TOLERANCE = 2e-3  # of the largest output
# PEFT refuses sizes of these that the config does not tell. They say themselves what they are (blocks of OFT,
# TinyLoRA's rank), or more of them than is used changes nothing (bases of which layers use the first rows), or only
# training uses them.
_ANY_SIZE = re.compile(r"oft_R|tinylora_[ABPv]|p?vera_[AB]|randlora_[AB]|lora_velora_embed|lora_monteclora_sampler")
# What says nothing, in whichever of these forms.
_EMPTY = (None, [], {})


@dataclass(frozen=True)
class Seed:
    """An adapter to change. `save` writes it; `task` of it is read; `in_peft`: whether PEFT reads it too."""

    save: Callable[[Path], object]
    layout: ModelLayout
    task: str | None = None
    in_peft: bool = True


@cache
def base() -> PreTrainedModel:
    return tiny_model("llama", attention_bias=True)


def _saved_by_peft(make: Callable[[], peft.PeftConfig], fill: Fill) -> Callable[[Path], object]:
    def save(path: Path) -> None:
        config = copy.deepcopy(make())
        for name in ("target_modules", "feedforward_modules"):
            names = getattr(config, name, None)
            if isinstance(names, list | set) and (fewer := TARGETS & set(names)):
                setattr(config, name, fewer)
        save_filled(copy.deepcopy(base()), config, path, fill)

    return save


def seeds() -> dict[str, Seed]:
    """Every case of the families' tests that a Llama can have, and the families that PEFT lacks."""
    layout = linear_layout(base())
    found = {
        "flora": Seed(
            _saved_by_peft(lambda: FloraConfig(r=3, target_modules=["q_proj", "v_proj"]), fill_normal), layout
        ),
        "hira": Seed(
            _saved_by_peft(lambda: peft.HiraConfig(r=3, target_modules=["q_proj", "v_proj"]), fill_normal), layout
        ),
        "ia3": Seed(
            _saved_by_peft(
                lambda: peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
                fill_normal,
            ),
            layout,
        ),
    }
    for name, (architecture, config) in test_families.CASES.items():
        has_tokens = getattr(config, "trainable_token_indices", None)  # of an embedding, which `layout` leaves out
        if architecture in {"llama", "qwen2"} and TARGETS & set(config.target_modules) and not has_tokens:
            found[name] = Seed(_saved_by_peft(lambda config=config: config, fill_normal), layout)
    for name, case in test_families_low.CASES.items():
        if case.architecture in {"llama", "qwen2"}:
            found[name] = Seed(_saved_by_peft(case.config, case.fill), layout, case.task)
    for name, (architecture, config, fill) in test_families_maps.CASES.items():
        if architecture in {"llama", "qwen2"} and "stages" not in name:  # stages need a CUDA extension in PEFT
            found[name] = Seed(_saved_by_peft(lambda config=config: config, fill), layout)
    for name, (architecture, make, fill) in test_families_shared.CASES.items():
        if architecture in {"llama", "qwen2"}:
            found[name] = Seed(_saved_by_peft(make, fill), layout)
    theirs = test_families_authors
    for name, save, task in (
        ("melora", theirs.melora, None),
        ("mtllora", lambda path: theirs.mtl(path, diagonal=True, scaler=True), "1"),
        ("mtllora-whole", lambda path: theirs.mtl(path, diagonal=False), "2"),
        ("xgblora", theirs.xgb, None),
    ):
        found[name] = Seed(save, theirs.LAYOUT, task, in_peft=False)
    return found


@dataclass
class Fuzz:
    """What became of the mutants. `faults`: what must not happen, each with what makes it again."""

    number: int = 0
    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    worst_s: float = 0.0

    def run(self, seeds: dict[str, Seed], mutants: int, folder: Path, number: int = 0) -> None:
        """Judge `mutants` of them, shared out evenly among the seeds; `number` makes others."""
        self.number = number
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own words on odd configs
            for position, (name, seed) in enumerate(seeds.items()):
                share = (position + 1) * mutants // len(seeds) - position * mutants // len(seeds)
                seed.save(folder / name)
                assert self._judge(seed, folder / name, name, "as it was saved"), f"{name}: the seed itself is refused"
                for mutant in range(share):
                    shutil.copytree(folder / name, folder / "mutant")
                    done = mutate(folder / "mutant", _known_keys(folder / name), Random(f"{number} {name} {mutant}"))
                    self._judge(seed, folder / "mutant", f"{name} {mutant}", done, folder / name)
                    shutil.rmtree(folder / "mutant")

    def _judge(self, seed: Seed, path: Path, where: str, done: str, original: Path | None = None) -> bool:
        """Whether it was accepted."""
        start = time.process_time()
        try:
            with memory_limit():
                adapter = read_adapter(path, layout=seed.layout, task=seed.task)
                weights = _weights(adapter) if seed.in_peft else {}
        except AdapterError as error:
            self.refused[where.split()[0]] += 1
            if len(str(error).encode()) > MAX_MESSAGE_BYTES:
                self._fault(where, done, f"a message of {len(str(error))} letters")
            weights = None
        except Exception:
            self._fault(where, done, traceback.format_exc(limit=-3))
            return False
        took = time.process_time() - start
        self.worst_s = max(self.worst_s, took)
        if took > MOST_S:
            self._fault(where, done, f"took {took:.1f} s")
        if weights is None:
            return False
        self.accepted[where.split()[0]] += 1
        if seed.in_peft and (original is None or not _decomposed_anew(path, original)):
            self._compare(weights, seed, path, where, done, original)
        return True

    def _compare(
        self, weights: "Weights", seed: Seed, path: Path, where: str, done: str, original: Path | None
    ) -> None:
        worst = difference(weights, path, seed.task)
        if worst and original is not None and _restore_what_never_matters(path, original):
            worst = difference(weights, path, seed.task)  # PEFT may choke on what only describes the training
        if worst:
            self._fault(where, done, f"accepted, but {worst}")

    def _fault(self, where: str, done: str, what: str) -> None:
        self.faults.append(f"{where} (--seed {self.number}): {done}\n    {what}")


Weights = dict[str, tuple[torch.Tensor, torch.Tensor | None]]


def _weights(adapter: Adapter) -> Weights:
    """Every linear layer's weight and bias with our terms in it."""
    state = base().state_dict()
    found: Weights = {}
    for module in linear_layout(base()).shapes:
        weight, bias = state[f"{module}.weight"], state.get(f"{module}.bias")
        if module in adapter.modules:
            terms = resolve(adapter.modules[module].terms, ModelProbe(base(), state, module))
            weight, bias = merged(weight.double(), None if bias is None else bias.double(), terms)
        found[module] = weight, bias
    return found


def difference(weights: Weights, path: Path, task: str | None) -> str | None:
    """The layer whose outputs are not those of PEFT's own reading, and by how much; None if all are."""
    options = {} if task is None else {"task_ids": torch.tensor([int(task)])}
    try:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base()), str(path)).eval()
        for module, (weight, bias) in weights.items():
            x_TI = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(5))
            layer: Any = theirs.get_submodule(f"base_model.model.{module}")
            with torch.no_grad():
                wanted = (layer(x_TI) if isinstance(layer, torch.nn.Linear) else layer(x_TI, **options)).double()
            if not wanted.isfinite().all():
                continue  # no server would give another answer
            found = torch.nn.functional.linear(x_TI.double(), weight.double(), None if bias is None else bias.double())
            error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
            if not error < TOLERANCE:
                return f"the outputs of {module} are not PEFT's by {error:.2g} of the largest"
    except Exception as error:
        if isinstance(error, RuntimeError) and str(error).startswith("scatter(): Expected self.dtype"):
            return None  # PEFT cannot read a file of two dtypes; what it means is no question
        sizes = re.findall(r"size mismatch for (\S+):", str(error))
        if sizes and all(_ANY_SIZE.search(name) for name in sizes):
            return None
        return f"PEFT says {type(error).__name__}: {str(error)[:300]}"
    return None


def _restore_what_never_matters(path: Path, original: Path) -> bool:
    """Give the keys that describe the training, and those at one of several forms of nothing, which PEFT may choke on,
    back their values, and the one that says which tokens an adapter acts on; whether one changed."""
    config = json.loads((path / CONFIG).read_text())
    old = json.loads((original / CONFIG).read_text())
    _, family = family_of(config)
    assert family is not None
    before = dict(config)
    idle = {key for key, rule in family.keys.items() if rule in (ANYTHING, NOTHING)}
    idle |= {key for key, value in config.items() if value in _EMPTY and old.get(key) in _EMPTY} | {activation.KEY}
    for key in idle | (BOOKKEEPING.keys() - {"peft_type"}):
        config.pop(key, None)
        if key in old:
            config[key] = old[key]
    (path / CONFIG).write_text(json.dumps(config))
    return json.dumps(config, sort_keys=True) != json.dumps(before, sort_keys=True)  # 1 is not True


def _decomposed_anew(path: Path, original: Path) -> bool:
    """Whether FRoD's V is another: PEFT takes U from the V that it finds itself, not from the file's as was trained."""
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (path, original))
    return any("frod_V" in name and not torch.equal(ours[name], theirs.get(name, ours[name][:0])) for name in ours)


def _known_keys(path: Path) -> list[str]:
    _, family = family_of(json.loads((path / CONFIG).read_text()))
    assert family is not None
    return sorted(family.keys)


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """More than MOST_BYTES above what the process has is an error of the allocator."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="seeds whose names begin like this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fuzz = Fuzz()
    chosen = {name: seed for name, seed in seeds().items() if name.startswith(options.only)}
    with tempfile.TemporaryDirectory() as folder:
        fuzz.run(chosen, options.mutants, Path(folder), options.seed)
    print(*fuzz.faults, sep="\n")
    counts = f"{fuzz.accepted.total()} accepted, {fuzz.refused.total()} refused, {len(fuzz.faults)} faults"
    print(f"{len(chosen)} seeds: {counts}; the slowest took {fuzz.worst_s:.2f} s", file=sys.stderr)
    sys.exit(bool(fuzz.faults))


if __name__ == "__main__":
    main()
