"""What `inspect --plot` draws: sizes and spectra, computed by hand for small matrices, and a picture that is there."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flora_vllm.commands.plot import draw, measure
from flora_vllm.errors import ConfigError
from flora_vllm.formats import write_flora

NAME = "model.layers.3.mlp.up_proj"


def test_flora_is_measured_by_its_change_of_the_weights(tmp_path: Path) -> None:
    down, up = torch.rand(2, 5) + 0.5, torch.rand(7, 2) + 0.5
    path = write_flora(tmp_path / "a", {NAME: (down, up)}, reduction="mean")
    (size,) = measure({"peft_type": "FLORA"}, path / "adapter_model.safetensors")
    change = (up @ down / 2 - 1).double()
    assert (size.layer, size.module) == (3, "up_proj")
    assert size.norm == pytest.approx(float(change.square().mean().sqrt()), rel=1e-5)
    assert size.spectrum == pytest.approx(torch.linalg.svdvals(change)[:3].tolist(), rel=1e-4, abs=1e-6)


def test_the_identity_has_no_size(tmp_path: Path) -> None:
    path = write_flora(tmp_path / "a", {NAME: (torch.ones(1, 5), torch.ones(7, 1))})
    (size,) = measure({"peft_type": "FLORA"}, path / "adapter_model.safetensors")
    assert size.norm == pytest.approx(0, abs=1e-9)


def test_lora_and_others(tmp_path: Path) -> None:
    down, up = torch.randn(2, 5), torch.randn(7, 2)
    tensors = {f"base_model.model.{NAME}.lora_A.weight": down, f"base_model.model.{NAME}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    (size,) = measure({"peft_type": "LORA", "lora_alpha": 4}, tmp_path / "lora.safetensors")
    assert size.norm == pytest.approx(float((2 * up @ down).norm()), rel=1e-5)
    save_file({"base_model.model.lm_head.ia3_l": torch.full((4, 1), 3.0)}, tmp_path / "ia3.safetensors")
    (size,) = measure({"peft_type": "IA3"}, tmp_path / "ia3.safetensors")
    assert (size.layer, size.module, size.spectrum) == (-1, "lm_head", ())
    assert size.norm == pytest.approx(6)
    assert not math.isnan(size.norm)


def test_loras_scale_is_the_modules_own(tmp_path: Path) -> None:
    down, up = torch.randn(2, 5), torch.randn(7, 2)
    tensors = {}
    for name in (NAME, "model.layers.3.mlp.down_proj"):
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": {"up_proj": 64}}
    norms = {size.module: size.norm for size in measure(config, tmp_path / "lora.safetensors")}
    assert norms["up_proj"] == pytest.approx(float((32 * up @ down).norm()), rel=1e-5)
    assert norms["down_proj"] == pytest.approx(float((2 * up @ down).norm()), rel=1e-5)


@pytest.mark.parametrize(("out", "words"), [("a.xyz", "supported formats"), ("nowhere/a.png", "No such file")])
def test_a_picture_that_cannot_be_written_is_told(out: str, words: str, tmp_path: Path) -> None:
    adapter = write_flora(tmp_path / "a", {NAME: (torch.rand(2, 5), torch.rand(7, 2))})
    with pytest.raises(ConfigError, match=rf"--plot .*{out} can't be drawn: .*{words}"):
        draw(adapter, tmp_path / out)


def test_a_picture_is_written(tmp_path: Path) -> None:
    factors = {f"model.layers.{i}.mlp.up_proj": (torch.rand(2, 5), torch.rand(7, 2)) for i in range(3)}
    out = draw(write_flora(tmp_path / "a", factors), tmp_path / "a.png")
    assert out.read_bytes()[:4] == b"\x89PNG"
