"""Every way a checkpoint can be wrong is refused, named, and reported together with the others."""

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats_support import edit_config, edit_tensors, faults_of, the_fault
from peft import PeftType
from safetensors.torch import load_file, save_file

from flora_vllm.adapter import ModelLayout
from flora_vllm.formats import FAMILIES, examine, read_adapter, write_flora
from flora_vllm.terms import Product

torch.set_num_threads(1)

Q0, V0, Q1, V1 = (f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj"))
LAYOUT = ModelLayout({Q0: (8, 6), V0: (4, 6), Q1: (8, 6), V1: (4, 6)}, {"lm_head": "no output layers here"})
A, B = "base_model.model.{}.flora_A.weight", "base_model.model.{}.flora_B.weight"


@pytest.fixture
def flora(tmp_path: Path) -> Path:
    """A good FLoRA directory: rank 2 on q and v of two layers, q of the second layer has rank 3."""
    torch.manual_seed(0)
    ranks = {Q0: 2, V0: 2, Q1: 3, V1: 2}
    pairs = {m: (torch.randn(r, 6), torch.randn(LAYOUT.shapes[m][0], r)) for m, r in ranks.items()}
    path = write_flora(tmp_path / "adapter", pairs, target_modules=["q_proj", "v_proj"])
    assert read_adapter(path, layout=LAYOUT, max_flora_rank=3).rank == 3
    return path


@pytest.mark.parametrize("name", sorted({kind.value for kind in PeftType} - set(FAMILIES)))
def test_every_other_family_of_peft_is_refused_by_name(name: str, flora: Path) -> None:
    edit_config(flora, peft_type=name)
    assert f"family '{name}' is not supported yet" in the_fault(flora)


CONFIG_CASES = {
    "r-zero": ({"r": 0}, "'r' is 0; allowed: an integer of at least 1"),
    "r-negative": ({"r": -1}, "'r' is -1"),
    "r-bool": ({"r": True}, "'r' is True"),
    "r-float": ({"r": 2.0}, "'r' is 2.0"),
    "r-text": ({"r": "2"}, "'r' is '2'"),
    "r-missing": ({"r": ...}, "key 'r' is missing"),
    "reduction": ({"reduction": "max"}, "'reduction' is 'max'; allowed: 'mean' or 'sum'"),
    "alpha": ({"lora_alpha": 8}, "key 'lora_alpha' (value 8) is unknown and could change the result"),
    "unknown": ({"use_magic": True}, "key 'use_magic' (value True) is unknown"),
    "unknown-null": ({"use_magic": None}, "key 'use_magic' (value None) is unknown"),
    "modules-to-save": (
        {"modules_to_save": ["score"] * 65},
        "allowed: null or at most 64 names of modules",
    ),
    "modules-to-save-regex": ({"modules_to_save": ["(q"]}, "'modules_to_save' is ['(q']; allowed: null or at most 64"),
    "targets-missing": ({"target_modules": ...}, "key 'target_modules' is missing"),
    "targets-null": ({"target_modules": None}, "'target_modules' is None"),
    "targets-type": ({"target_modules": [1]}, "'target_modules' is [1]"),
    "targets-regex": ({"target_modules": "(q"}, "'target_modules' is '(q'"),
    "layers-type": ({"layers_to_transform": [0, True]}, "'layers_to_transform' is [0, True]"),
    "layers-with-regex": ({"target_modules": ".*", "layers_to_transform": [0, 1]}, "beside a list of names"),
    "layers-pattern-alone": (
        {"layers_pattern": "layers"},
        "'layers_pattern' is 'layers' without 'layers_to_transform'",
    ),
    "targets-empty": ({"target_modules": []}, "'target_modules' is [] and selects nothing"),
    "pattern-type": ({"rank_pattern": {"q_proj": 0}}, "'rank_pattern' is {'q_proj': 0}"),
    "pattern-regex": ({"rank_pattern": {"*": 1}}, "'rank_pattern' is {'*': 1}"),
    "base-type": ({"base_model_name_or_path": 1}, "'base_model_name_or_path' is 1"),
    "family": ({"peft_type": "LILY"}, "family 'LILY' is not supported yet (its output for a token depends on"),
    "family-case": ({"peft_type": "flora"}, "family 'flora' is not supported yet"),
    "family-missing": ({"peft_type": ...}, "family None is not supported yet"),
    "family-type": ({"peft_type": 3}, "family 3 is not supported yet"),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_config_values(case: str, flora: Path) -> None:
    changes, message = CONFIG_CASES[case]
    edit_config(flora, **changes)
    assert message in the_fault(flora, layout=LAYOUT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"r": 1, "r": 2}', "key 'r' appears twice"),
        ("\x00", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "family None is not supported yet"),
    ],
)
def test_config_text(text: str, message: str, flora: Path) -> None:
    (flora / "adapter_config.json").write_text(text)
    assert message in the_fault(flora)


def test_config_that_is_not_text(flora: Path) -> None:
    (flora / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    assert "not valid JSON" in the_fault(flora)


@pytest.mark.parametrize("key", ["base_model_name_or_path", "peft_version", "task_type", "revision", "auto_mapping"])
def test_bookkeeping_does_not_matter(key: str, flora: Path) -> None:
    edit_config(flora, **{key: "anything at all"})
    assert read_adapter(flora, layout=LAYOUT).rank == 3


TENSOR_CASES: dict[str, tuple[dict, str]] = {
    "partner": ({A.format(V0): None}, f"tensor '{A.format(V0)}' is missing, its partner flora_B.weight is there"),
    "ndim": ({A.format(V0): torch.ones(12)}, "has shape (12,); the config and the base model allow (2 (rank), 6 (in"),
    "rank": ({A.format(V0): torch.ones(3, 6), B.format(V0): torch.ones(4, 3)}, "has shape (3, 6)"),
    "in": ({A.format(V0): torch.ones(2, 7)}, "has shape (2, 7)"),
    "out": ({B.format(V0): torch.ones(5, 2)}, "allow (4 (out features), 2 (rank))"),
    "empty": ({A.format(V0): torch.ones(0, 6)}, "has shape (0, 6), which is empty"),
    "swapped": ({B.format(V0): torch.ones(2, 4)}, "has shape (2, 4)"),
    "dtype": ({A.format(V0): torch.ones(2, 6).double()}, "has dtype F64; allowed: F32, F16, BF16"),
    "int": ({A.format(V0): torch.ones(2, 6).int()}, "has dtype I32"),
    "nan": ({A.format(V0): torch.full((2, 6), torch.nan)}, f"tensor '{A.format(V0)}' has 12 NaN or Inf of 12 values"),
    "inf": ({B.format(V0): torch.tensor([[1, torch.inf]] * 4)}, "has 4 NaN or Inf of 8 values"),
    "unknown": ({"base_model.model.x.flora_C.weight": torch.ones(1)}, "is not understood"),
    "no-prefix": (
        {"model.x.flora_A.weight": torch.ones(1)},
        "'model.x.flora_A.weight' in place of 'base_model.model.model.x.",
    ),
    "lora": ({f"base_model.model.{Q0}.lora_A.weight": torch.ones(2, 6)}, "belongs to another family"),
    "head": ({"base_model.model.score.weight": torch.ones(4, 6)}, "whole weights beside the adapter"),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors(case: str, flora: Path) -> None:
    changes, message = TENSOR_CASES[case]
    edit_tensors(flora, **changes)
    faults = faults_of(flora, layout=LAYOUT)
    assert any(message in fault for fault in faults), faults
    named = next(iter(changes))
    assert any(named in fault for fault in faults), faults


def test_without_a_layout_a_pair_must_still_agree(flora: Path) -> None:
    edit_config(flora, rank_pattern={"v_proj": 0})
    edit_tensors(flora, **{B.format(V0): torch.ones(4, 5)})
    faults = faults_of(flora)
    assert any("'rank_pattern'" in fault for fault in faults)
    assert any("disagree" in fault and "rank 5" in fault for fault in faults)


def test_rank_limit_counts_what_the_file_states(flora: Path) -> None:
    assert "rank 3 is above the limit 2; start the server with --max-flora-rank 3" in the_fault(flora, max_flora_rank=2)
    assert read_adapter(flora, max_flora_rank=3, max_lora_rank=1).rank == 3
    edit_config(flora, rank_pattern={r"q_proj": 10**30})
    assert any(f"rank {10**30} is above" in fault for fault in faults_of(flora, max_flora_rank=16))


def test_modules_of_another_model(flora: Path) -> None:
    other = ModelLayout({Q0: (8, 6), V0: (4, 6), Q1: (16, 6), "model.layers.2.self_attn.q_proj": (8, 6)})
    faults = faults_of(flora, layout=other)
    assert len(faults) == 3
    assert any(V1 in fault and "is not in the base model" in fault for fault in faults)
    assert any(B.format(Q1) in fault and "16 (out features)" in fault for fault in faults)
    assert any("layers.2.self_attn.q_proj' is selected by target_modules but has no" in fault for fault in faults)


def test_what_the_engine_never_runs_is_left_out_and_nothing_else(flora: Path) -> None:
    """By the model's own list, in the middle of a path too; a name that only contains it is not meant."""
    drafts = ModelLayout(LAYOUT.shapes, never_run=("mtp.",))
    bad = torch.full((2, 6), torch.nan)
    for module in ("mtp.layers.0.q_proj", "model.mtp.q_proj"):
        edit_tensors(flora, **{A.format(module): bad, B.format(module): torch.ones(8, 2)})
    found = examine(flora, layout=drafts)
    assert found.adapter is not None
    assert found.adapter.modules.keys() == LAYOUT.shapes.keys()
    assert {name.split(".flora")[0].removeprefix("base_model.model.") for name in found.left_out} == {
        "mtp.layers.0.q_proj",
        "model.mtp.q_proj",
    }
    assert any("NaN" in fault for fault in faults_of(flora, layout=LAYOUT))
    edit_tensors(flora, **{A.format("nomtp.q_proj"): torch.ones(2, 6), B.format("nomtp.q_proj"): torch.ones(8, 2)})
    assert "'nomtp.q_proj' is not in the base model" in the_fault(flora, layout=drafts)
    edit_tensors(flora, **{p.format(m): None for p in (A, B) for m in (*LAYOUT.shapes, "nomtp.q_proj")})
    assert any("but of modules that this engine never runs" in fault for fault in faults_of(flora, layout=drafts))


def test_target_without_tensors(flora: Path) -> None:
    edit_tensors(flora, **{A.format(Q0): None, B.format(Q0): None})
    assert f"module '{Q0}' is selected by target_modules but has no tensors" in the_fault(flora, layout=LAYOUT)
    edit_config(flora, exclude_modules=["layers.0.self_attn.q_proj"])
    assert Q0 not in read_adapter(flora, layout=LAYOUT).modules


def renamed(module: str) -> str:
    return module.replace("model.layers.", "decoder.blocks.")


def test_a_layout_with_other_names(flora: Path) -> None:
    layout = ModelLayout({renamed(m): shape for m, shape in LAYOUT.shapes.items()}, {renamed(Q0): "just so"}, renamed)
    assert f"module '{Q0}' cannot be adapted: just so" in the_fault(flora, layout=layout)
    layout = ModelLayout(layout.shapes, rename=renamed)
    assert Q0 in read_adapter(flora, layout=layout).modules
    edit_tensors(flora, **{A.format(Q0): None, B.format(Q0): None})
    assert f"module '{Q0}' is selected by target_modules but has no tensors" in the_fault(flora, layout=layout)


OWN = ("self_attn.q_proj", "self_attn.k_proj", "fc1")


def renamed_within(module: str) -> str:
    """As vLLM's Whisper, Falcon-H1 and Molmo: within each layer, and the last name."""
    return module.replace(".fc1", ".mlp.fc1").replace("self_attn.q_proj", "self_attn.query")


def test_a_deep_layout_whose_layers_have_other_names(tmp_path: Path) -> None:
    names = [f"model.{half}.layers.{n}.{own}" for half in ("encoder", "decoder") for n in range(70) for own in OWN]
    layout = ModelLayout({renamed_within(name): (8, 6) for name in names}, rename=renamed_within)
    pairs = {name: (torch.ones(2, 6), torch.ones(8, 2)) for name in names}
    folder = write_flora(tmp_path / "deep", pairs, target_modules=[own.rpartition(".")[2] for own in OWN])
    assert read_adapter(folder, layout=layout).modules.keys() == set(names)
    gone = [name for name in names if name.endswith(("r.layers.66.fc1", "encoder.layers.3.self_attn.q_proj"))]
    for name in gone:
        edit_tensors(folder, **{A.format(name): None, B.format(name): None})
    faults = faults_of(folder, layout=layout)
    assert len(faults) == len(gone) == 3
    for name in gone:
        assert any(f"module {name!r} is selected by target_modules but has no tensors" in fault for fault in faults)


def test_two_names_of_one_module(flora: Path) -> None:
    tensors = {A.format(renamed(V1)): torch.ones(2, 6), B.format(renamed(V1)): torch.ones(4, 2)}
    edit_tensors(flora, **tensors)
    layout = ModelLayout({renamed(m): shape for m, shape in LAYOUT.shapes.items()}, rename=renamed)
    assert "are one module of the base model" in the_fault(flora, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_anywhere(dtype: torch.dtype, value: float, flora: Path) -> None:
    """The check goes by minimum and maximum, whose vector code has a body and a tail."""
    for at in (0, 5, 63, 64, 200, 256):
        factor = torch.randn(1, 257).to(dtype)
        factor[0, at] = value
        write = {A.format("q_proj"): factor, B.format("q_proj"): torch.ones(3, 1, dtype=dtype)}
        save_file(write, weights(flora))
        edit_config(flora, r=1)
        assert "has 1 NaN or Inf of 257 values" in the_fault(flora)
    # The largest finite values are fine.
    save_file({**write, A.format("q_proj"): torch.full((1, 257), torch.finfo(dtype).max).to(dtype)}, weights(flora))
    assert read_adapter(flora).rank == 3


def test_tensors_that_peft_would_ignore(flora: Path) -> None:
    edit_config(flora, layers_to_transform=[1])
    faults = faults_of(flora)
    assert len(faults) == 2
    assert all("the config does not select it" in fault for fault in faults)


@pytest.mark.parametrize(
    ("module", "layout", "reason"),
    [
        ("lm_head", LAYOUT, "no output layers here"),
        ("lm_head", ModelLayout({}), "this model has no output layer of its own"),
        ("model.embed_tokens", LAYOUT, "this embedding cannot be adapted"),
        ("layers.0.mlp.experts.3.up_proj", ModelLayout({}, {"layers.0.mlp.experts": "too many"}), "too many"),
        (Q0, ModelLayout({}, {Q0: "because"}), "because"),
    ],
)
def test_modules_that_cannot_be_adapted(module: str, layout: ModelLayout | None, reason: str, flora: Path) -> None:
    edit_config(flora, target_modules=".*")
    save_file(
        {A.format(module): torch.ones(2, 6), B.format(module): torch.ones(8, 2)}, flora / "adapter_model.safetensors"
    )
    faults = faults_of(flora, layout=layout)
    assert any(f"module {module!r} cannot be adapted: {reason}" in fault for fault in faults), faults


def test_all_faults_at_once(flora: Path) -> None:
    edit_config(flora, reduction="max", use_magic=1)
    edit_tensors(
        flora,
        **{
            A.format(Q0): torch.full((2, 6), torch.inf),
            A.format(V0): None,
            B.format(Q1): torch.ones(8, 3).double(),
            B.format(V1): torch.ones(9, 2),
            "base_model.model.x": torch.ones(1),
        },
    )
    faults = faults_of(flora, layout=LAYOUT, max_flora_rank=1)
    wanted = [
        "'max'",
        "'use_magic'",
        "limit 1",
        "12 NaN",
        "partner flora_B",
        "F64",
        "shape (9, 2)",
        "'base_model.model.x'",
    ]
    assert len(faults) == len(wanted), faults
    assert all(any(text in fault for fault in faults) for text in wanted), faults


def test_a_flood_of_faults_is_cut(flora: Path) -> None:
    save_file({f"t{i}": torch.ones(1) for i in range(500)}, flora / "adapter_model.safetensors")
    faults = faults_of(flora, layout=LAYOUT)
    assert len(faults) == 101
    assert "more faults" in faults[-1]


def weights(path: Path) -> Path:
    return path / "adapter_model.safetensors"


def test_truncation_anywhere(flora: Path) -> None:
    whole = weights(flora).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]:
        weights(flora).write_bytes(whole[:size])
        assert "adapter_model.safetensors: " in the_fault(flora, layout=LAYOUT), size
    weights(flora).write_bytes(whole + b"\0")
    assert "trailing data" in the_fault(flora, layout=LAYOUT)


def header_edit(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def edit(whole: bytes) -> bytes:
        length = struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    return edit


CORRUPTIONS: dict[str, Callable[[bytes], bytes]] = {
    "length": lambda whole: b"\xff" * 8 + whole[8:],
    "garbage": lambda whole: whole[:8] + b"x" * (len(whole) - 8),
    "pickle": lambda _: b"\x80\x04\x95" + b"0" * 64,
    "shape": header_edit(lambda h: h[A.format(Q0)].update(shape=[2, 600])),
    "negative": header_edit(lambda h: h[A.format(Q0)].update(shape=[-2, -6])),
    "offsets": header_edit(lambda h: h[A.format(Q0)].update(data_offsets=[0, 10**12])),
    "reversed": header_edit(lambda h: h[A.format(Q0)].update(data_offsets=[48, 0])),
    "overlap": header_edit(lambda h: h[A.format(Q0)].update(h[A.format(V0)])),
    "gap": header_edit(lambda h: h.pop(A.format(V0))),
    "entry": header_edit(lambda h: h.update(extra=3)),
    "dtype": header_edit(lambda h: h[A.format(Q0)].update(dtype=["F32"])),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corrupt_weights(case: str, flora: Path) -> None:
    weights(flora).write_bytes(CORRUPTIONS[case](weights(flora).read_bytes()))
    assert "adapter_model.safetensors: " in the_fault(flora, layout=LAYOUT)


def test_same_tensors_as_the_safetensors_library(flora: Path) -> None:
    adapter = read_adapter(flora)
    for name, tensor in load_file(weights(flora)).items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".flora_")
        (product,) = adapter.modules[module].of(Product)
        found = product.input if part == "A.weight" else product.output
        assert found is not None
        assert torch.equal(found, tensor)


def test_weights_at_an_odd_offset(flora: Path) -> None:
    whole = weights(flora).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    weights(flora).write_bytes(struct.pack("<Q", length + 3) + whole[8 : 8 + length] + b"   " + whole[8 + length :])
    (product,) = read_adapter(flora).modules[Q0].of(Product)
    assert product.input is not None
    assert torch.equal(product.input, load_file(weights(flora))[A.format(Q0)])
    assert product.input.data_ptr() % 4 == 0


def test_paths(tmp_path: Path, flora: Path) -> None:
    assert "does not exist" in the_fault(tmp_path / "nowhere")
    assert "not a directory" in the_fault(flora / "adapter_config.json")
    (tmp_path / "empty").mkdir()
    assert "directory is empty" in the_fault(tmp_path / "empty")
    assert "cannot be opened" in the_fault(Path("a\0b"))
    assert "cannot be opened" in the_fault(Path("a" * 300))


def test_missing_and_pickled_files(flora: Path) -> None:
    (flora / "adapter_config.json").rename(flora / "adapter_config.txt")
    assert "adapter_config.json: missing" in the_fault(flora)
    weights(flora).rename(flora / "adapter_model.bin")
    faults = faults_of(flora)
    assert len(faults) == 2
    assert any("adapter_model.bin: pickle files are never read" in fault for fault in faults)


def test_files_that_are_not_files(flora: Path) -> None:
    weights(flora).unlink()
    os.mkfifo(weights(flora))
    assert "not a regular file" in the_fault(flora)
    weights(flora).unlink()
    weights(flora).mkdir()
    assert "adapter_model.safetensors: " in the_fault(flora)
    weights(flora).rmdir()
    weights(flora).symlink_to(flora / "gone")
    assert "adapter_model.safetensors: missing" in the_fault(flora)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_backtracks_for_ever_is_refused_in_time(key: str, flora: Path) -> None:
    endless = "(.|..|...)+[#!]"
    edit_config(flora, **{key: {endless: 2} if key == "rank_pattern" else endless})
    start = time.process_time()
    assert "takes too long to match module names" in "\n".join(faults_of(flora))
    assert time.process_time() - start < 10
    edit_config(flora, **{key: {"q_proj": 2} if key == "rank_pattern" else ".*_proj"})
    assert "takes too long" not in "\n".join(examine(flora).faults)


@pytest.mark.parametrize("pattern", ["(?:q_proj){e<=1}", "[[:alpha:]]_proj"])
def test_a_pattern_of_another_dialect_is_refused(pattern: str, flora: Path) -> None:
    edit_config(flora, target_modules=pattern)
    assert f"'target_modules' is '{pattern}'" in "\n".join(faults_of(flora))
