"""Experts as PEFT saves `target_parameters`: read as each expert's own layers, merged like PEFT, faults named."""

import copy
import itertools
from pathlib import Path

import peft
import pytest
import torch
import transformers
from formats_support import edit_config, edit_tensors, faults_of, save_peft_adapter
from safetensors.torch import load_file

from flora_vllm.adapter import ExpertsLayout, ModelLayout
from flora_vllm.formats.base_model import base_layout, open_base
from flora_vllm.formats.merge import merge_model
from flora_vllm.formats.reader import read_adapter

BOTH = ["experts.gate_up_proj", "mlp.experts.down_proj"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
OUTER = "base_model.model.model.layers.0.mlp.experts"
INNER = f"{OUTER}.base_layer"


class _Silent:
    def update(self, n: float | None = 1, /) -> None:
        del n


def _mixtral() -> transformers.PreTrainedModel:
    config = transformers.MixtralConfig(**SIZES, intermediate_size=12, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def _qwen3() -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=20, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


CONFIGS = {
    "both": peft.LoraConfig(r=3, lora_alpha=6, target_parameters=BOTH, target_modules=["q_proj"]),
    "down": peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"down_proj": 7},
        target_parameters=["mlp.experts.down_proj"],
    ),
    # What names modules of transformers 4 PEFT turns into parameters, `down_proj` too; two in one have twice the rank.
    "converted": peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]),
    "gate_up": peft.LoraConfig(r=1, lora_alpha=6, target_parameters=["experts.gate_up_proj"], target_modules=[]),
}


def test_an_alpha_pattern_too_slow_for_parameters_is_a_fault_of_each(tmp_path):
    save_peft_adapter(_qwen3(), copy.deepcopy(CONFIGS["gate_up"]), tmp_path)
    edit_config(tmp_path, alpha_pattern={"(.|..|...)+[#!]": 2})
    faults = faults_of(tmp_path)
    assert len(faults) == 2
    assert all("parameter 'model.layers." in fault and "takes too long" in fault for fault in faults)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(("make", "name"), [*itertools.product([_qwen3], CONFIGS), (_mixtral, "both")])
def test_they_merge_as_peft_merges_them(make, name, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "base")
    wanted = save_peft_adapter(model, copy.deepcopy(CONFIGS[name]), tmp_path / "adapter")
    base = open_base(str(tmp_path / "base"))
    adapter = read_adapter(tmp_path / "adapter", layout=base_layout(base))
    merge_model(base, adapter, tmp_path / "out", _Silent())
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert merged.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-6)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert any(not torch.equal(original[key], merged[key]) for key in merged if "experts" in key)


def _layout(number: int = 4, *, is_interleaved: bool = False) -> ModelLayout:
    shapes = {f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in range(2)}
    for layer in range(2):
        for expert in range(number):
            path = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes |= {f"{path}.gate_proj": (12, 16), f"{path}.up_proj": (12, 16), f"{path}.down_proj": (16, 12)}
    experts = ExpertsLayout(number, is_interleaved=is_interleaved)
    return ModelLayout(shapes, experts={f"model.layers.{i}.mlp.experts": experts for i in range(2)})


@pytest.fixture
def both(tmp_path: Path) -> Path:
    save_peft_adapter(_qwen3(), copy.deepcopy(CONFIGS["both"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_gate_and_up_may_alternate(both):
    file = load_file(both / "adapter_model.safetensors")
    up_ORE = file[f"{INNER}.lora_B.weight"].view(24, 3, 4)
    adapter = read_adapter(both, layout=_layout(is_interleaved=True))
    for i, part in enumerate(("gate_proj", "up_proj")):
        (term,) = adapter.modules[f"model.layers.0.mlp.experts.2.{part}"].terms
        assert torch.equal(term.up, up_ORE[i::2, :, 2])
        assert torch.equal(term.down, file[f"{INNER}.lora_A.weight"][6:9])


def test_without_the_model_gate_and_up_stay_together(both):
    modules = read_adapter(both).modules
    assert "model.layers.0.mlp.experts.3.gate_up_proj" in modules
    assert len(modules) == 2 + 2 * 4 * 2


def test_faults_are_named(both):
    edit_tensors(
        both,
        **{
            f"{OUTER}.lora_A.weight": None,
            f"{INNER}.lora_B.weight": torch.ones(23, 12),
            f"{INNER}.base_layer.lora_A.weight": torch.ones(12, 16),
        },
    )
    faults = "\n".join(faults_of(both, layout=_layout()))
    assert f"tensor '{OUTER}.lora_A.weight' is missing" in faults
    assert f"tensor '{INNER}.lora_B.weight' has shape (23, 12); the config and the base model allow (24" in faults
    assert "lies in no more parameters than gate_up_proj and down_proj" in faults


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        (_layout(8), "allow (24 (rank), 12 (in features))"),
        (ModelLayout(_layout().shapes), "parameter 'model.layers.0.mlp.experts.down_proj' is not in the base model"),
        (
            ModelLayout(_layout().shapes, refused={"model.layers.0.mlp.experts": "too hot"}),
            "parameter 'model.layers.0.mlp.experts.gate_up_proj' cannot be adapted: too hot",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(layout, fault, both):
    assert any(fault in found for found in faults_of(both, layout=layout))


def test_a_layer_left_out_is_a_fault(both):
    edit_tensors(both, **{f"{place}.lora_{part}.weight": None for place in (OUTER, INNER) for part in "AB"})
    wanted = "parameter 'model.layers.0.mlp.experts.gate_up_proj' is selected by target_parameters but has no tensors"
    assert wanted in faults_of(both, layout=_layout())


def test_other_parameters_are_refused(both):
    edit_config(both, target_parameters=["q_proj.weight"])
    assert any("'target_parameters' is ['q_proj.weight']" in fault for fault in faults_of(both))


def test_modules_of_experts_need_no_others_and_nothing_selects_parameters(tmp_path):
    """`gate_proj` and the like select the experts of files that hold them as modules, and of no others."""
    save_peft_adapter(_qwen3(), peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", target_modules=["q_proj", "gate_proj"], target_parameters=None)
    assert len(read_adapter(tmp_path / "adapter", layout=_layout()).modules) == 2
    one = "base_model.model.model.layers.0.mlp.experts.1.gate_proj"
    edit_tensors(
        tmp_path / "adapter", **{f"{one}.lora_A.weight": torch.ones(2, 16), f"{one}.lora_B.weight": torch.ones(12, 2)}
    )
    faults = faults_of(tmp_path / "adapter", layout=_layout())
    assert len(faults) == 7
    assert all("is selected by target_modules but has no tensors" in fault for fault in faults)


def _rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The adapter at `path` has these tensors of experts and no others, and says nothing of parameters."""
    old = [name for name in load_file(path / "adapter_model.safetensors") if ".experts" in name]
    edit_tensors(path, **{**dict.fromkeys(old), **{name: tensor.contiguous() for name, tensor in tensors.items()}})
    edit_config(path, target_parameters=None)


def _terms_of(path: Path, layout: ModelLayout | None) -> dict[str, torch.Tensor]:
    found = {}
    for name, terms in read_adapter(path, layout=layout).modules.items():
        (term,) = terms.terms
        found[name] = term.scale * term.up @ term.down
    return found


@pytest.mark.parametrize("has_axis", [False, True])
@pytest.mark.parametrize("layout", [_layout(), _layout(is_interleaved=True), None])
def test_tensors_of_both_parameters_need_no_target_parameters(layout, has_axis, both):
    """As vLLM reads them by their names; with an axis for the experts, too."""
    wanted = _terms_of(both, layout)
    file = {n: t for n, t in load_file(both / "adapter_model.safetensors").items() if ".experts" in n}
    if has_axis:
        file = {n: t.view(4, 3, -1) if "lora_A" in n else t.view(-1, 3, 4) for n, t in file.items()}
    _rewrite(both, file)
    found = _terms_of(both, layout)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_of_the_two_alone_is_not_guessed(both):
    file = load_file(both / "adapter_model.safetensors")
    _rewrite(both, {name: t for name, t in file.items() if name.startswith(f"{OUTER}.lora")})
    assert any("'model.layers.0.mlp.experts' is not in the base model" in f for f in faults_of(both, layout=_layout()))


def _stacked(shared: tuple[str, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Name -> tensor of layer 0's projections, of 4 experts but where they share it (`w1.A`)."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"w1": (12, 16), "w3": (12, 16), "w2": (16, 12)}
    shapes = {f"{w}.{s}": ((3, i) if s == "A" else (o, 3)) for w, (o, i) in sizes.items() for s in "AB"}
    return {
        f"{OUTER}.{key[:2]}.lora_{key[-1]}.weight": torch.randn(1 if key in shared else 4, *shape, generator=g)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("shared", [("w1.A", "w3.A", "w2.B"), (), ("w2.A", "w2.B")])
@pytest.mark.parametrize("has_layout", [True, False])
def test_projections_of_all_experts_may_share_a_side(has_layout, shared, both):
    file = _stacked(shared)
    _rewrite(both, file)
    found = _terms_of(both, _layout() if has_layout else None)
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for key, name in names.items():
        a, b = (file[f"{OUTER}.{key}.lora_{side}.weight"] for side in "AB")
        products = (2 * b @ a).expand(4, -1, -1)
        for i in range(4 if has_layout else max(len(a), len(b))):
            product = found[f"model.layers.0.mlp.experts.{i}.{name if has_layout else key}"]
            torch.testing.assert_close(product, products[i])


def test_faults_of_stacked_projections_are_named(both):
    file = _stacked(("w1.A",))
    name = f"{OUTER}.{{}}.weight".format
    file[name("w1.lora_B")] = file[name("w1.lora_B")][:3]
    del file[name("w2.lora_A")]
    file[name("w3.lora_A")] = file[name("w3.lora_A")][0]
    _rewrite(both, file)
    faults = "\n".join(faults_of(both, layout=_layout()))
    assert f"'{name('w1.lora_B')}' has shape (3, 12, 3); the config and the base model allow (4, 12 (out" in faults
    assert f"tensor '{name('w2.lora_A')}' is missing" in faults
    assert f"'{name('w3.lora_A')}' has shape (3, 16); the config and the base model allow (4, 3, 16 (in" in faults
    _rewrite(both, {**_stacked(()), name("w1.lora_B"): torch.ones(3, 12, 3)})
    assert any("disagree about the number of experts" in fault for fault in faults_of(both))
    _rewrite(both, {**_stacked(()), name("w1.lora_B"): torch.tensor(1.0)})
    assert any(f"'{name('w1.lora_B')}' has shape ()" in fault for fault in faults_of(both))
    as_parameters = {f"{place}.lora_{s}.weight": torch.ones(12, 16) for place in (OUTER, INNER) for s in "AB"}
    as_parameters |= {f"{OUTER}.lora_A.weight": torch.ones(12, 12), f"{INNER}.lora_B.weight": torch.ones(24, 12)}
    as_parameters[f"{OUTER}.lora_B.weight"] = torch.ones(16, 12)
    _rewrite(both, {**_stacked(()), **as_parameters})
    assert any("has tensors of its own and in" in fault for fault in faults_of(both, layout=_layout()))
