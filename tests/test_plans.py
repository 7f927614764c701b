"""An adapter loaded by the plan of another has the slot contents, to the bit, that examining and folding it gives."""

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from formats_support import edit_config, edit_tensors, linear_layout, tiny_model
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flora_vllm.adapter import ModelLayout
from flora_vllm.compact import CompactLayers
from flora_vllm.formats.files import collect_files
from flora_vllm.formats.ranks import Limits
from flora_vllm.formats.reader import examine_files
from flora_vllm.plugin.planned import MOST_PLANS, Plans
from flora_vllm.slots import LinearLayout, SliceLayout, layer_terms
from flora_vllm.terms import Arena
from flora_vllm.training import FloraConfig

# Twelve: in a file layer 10 comes after layer 1.
LAYERS = 12
WEIGHTS = "adapter_model.safetensors"
PACKED = {
    "self_attn.qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32},
    "self_attn.o_proj": {"o_proj": 64},
    "mlp.gate_up_proj": {"gate_proj": 96, "up_proj": 96},
    "mlp.down_proj": {"down_proj": 64},
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=9, target_modules=ALL, rank_pattern={"o_proj": 2}),
    "rslora_some": LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    "unscaled": LoraConfig(r=4, lora_alpha=4, target_modules=["k_proj", "up_proj"]),
    "flora": FloraConfig(r=4, target_modules=ALL),
    "hira": HiraConfig(r=2, target_modules=ALL),
}


@dataclass
class Loader:
    """What a worker's rank does with an adapter, the long way or by a plan."""

    layout: ModelLayout
    ranks: int = 1
    rank: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        self.plans = Plans()
        self.layers = [_layer(i, name, self.ranks, self.rank) for i in range(LAYERS) for name in PACKED]

    def planned(self, path: Path) -> CompactLayers | None:
        found = self.plans.load(_files(path), None)
        return None if found is None else found[1]

    def examined(self, path: Path) -> CompactLayers:
        """The long way; what it did is learnt."""
        files = _files(path)
        adapter = examine_files(files, self.layout, Limits()).adapter
        assert adapter is not None
        arena = Arena(self.dtype, sum(t.numel() for m in adapter.modules.values() for t in m.tensors()))
        inputs: dict[tuple, torch.Tensor] = {}
        terms = {
            layer.module: layer_terms(layer, adapter.modules, self.dtype, arena=arena, inputs=inputs)
            for layer in self.layers
        }
        kept = CompactLayers({name: there for name, there in terms.items() if there is not None}, arena.finished())
        self.plans.learn(files, None, adapter, [arena], kept)
        return kept


def _files(path: Path) -> dict[str, bytearray]:
    files, faults = collect_files(path)
    assert not faults
    return files


def _layer(number: int, name: str, ranks: int, rank: int) -> LinearLayout:
    """A layer of one rank, cut as vLLM does: k and v whole on each rank, o and down by their inputs."""
    parts = PACKED[name]
    by_inputs = name.endswith(("o_proj", "down_proj"))
    full_in = 96 if "down" in name else 64
    slices, start = [], 0
    for part, full in parts.items():
        size = full if by_inputs or part in ("k_proj", "v_proj") else full // ranks
        first = 0 if size == full else rank * size
        path = f"model.layers.{number}.{name.split('.')[0]}.{part}"
        slices.append(SliceLayout(path, size, first, start + first, full))
        start += full
    in_features = full_in // ranks if by_inputs else full_in
    path = f"model.layers.{number}.{name}"
    return LinearLayout(path, in_features, rank * in_features if by_inputs else 0, full_in, tuple(slices), start)


def _save(config: PeftConfig, path: Path, seed: int) -> Path:
    wrapped = get_peft_model(tiny_model("llama", num_hidden_layers=LAYERS), config)
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(str(path))
    return path


Pair = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Two adapters of each config, as PEFT saved them."""
    folder = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def make(name: str) -> tuple[Path, Path]:
        one, other = (_save(CONFIGS[name], folder / f"{name}{seed}", seed) for seed in (1, 2))
        return one, other

    return make


@pytest.fixture
def pair(saved, tmp_path) -> Pair:
    """Copies of them, in a dtype, to be changed."""

    def copy(name: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        copies = []
        for path in saved(name):
            copies.append(tmp_path / path.name)
            shutil.copytree(path, copies[-1])
            _cast(copies[-1], dtype)
        return copies[0], copies[1]

    return copy


def _cast(path: Path, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path / WEIGHTS).items()}, path / WEIGHTS)


@functools.cache
def _layout(fused: bool = False) -> ModelLayout:
    layout = linear_layout(tiny_model("llama", num_hidden_layers=LAYERS))
    shapes = {f"model.layers.{i}.self_attn.qkv_proj": (128, 64) for i in range(LAYERS)}
    return replace(layout, fused=shapes) if fused else layout


def _assert_equal(found: CompactLayers, wanted: CompactLayers) -> None:
    assert list(found) == list(wanted)
    for name in wanted:
        for one, other in zip(found[name], wanted[name], strict=True):
            assert (one is None) == (other is None), name
            for field, value in (vars(other) if other is not None else {}).items():
                here = getattr(one, field)
                if not isinstance(value, torch.Tensor):
                    assert here == value, (name, field)
                    continue
                assert here.dtype == value.dtype
                assert here.is_contiguous()
                assert torch.equal(here, value), (name, field)


@pytest.mark.parametrize(
    ("name", "of_file", "of_model", "ranks"),
    [
        ("lora", torch.float32, torch.bfloat16, 1),
        ("lora", torch.bfloat16, torch.bfloat16, 2),
        ("lora", torch.float32, torch.float16, 1),
        ("lora", torch.bfloat16, torch.float32, 1),
        *((name, torch.float16, torch.bfloat16, 2) for name in CONFIGS),
    ],
)
def test_the_second_of_a_structure_is_what_it_would_be_alone(pair, name, of_file, of_model, ranks):
    first, second = pair(name, of_file)
    loader = Loader(_layout(), ranks, ranks - 1, of_model)
    loader.examined(first)
    found = loader.planned(second)
    assert found is not None
    _assert_equal(found, Loader(_layout(), ranks, ranks - 1, of_model).examined(second))
    again = loader.planned(first)
    assert again is not None
    _assert_equal(again, Loader(_layout(), ranks, ranks - 1, of_model).examined(first))


def test_a_fused_module_shares_its_input_side(pair):
    paths = pair("rslora_some")
    for number, path in enumerate(paths):
        tensors = load_file(path / WEIGHTS)
        torch.manual_seed(number)
        edited: dict[str, torch.Tensor | None] = {}
        for key in [key for key in tensors if re.search(r"\.(q|v)_proj\.", key)]:
            edited[key] = None
            shape = (3, 64) if "lora_A" in key else (128, 3)
            edited[re.sub(r"\.(q|v)_proj\.", ".qkv_proj.", key)] = torch.randn(shape)
        edit_tensors(path, **edited)
        edit_config(path, target_modules=["qkv_proj", "down_proj"])
    loader = Loader(_layout(fused=True), ranks=2)
    loader.examined(paths[0])
    found = loader.planned(paths[1])
    assert found is not None
    _assert_equal(found, Loader(_layout(fused=True), ranks=2).examined(paths[1]))
    query, key, _ = found["model.layers.3.self_attn.qkv_proj"]
    assert query.down_RI is key.down_RI


def test_what_is_done_at_once_is_few_copies(pair):
    """Seven modules of two tensors each, whatever the number of layers."""
    loader = Loader(_layout())
    loader.examined(pair("flora")[0])
    (known,) = loader.plans._known.values()
    assert len(known.plan.moves) == 14


@pytest.mark.parametrize("changed", ["rank", "alpha", "a key", "a tensor less", "dtype"])
def test_another_structure_is_examined(pair, tmp_path, changed):
    first, second = pair("lora")
    match changed:
        case "rank":
            second = _save(replace(CONFIGS["lora"], r=5), tmp_path / "other", 2)
        case "alpha":
            edit_config(second, lora_alpha=10)
        case "a key":
            edit_config(second, use_dora=True)
        case "a tensor less":
            edit_tensors(second, **{next(iter(load_file(second / WEIGHTS))): None})
        case "dtype":
            _cast(second, torch.float16)
    loader = Loader(_layout())
    loader.examined(first)
    assert loader.planned(second) is None


def test_the_order_of_target_modules_is_no_structure(pair):
    first, second = pair("lora")
    edit_config(first, target_modules=ALL)
    edit_config(second, target_modules=ALL[::-1])
    loader = Loader(_layout())
    loader.examined(first)
    assert loader.planned(second) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_number_out_of_range_is_left_to_the_examination(pair, value):
    """3e38 is finite in the file and not in the model's float16."""
    first, second = pair("lora")
    name, tensor = list(load_file(second / WEIGHTS).items())[5]
    tensor[0, 0] = value
    edit_tensors(second, **{name: tensor})
    loader = Loader(_layout(), dtype=torch.float16)
    loader.examined(first)
    assert loader.planned(second) is None


def test_equal_input_sides_are_left_to_be_kept_once(pair):
    first, second = pair("flora")
    loader = Loader(_layout())
    shared = torch.randn(4, 64)
    sides = {name: shared.clone() for name in load_file(second / WEIGHTS) if re.search(r"[qkv]_proj\.flora_A", name)}
    edit_tensors(second, **sides)
    loader.examined(second)
    assert not loader.plans._known, "what is shared here need not be elsewhere"
    loader.examined(first)
    assert loader.planned(first) is not None
    assert loader.planned(second) is None


def test_other_terms_have_no_plan(pair):
    """What lora_bias adds is in no arena: another adapter's would be served."""
    path, _ = pair("unscaled")
    names = [name for name in load_file(path / WEIGHTS) if "lora_B" in name]
    edit_config(path, lora_bias=True)
    sizes = {"k_proj": 32, "up_proj": 96}
    edit_tensors(
        path, **{f"{name.removesuffix('weight')}bias": torch.randn(sizes[name.split(".")[-3]]) for name in names}
    )
    loader = Loader(_layout())
    loader.examined(path)
    assert not loader.plans._known


def test_plans_are_bounded(pair):
    loader = Loader(_layout())
    path, _ = pair("unscaled")
    for alpha in range(1, MOST_PLANS + 3):
        edit_config(path, lora_alpha=alpha)
        loader.examined(path)
    assert len(loader.plans._known) == MOST_PLANS
    assert loader.planned(path) is not None
    edit_config(path, lora_alpha=1)
    assert loader.planned(path) is None
