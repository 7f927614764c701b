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
