"""Rotations, gains and biases from the files that PEFT saves: our merged weights give the logits of its forward."""

from pathlib import Path

import peft
import pytest
import torch
from families_support import fill_normal, worst_errors
from formats_support import edit_config, edit_tensors, linear_layout, save_peft_adapter, the_fault, tiny_model

from flora_vllm.formats import read_adapter

torch.set_num_threads(1)

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def oft(targets=LINEAR, **changes) -> peft.OFTConfig:
    return peft.OFTConfig(**{"r": 0, "oft_block_size": 16, "target_modules": targets, **changes})


def boft(targets=LINEAR, **changes) -> peft.BOFTConfig:
    return peft.BOFTConfig(**{"boft_block_size": 4, "target_modules": targets, **changes})


def road(variant: str, group: int, targets=LINEAR) -> peft.RoadConfig:
    return peft.RoadConfig(variant=variant, group_size=group, target_modules=targets)


def glora(weights="lora", coupled="lora", biases="constant", targets=LINEAR, **changes) -> peft.GloraConfig:
    paths = {"config_A_B": weights, "config_C": coupled, "config_D_E": biases}
    return peft.GloraConfig(r=3, target_modules=targets, **paths, **changes)


def _fill(name: str, parameter: torch.Tensor) -> None:
    # Gains stay around 1: of 0 nothing is left to compare.
    fill_normal(name, parameter)
    if "boft_s" in name or "road_alpha" in name:
        parameter.add_(1.0)
    if "oft_R" in name and parameter.shape[1] > 200:
        # Of large blocks the powers of so large a map would be all that is left.
        parameter.mul_(0.2)


# name -> (architecture, config)
_CASES = {
    "oft": ("llama", oft()),
    "oft-bias-all": ("qwen2", oft(bias="all", targets=["q_proj", "down_proj"])),
    "oft-bias-only": ("qwen2", oft(bias="oft_only", targets=["q_proj", "down_proj"])),
    "oft-fused": ("phi3", oft(FUSED)),
    "oft-count": ("llama", oft(r=4, oft_block_size=0)),
    "oft-adjusted": ("llama", oft(oft_block_size=20)),
    "oft-exact": ("qwen2", oft(use_cayley_neumann=False)),
    "oft-2-terms": ("llama", oft(num_cayley_neumann_terms=2)),
    "oft-3-terms": ("llama", oft(num_cayley_neumann_terms=3)),
    "oft-4-terms": ("llama", oft(num_cayley_neumann_terms=4)),
    "oft-9-terms": ("llama", oft(num_cayley_neumann_terms=9)),
    "oft-share": ("llama", oft(block_share=True)),
    "oft-coft": ("llama", oft(coft=True, eps=0.5)),
    "oft-coft-share-exact": ("qwen2", oft(coft=True, eps=0.9, block_share=True, use_cayley_neumann=False)),
    "oft-layer": ("llama", oft(layers_to_transform=[1])),
    "boft": ("llama", boft()),
    "boft-bias": ("qwen2", boft(bias="boft_only")),
    "boft-fused": ("phi3", boft(FUSED)),
    "boft-count": ("qwen2", boft(boft_block_size=0, boft_block_num=8)),
    "boft-2-stages": ("llama", boft(boft_n_butterfly_factor=2)),
    "boft-3-stages": ("qwen2", boft(boft_n_butterfly_factor=3, boft_block_size=8)),
    "road-1": ("llama", road("road_1", 16)),
    "road-1-bias": ("qwen2", road("road_1", 32)),
    "road-2": ("qwen2", road("road_2", 32)),
    "road-4": ("qwen2", road("road_4", 8)),
    "road-4-fused": ("phi3", road("road_4", 16, FUSED)),
    "glora": ("llama", glora()),
    "glora-bias": ("qwen2", glora()),
    "glora-vector": ("qwen2", glora("vector", "vector", "vector")),
    "glora-constant": ("qwen2", glora("constant", "none", "constant")),
    "glora-no-weight": ("qwen2", glora("none", "lora", "vector")),
    "glora-no-bias": ("qwen2", glora("lora", "none", "none")),
    "glora-fused": ("phi3", glora("vector", "vector", "vector", targets=FUSED)),
    "beft": ("qwen2", peft.BeftConfig(target_modules=["q_proj", "k_proj", "v_proj"])),
}
CASES = {name: (*case, _fill) for name, case in _CASES.items()}


class _BlockDiagonal:
    """The one operation of the CUDA extension without which PEFT makes one butterfly stage of many."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


@pytest.fixture(autouse=True)
def _many_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "_FBD_CUDA", _BlockDiagonal)


# A block size that does not divide the layer is moved to one that does.
@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts_forward(case: str, tmp_path: Path, record_property) -> None:
    architecture, config, fill = CASES[case]
    error, effect = worst_errors(config, tmp_path, architecture, fill)
    record_property("error", error)
    assert effect > 0.01, "the adapter must do something"
    assert error < 1e-4
    assert error < 0.01 * effect


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

# name -> (config, changes of the config file, changes of the tensors, what the fault says)
FAULTS = {
    "oft-old": (oft(), {"peft_version": "0.17.1"}, {}, "'peft_version' is '0.17.1'; allowed: 0.18 or later"),
    "oft-unversioned": (oft(), {"peft_version": ...}, {}, "key 'peft_version' is missing"),
    "oft-older": (oft(), {"oft_block_size": ...}, {}, "key 'oft_block_size' is missing"),
    "oft-form": (oft(), {"use_cayley_neumann": ...}, {}, "key 'use_cayley_neumann' is missing"),
    "oft-triangle": (oft(), {}, {"oft_R.weight": (4, 119)}, "119 columns, which are no triangle"),
    "oft-size": (oft(), {}, {"oft_R.weight": (3, 120)}, "(any, 48) do not fit a weight of shape (64, 64)"),
    "oft-not-shared": (oft(), {"block_share": True}, {}, "with block_share it must be one whose size divides 64"),
    "boft-stages": (boft(), {}, {"boft_R": (2, 16, 4, 4)}, "a config with boft_n_butterfly_factor 1 allows"),
    "road-variant": (road("road_1", 16), {"variant": "road_3"}, {}, "'variant' is 'road_3'; allowed: 'road_1'"),
    "road-group": (road("road_1", 16), {"group_size": 48}, {}, "of road_1, fill groups of 48 outputs"),
    "glora-zeros": (glora("none"), {}, {"glora_A.zeros": (64, 64)}, "has values other than 0"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_served_is_refused(case: str, tmp_path: Path) -> None:
    config, changes, tensors, message = FAULTS[case]
    config.target_modules = {"model.layers.0.self_attn.q_proj"}
    save_peft_adapter(tiny_model("llama"), config, tmp_path)
    layout = linear_layout(tiny_model("llama"))
    read_adapter(tmp_path, layout=layout)
    edit_config(tmp_path, **changes)
    edit_tensors(tmp_path, **{f"{Q0}.{name}": torch.ones(shape) for name, shape in tensors.items()})
    assert message in the_fault(tmp_path, layout=layout)
