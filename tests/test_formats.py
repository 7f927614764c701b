"""Adapters saved by PEFT itself, read back: the canonical form merged into the base is PEFT's own merge."""

from pathlib import Path

import peft.tuners.tuners_utils
import pytest
import torch
from formats_support import edit_config, linear_layout, save_peft_adapter, tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import HiraConfig, IA3Config, LoraConfig, PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from flora_vllm.adapter import Adapter
from flora_vllm.errors import AdapterError
from flora_vllm.formats import FAMILIES, content_digest, read_adapter, write_flora
from flora_vllm.formats.matching import Targets, match_pattern
from flora_vllm.terms import Added, Product, merged
from flora_vllm.training import FloraConfig

torch.set_num_threads(1)

# Float32 on both sides, at most 8 products summed, values below 50: (8 + 4) half-ulps of 50 are 4e-5.
TOLERANCE = 4e-5

ATTENTION = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, PeftConfig]] = {
    "lora": ("llama", LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION)),
    "lora-rslora-patterns": (
        "qwen2",
        LoraConfig(
            r=4,
            lora_alpha=3,
            use_rslora=True,
            target_modules=[*ATTENTION, "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 5},
            alpha_pattern={"^model.layers.0.self_attn.v_proj": 7, "q_proj": 0.5},
        ),
    ),
    "lora-regex": ("llama", LoraConfig(r=2, target_modules=r".*\.layers\.1\..*(k|up)_proj")),
    "lora-all-linear": ("qwen2", LoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian")),
    "lora-layers": (
        "llama",
        LoraConfig(r=1, target_modules=["gate_proj", "o_proj"], layers_to_transform=[1], layers_pattern="layers"),
    ),
    "lora-exclude": (
        "llama",
        LoraConfig(r=3, target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    ),
    "lora-fused": ("phi3", LoraConfig(r=4, target_modules=["qkv_proj", "gate_up_proj"])),
    "lora-conv1d": ("gpt2", LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "lora-gpt-bigcode": ("gpt_bigcode", LoraConfig(r=4, target_modules=["c_attn"])),
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3-bias": ("qwen2", IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])),
    "ia3-regex": ("qwen2", IA3Config(target_modules=r".*(q|up)_proj", feedforward_modules=r".*mlp.*")),
    "ia3-conv1d": (
        "gpt2",
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
    "hira": ("llama", HiraConfig(r=4, target_modules=[*ATTENTION, "up_proj"])),
    "hira-bias-rank-pattern": ("qwen2", HiraConfig(r=4, target_modules=ATTENTION, rank_pattern={"q_proj": 2})),
    "flora": ("llama", FloraConfig(r=3, target_modules=[*ATTENTION, "down_proj"], init_weights=False)),
    "flora-sum-rank-pattern": (
        "qwen2",
        FloraConfig(r=4, reduction="sum", target_modules="all-linear", rank_pattern={"q_proj": 2}),
    ),
    "hira-conv1d": ("gpt2", HiraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_canonical_form_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    architecture, config = CASES[case]
    model = tiny_model(architecture)
    layout = linear_layout(model)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = save_peft_adapter(model, config, tmp_path)

    adapter = read_adapter(tmp_path, layout=layout)

    state = merged_state(base, adapter, stores_in_out=architecture == "gpt2")
    assert adapter.family == case.partition("-")[0].upper()
    assert {name for name, tensor in wanted.items() if not torch.equal(tensor, base[name])} >= {
        f"{module}.weight" for module in adapter.modules
    }
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name], tensor, atol=TOLERANCE, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def merged_state(
    base: dict[str, torch.Tensor], adapter: Adapter, stores_in_out: bool = False
) -> dict[str, torch.Tensor]:
    state = dict(base)
    for module, terms in adapter.modules.items():
        weight, bias = base[f"{module}.weight"], base.get(f"{module}.bias")
        new_weight, new_bias = merged(weight.T if stores_in_out else weight, bias, terms.terms)
        state[f"{module}.weight"] = new_weight.T if stores_in_out else new_weight
        if new_bias is not None:
            state[f"{module}.bias"] = new_bias
    return state


Pair = tuple[torch.Tensor, torch.Tensor]


def random_pair(rank: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> Pair:
    return torch.randn(rank, inputs).to(dtype), torch.randn(outputs, rank).to(dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flora_round_trip(reduction: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pairs = {f"model.layers.{i}.self_attn.q_proj": random_pair(rank, 6, 5, dtype) for i, rank in enumerate((2, 5, 2))}

    write_flora(tmp_path / "a", pairs, reduction=reduction, base_model="some/base")
    adapter = read_adapter(tmp_path / "a")

    assert (adapter.family, adapter.rank, adapter.base_model) == ("FLORA", 5, "some/base")
    assert adapter.nbytes == sum(t.numel() * dtype.itemsize for pair in pairs.values() for t in pair)
    assert list(adapter.modules) == sorted(pairs)
    weight = torch.randn(5, 6)
    for module, (a_RI, b_OR) in pairs.items():
        terms = adapter.modules[module]
        (product,) = terms.of(Product)
        assert product.input is not None
        assert torch.equal(product.input, a_RI)
        scale = 1 / len(a_RI) if reduction == "mean" else 1
        wanted = scale * weight.double() * (b_OR.double() @ a_RI.double())
        torch.testing.assert_close(merged(weight, None, terms.terms)[0].double(), wanted, atol=1e-5, rtol=1e-5)


def test_digest_is_that_of_the_bytes_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pairs = {"m.q_proj": random_pair(2, 4, 4)}
    write_flora(tmp_path / "a", pairs)
    write_flora(tmp_path / "b", pairs)
    digest = content_digest(tmp_path / "a")
    assert digest == content_digest(tmp_path / "b") == read_adapter(tmp_path / "b").digest
    assert len(digest) == 64
    edit_config(tmp_path / "b", revision="other")
    assert content_digest(tmp_path / "b") != digest
    write_flora(tmp_path / "a", {"m.q_proj": random_pair(2, 4, 4)})
    assert content_digest(tmp_path / "a") != digest


def test_writer_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = ({"m.q_proj": random_pair(rank, 4, 4)} for rank in (1, 2))
    write_flora(tmp_path / "a", first)
    write_flora(tmp_path / "a", second)
    assert read_adapter(tmp_path / "a").rank == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="holds more than"):
        write_flora(tmp_path / "a", first)
    assert read_adapter(tmp_path / "a").rank == 2


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ({"m.q": (torch.ones(2, 4), torch.ones(4, 3))}, {}, "rank"),
        ({"m.q": (torch.full((1, 4), torch.nan), torch.ones(4, 1))}, {}, "4 NaN or Inf"),
        ({"m.q": (torch.ones(1, 4, dtype=torch.float64), torch.ones(4, 1))}, {}, "F64"),
        ({"m.q": (torch.ones(1, 4), torch.ones(4, 1))}, {"reduction": "max"}, "'mean' or 'sum'"),
        ({"m.q": (torch.ones(1, 4), torch.ones(4, 1))}, {"target_modules": ["k"]}, "does not select"),
        ({}, {}, "no modules"),
    ],
)
def test_writer_refuses_what_could_not_be_read(pairs: dict, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        write_flora(tmp_path / "a", pairs, **options)
    assert not list(tmp_path.iterdir())


# One config of each PEFT class as it is saved by default: PEFT adding a field must be noticed here.
@pytest.mark.parametrize(
    "config", [FloraConfig(), LoraConfig(), IA3Config(), HiraConfig()], ids=lambda config: config.peft_type.value
)
def test_every_default_of_peft_is_known_and_accepted(config: PeftConfig) -> None:
    assert isinstance(config.peft_type, PeftType)
    keys = FAMILIES[config.peft_type.value].keys
    found = {k: v for k, v in config.to_dict().items() if k not in ("target_modules", "feedforward_modules")}
    assert set(found) <= set(keys)
    refused = {name for name, value in found.items() if not keys[name].check(getattr(value, "value", value))}
    assert not refused


def test_scale_and_gain_of_each_family(tmp_path: Path) -> None:
    """Literal numbers: a wrong scale that cancels in the merge test would show here."""
    model = tiny_model("llama")
    save_peft_adapter(model, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=ATTENTION), tmp_path)
    terms = read_adapter(tmp_path).modules["model.layers.0.self_attn.q_proj"]
    assert [low.scale for low in terms.of(Added)] == [3.0]
    assert (terms.in_features, terms.out_features) == (64, 64)
    identity = merged(torch.eye(3), torch.ones(3), ())
    assert torch.equal(identity[0], torch.eye(3))


MODULES = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.gate")]
MODULES += ["model.layers.1.experts.2.q_proj", "layers.1.q_proj", "q_proj", "model.h.1.mlp.q_proj"]
names = st.sampled_from(["q_proj", "gate", "mlp.gate", "proj", "model.layers.1.self_attn.q_proj", "layers.2.mlp.gate"])
regexes = st.sampled_from([".*q_proj", r"model\.layers\.[01]\..*", "q_proj", ".*", r".*\.mlp\..*"])
name_lists = st.lists(names, min_size=1, max_size=3)
layer_choice = st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2)
patterns = st.none() | st.sampled_from(["layers", "h", "experts"]) | st.lists(st.sampled_from(["h", "layers"]))


@settings(max_examples=300, deadline=None)
@example(["q_proj"], None, 1, "layers", None)
@example(["q_proj"], None, [1], None, None)
@example(["q_proj", "model.layers.1.self_attn.q_proj"], None, [2], "experts", None)
@example(".*", None, None, None, ["mlp", "1|2"])
@given(
    name_lists | regexes,
    st.none() | name_lists | regexes,
    layer_choice,
    patterns,
    st.none() | st.lists(names | regexes, max_size=2),
)
def test_targets_match_as_in_peft(target: list | str, exclude: list | str | None, layers, pattern, whole) -> None:
    if isinstance(target, str):
        layers = pattern = None
    elif not layers and layers != 0:
        pattern = None
    config = LoraConfig(
        target_modules=target,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=pattern,
        modules_to_save=whole,
    )
    targets = Targets(target, exclude, layers, pattern, whole)
    for module in MODULES:
        wanted = peft.tuners.tuners_utils.check_target_module_exists(config, module)
        assert targets.select(module) == bool(wanted), module


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names | regexes, st.integers(1, 9), max_size=3))
def test_patterns_match_as_in_peft(pattern: dict[str, int]) -> None:
    for module in MODULES:
        assert match_pattern(pattern, module, 99) == pattern.get(get_pattern_key(list(pattern), module), 99)
