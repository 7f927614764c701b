"""A short run of fuzz.py, and that its check can fail."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
import torch
from fuzz import Fuzz, Seed, difference, memory_limit, seeds
from mutants import CONFIG

from flora_vllm.errors import AdapterError
from flora_vllm.formats import read_adapter

MUTANTS = 300
# A second seed of a family is another way through its reader; here one of each does.
FAMILIES = (
    "flora", "hira", "ia3", "lora-lora_bias", "dora", "lora-patterns", "lora-pissa", "lora-kasa", "lora-bdlora",
    "loha-patterns", "adalora-biases", "vblora", "vblora-weights", "unilora-indices", "miss-mini", "miss-bat",
    "gralora-hybrid", "delora", "poly", "peanut-deep", "hra-gram-schmidt", "deft-qr", "psoft", "osf", "oft",
    "oft-coft", "boft", "road-2", "glora", "beft", "vera", "vera-unsaved", "pvera", "randlora-sparse", "tinylora",
    "fourierft-pattern", "waveft-db2", "waveft-proportional", "lokr", "c3a", "shira", "supertuning",
    "supertuning-smallest", "frod", "melora", "mtllora", "xgblora",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_mutants_are_refused_or_read_as_peft_reads_them(tmp_path: Path) -> None:
    known = seeds()
    found = Fuzz()
    found.run({name: known[name] for name in FAMILIES if name in known}, MUTANTS, tmp_path)
    assert found.faults == []
    assert found.accepted.total() > MUTANTS / 4
    assert found.refused.total() > MUTANTS / 4


# What long runs found accepted, or ended by another error than ours: changes of a seed's config, what is said now.
FOUND: dict[str, tuple[dict, str]] = {
    "dora": ({"lora_alpha": 1e30}, "leave the range of float32"),
    "adalora-biases": ({"init_r": 12}, "has shape"),
    "vblora": ({"topk": 64}, "topk is 64"),
    "vblora-weights": ({"modules_to_save": ["q_proj"]}, "of which the file has no tensor"),
    "tinylora-one-vector": ({"weight_tying": 3}, "'weight_tying' is 3; allowed: a number from 0 to 1"),
    "waveft": ({"scaling": 10**30}, "'scaling' is 10000"),
    "waveft-coif3": ({"scaling": 3e38}, "leaves the range of float32"),
    "supertuning-smallest": ({"lora_alpha": 3}, "lora_alpha is set and r is null"),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("name", FOUND)
def test_what_long_runs_found_is_refused(name: str, tmp_path: Path) -> None:
    seed, (changes, said) = seeds()[name], FOUND[name]
    seed.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(AdapterError) as refused:
        fuzz._weights(read_adapter(tmp_path, layout=seed.layout))
    assert said in str(refused.value)


def _lora(path: Path) -> Seed:
    seed = seeds()["lora-bias"]
    seed.save(path)
    return seed


def test_another_reading_is_seen(tmp_path: Path) -> None:
    seed = _lora(tmp_path / "a")
    weights = fuzz._weights(read_adapter(tmp_path / "a", layout=seed.layout))
    assert difference(weights, tmp_path / "a", None) is None
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    assert "are not PEFT's" in (difference(weights, tmp_path / "a", None) or "")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (AdapterError("refused"), None),
        (AdapterError("x" * 9000), "a message of 9000"),
        (KeyError("r"), "KeyError: 'r'"),
    ],
)
def test_a_reader_that_raises_anything_else_is_seen(
    raised: Exception, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise raised

    seed, found = _lora(tmp_path / "a"), Fuzz()
    monkeypatch.setattr(fuzz, "read_adapter", read)
    assert not found._judge(seed, tmp_path / "a", "lora 0", "nothing")
    assert [said in fault for fault in found.faults] == ([] if said is None else [True])


def test_memory_is_limited() -> None:
    with pytest.raises((MemoryError, RuntimeError)), memory_limit():
        torch.empty(2 * fuzz.MOST_BYTES, dtype=torch.uint8)
    copy.deepcopy(torch.empty(1 << 20))
