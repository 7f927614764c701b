"""Adapters made to cost a shared server time or memory: refused before the work, in bounded time, in few words."""

import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from formats_support import edit_config, faults_of, the_fault
from safetensors.torch import save_file

from flora_vllm.adapter import ModelLayout
from flora_vllm.errors import MAX_MESSAGE_BYTES, adapter_error, bounded
from flora_vllm.formats import limits, read_adapter, write_flora
from flora_vllm.formats.families.table import FAMILIES
from flora_vllm.formats.matching import match_pattern
from flora_vllm.formats.patterns import AFTER_DOT, IN_GROUP, NamePatterns, speaks_re

MODULES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(32) for name in "qkvo"]
LAYOUT = ModelLayout(dict.fromkeys(MODULES, (4, 4)))
# Of one core, on a machine that has other things to do. What was measured before there were limits: 150 s.
MOST_S = 3.0
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def flora(tmp_path: Path) -> Path:
    pairs = {module: (torch.ones(1, 4), torch.ones(4, 1)) for module in MODULES}
    path = write_flora(tmp_path / "adapter", pairs, target_modules=[f"{name}_proj" for name in "qkvo"])
    assert read_adapter(path, layout=LAYOUT).rank == 1
    return path


def refused(path: Path) -> str:
    """The faults, found in time."""
    start = time.process_time()
    found = "\n".join(faults_of(path, layout=LAYOUT))
    assert time.process_time() - start < 2 * MOST_S, "read twice: examine and read_adapter"
    return found


def many_names(count: int) -> list[str]:
    return [f"m{i}" for i in range(count)]


CONFIGS = {
    "pattern of 11 MB": ({"target_modules": "a?" * (11 << 19)}, "at most 1048576 are read"),
    "a million targets": ({"target_modules": many_names(1_000_000)}, "at most 1048576 are read"),
    "pattern of 500 KB": ({"target_modules": "a?" * 250_000}, "at most 8192 are read"),
    "too many targets": ({"target_modules": many_names(50_000)}, "at most 16384 are read"),
    "too many excluded": ({"exclude_modules": many_names(50_000)}, "at most 16384 are read"),
    "too many ranks": ({"rank_pattern": dict.fromkeys(many_names(50_000), 1)}, "at most 16384 are read"),
    "patterns of many forms": ({"rank_pattern": {f"{'a' * i}b*": 1 for i in range(1, 999)}}, "allowed: an object"),
    "layers of many names": ({"layers_pattern": many_names(99), "layers_to_transform": [0]}, "at most 64 are read"),
    "a list in a list": ({"runtime_config": json.loads("[" * 40 + "]" * 40)}, "nested more than"),
    "a key of 9,000 letters": ({"k" * 9000: 1}, "at most 8192 are read"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, flora: Path) -> None:
    changes, words = CONFIGS[case]
    edit_config(flora, **changes)
    assert words in refused(flora)


def test_honest_lists_are_read_in_time(flora: Path) -> None:
    """Every module by name, and a rank for each in the two ways that PEFT's users write."""
    start = time.process_time()
    for ranks in (dict.fromkeys(MODULES, 1), {f"^{re.escape(module)}": 1 for module in MODULES}):
        edit_config(flora, target_modules=MODULES + many_names(16_000), r=2, rank_pattern=ranks)
        assert read_adapter(flora, layout=LAYOUT).modules.keys() == set(MODULES)
    assert time.process_time() - start < MOST_S


NESTED = {
    "+": "(?:" * 40 + "a" + ")+" * 40,
    "{2,}": "(?:" * 40 + "a" + "){2,}" * 40,
    "{9}": "(?:" * 8 + "a" + "){9}" * 8,
    "{1000}": "(?:(?:(?:a){1000}){1000}){1000}",
    "{60000}": "(?:abcd){60000}",
    "lookahead": "(?=" + "(?:" * 40 + "a" + ")+" * 40 + ")",
    "branch": "b|" + "(?:c|" * 40 + "a" + ")+" * 40,
    "wide": "(?i)" + r"[\u0100-\uffff]" * 200,
}


def test_nested_repeats_are_refused_before_they_are_written_out() -> None:
    """In a process of its own: one of these took 6 GB."""
    code = f"""
import resource, time
from flora_vllm.formats.config_keys import MODULES, RANK_PATTERN
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
for pattern in {list(NESTED.values())!r}:
    assert not MODULES.check(pattern), pattern
    assert not RANK_PATTERN.check({{pattern: 1}}), pattern
assert time.process_time() - start < {MOST_S}
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp))",
        r"model\.layers\.(1[0-9]|2[0-9]{1,2})\.(?!mlp).*",
        r"(?i)model.*Q_proj",
        "|".join(MODULES),
    ],
)
def test_honest_patterns_are_read(pattern: str) -> None:
    assert speaks_re(pattern)


@pytest.mark.parametrize("place", [IN_GROUP, AFTER_DOT])
def test_keys_that_are_names_match_as_in_peft(place: str) -> None:
    """Against PEFT's own expression, tried one by one."""
    keys = ["q_proj", "^model.layers", r"^model\.layers\.1\.q", "layers.1", "a.b", r"a\.b", ".", "^x", "v-1", "b"]
    modules = ["q_proj", "model.q_proj", "xq_proj", "model.layers", "model_layers", "modelslayers", "model.layers.1.q"]
    modules += ["x", "a.x", "y.x", "layers_1", "x.layers.1", "aXb", "z.aXb", "a.b", "z.a.b", "n", "k.v-1", "b", "c.b"]
    for start in range(len(keys)):
        chosen = keys[start:] + keys[:start]
        for module in modules:
            expected = next((i for i, key in enumerate(chosen) if re.match(place.format(key), module)), None)
            assert NamePatterns(chosen, place).first(module) == expected, (chosen, module)
    assert match_pattern({"q_proj": 3}, "k_proj", 2) == 2
    assert match_pattern({}, "k_proj", 2) == 2


def test_patterns_share_their_time(flora: Path) -> None:
    """Many patterns that are each slow, but not too slow."""
    slow = {f"(?:.|..|...)+[#!]{'[#!]' * i}": 1 for i in range(1, 60)}
    edit_config(flora, rank_pattern=slow)
    assert "takes too long to match module names" in refused(flora)


def test_names_of_what_is_saved_whole_share_their_time(flora: Path) -> None:
    """They are patterns, too."""
    edit_config(flora, modules_to_save=[f"(?:.|..|...)+[#!]{'[#!]' * i}" for i in range(1, 60)])
    assert "takes too long to match module names" in refused(flora)


def write_header(flora: Path, header: bytes, data: bytes = b"") -> None:
    (flora / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(begin: int, end: int) -> dict:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def test_a_tensor_name_of_50_mb(flora: Path) -> None:
    write_header(flora, json.dumps({"x" * 50_000_000: entry(0, 1)}).encode(), b"0")
    assert "header" in refused(flora)


@pytest.mark.parametrize("name", ["x" * 1_000_000, "x\n", "x\0", "\ud800", "\u202eproj"])
def test_tensor_names(name: str, flora: Path) -> None:
    write_header(flora, json.dumps({name: entry(0, 1)}).encode(), b"0")
    fault = the_fault(flora)
    assert "the name" in fault
    assert fault.isprintable()
    assert len(fault) < 500


def test_a_header_of_many_tensors(flora: Path) -> None:
    write_header(flora, json.dumps({f"t{i}": entry(0, 0) for i in range(limits.MAX_TENSORS + 1)}).encode())
    assert "at most 65536 are read" in refused(flora)


def test_tensors_hidden_from_the_count(flora: Path) -> None:
    text = json.dumps({f"t{i}": entry(0, 0) for i in range(limits.MAX_TENSORS + 1)})
    write_header(flora, text.replace("data_offsets", "data_\\u006fffsets").encode())
    assert "at most 65536 are read" in refused(flora)


def test_a_key_that_comes_again_late(flora: Path) -> None:
    pairs = [f'"{name}": 1' for name in [*many_names(50_000), "m49999"]]
    write_header(flora, ("{" + ", ".join(pairs) + "}").encode())
    assert "'m49999' appears twice" in refused(flora)


@pytest.mark.parametrize("shape", [[10**400], [1] * 1000, [2**62, 2**62, 4, 0]])
def test_shapes_out_of_this_world(shape: list[int], flora: Path) -> None:
    write_header(flora, json.dumps({"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode(), b"0000")
    assert "corrupt" in the_fault(flora)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**32, 2**31, 0]])
def test_an_empty_tensor_of_endless_sides(shape: list[int], flora: Path) -> None:
    """Kept whole beside the adapter, it was handed to torch, which cannot count its strides."""
    header = json.dumps({"base_model.model.lm_head.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    with (flora / WEIGHTS).open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        others, data = json.loads(file.read(length)), file.read()
    write_header(flora, json.dumps({**json.loads(header), **others}).encode(), data)
    assert "beyond what a tensor can have" in refused(flora)


def test_as_many_prefixes_as_tensors(flora: Path) -> None:
    """A module name in front of a name of the model's own: each was tried on every module of the model."""
    layout = ModelLayout(LAYOUT.shapes, rename=lambda module: module.split("/")[-1])
    tensors = {
        f"base_model.model.p{i}/{MODULES[i % len(MODULES)]}.flora_{side}.weight": torch.ones(1, 1)
        for i in range(4_000)
        for side in "AB"
    }
    save_file(tensors, flora / WEIGHTS)
    edit_config(flora, target_modules=MODULES + many_names(15_000))
    start = time.process_time()
    assert len(faults_of(flora, layout=layout)) == 101
    assert time.process_time() - start < 2 * MOST_S, "read twice"


def test_messages_are_short_and_valid_text() -> None:
    # Each of another kind: what differs in numbers alone is one line.
    words = ["".join("abcdefghij"[int(digit)] for digit in str(i)) for i in range(1000)]
    faults = [f"{word}: {'é' * 5000} \ud800" for word in words]
    message = str(adapter_error("x" * 100_000, faults))
    assert len(message.encode()) <= MAX_MESSAGE_BYTES
    assert re.search(r"\(1000 faults\):", message)
    shown = len(re.findall(r"\n  - [a-j]+:", message))
    assert shown > 0
    assert f"and {1000 - shown} more, left out of this message" in message
    assert bounded("é\ud800", 100) == "é\\ud800"
    assert bounded("é" * 100, 11).encode() == "éééé…".encode()


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("POLY", "n_tasks"),
        ("MTLLORA", "n_tasks"),
        ("PEANUT", "depth"),
        ("OFT_NEUMANN", "num_cayley_neumann_terms"),
        ("PSOFT", "num_cayley_neumann_terms"),
        ("PSOFT", "psoft_svd_lowrank_niter"),
        ("MIXLORA", "num_experts"),
        ("VERA", "projection_prng_key"),
    ],
)
def test_what_is_counted_one_by_one_has_a_bound(family: str, key: str) -> None:
    checked = FAMILIES[family].keys[key].check
    assert checked(2)
    assert not checked(10**20)
