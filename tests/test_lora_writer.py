"""`convert --to-lora`: PEFT's forward of the LoRA that was written is its forward of the adapter it came from."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from families_support import fill_normal, save_filled
from formats_support import linear_layout, tiny_model

from flora_vllm.commands.cli import main
from flora_vllm.formats import read_adapter
from flora_vllm.terms import Added

torch.set_num_threads(1)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adalora() -> peft.PeftConfig:
    return peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, total_step=9, target_modules=LINEAR)


CASES = {
    "pissa": ("llama", lambda: peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"), 8),
    "kasa-biases": ("qwen2", lambda: peft.LoraConfig(r=3, target_modules=LINEAR, kasa_config=peft.KasaConfig()), 6),
    "lora_bias": ("qwen2", lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], lora_bias=True), 3),
    "bias-all": ("qwen2", lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], bias="all"), 3),
    "adalora": ("llama", adalora, 4),
    "psoft": ("llama", lambda: peft.PsoftConfig(r=6, target_modules=LINEAR), 6),
    "osf-dense": ("llama", lambda: peft.OSFConfig(target_modules=["q_proj", "down_proj"], effective_rank=60), 8),
    "miss-bat": ("llama", lambda: peft.MissConfig(r=8, target_modules=["q_proj"], init_weights="bat"), 64),
    "conv1d": (
        "gpt2",
        lambda: peft.LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True),
        8,
    ),
}


def logits_of(architecture: str, path: Path) -> torch.Tensor:
    tokens = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(tiny_model(architecture), str(path)).eval()(tokens).logits


@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("case", CASES)
def test_converted_does_the_same(case: str, tmp_path: Path) -> None:
    architecture, config, rank = CASES[case]
    model = tiny_model(architecture)
    model.save_pretrained(str(tmp_path / "model"))
    save_filled(tiny_model(architecture), config(), tmp_path / "adapter", lambda n, p: fill_normal(n, p, 0.2))
    arguments = [str(tmp_path / name) for name in ("model", "adapter", "lora")]
    assert main(["convert", "--to-lora", *arguments]) == 0
    adapter = read_adapter(tmp_path / "lora", layout=linear_layout(model))
    assert (adapter.family, adapter.rank) == ("LORA", rank)
    assert all(term.scale == 1 for terms in adapter.modules.values() for term in terms.of(Added))
    wanted = logits_of(architecture, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(architecture, tmp_path / "lora"), wanted, rtol=0, atol=2e-5)


def test_a_task_is_converted_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(str(tmp_path / "model"))
    config = peft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"])
    save_filled(tiny_model("llama"), config, tmp_path / "poly")
    base, poly, out = (str(tmp_path / name) for name in ("model", "poly", "lora"))
    assert main(["convert", "--to-lora", base, poly, out]) == 1
    assert "it has 2 tasks" in capsys.readouterr().err
    assert main(["convert", "--to-lora", base, f"{poly}#1", out]) == 0
    assert read_adapter(out).rank == 2


def test_what_lora_cannot_say_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(str(tmp_path / "model"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    save_filled(tiny_model("llama"), config, tmp_path / "dora")
    arguments = [str(tmp_path / name) for name in ("model", "dora", "lora")]
    assert main(["convert", "--to-lora", *arguments]) == 1
    assert "its Gain is more than LoRA can say" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


def test_a_familys_caution_is_told(tmp_path: Path) -> None:
    """As a user sees it: nothing configures logging for the command."""
    tiny_model("llama").save_pretrained(str(tmp_path / "model"))
    told = {}
    for name, config in (
        ("psoft", peft.PsoftConfig(r=2, target_modules=["q_proj"])),
        ("hra", peft.HRAConfig(r=2, target_modules=["q_proj"])),
    ):
        save_filled(tiny_model("llama"), config, tmp_path / name)
        command = [sys.executable, "-m", "flora_vllm.commands.cli", "convert", "--to-lora"]
        folders = [str(tmp_path / part) for part in ("model", name, f"{name}-lora")]
        done = subprocess.run([*command, *folders], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told[name] = done.stderr
    assert f"adapter {tmp_path / 'psoft'} is PSOFT" in told["psoft"]
    assert "signs" in told["psoft"]
    assert " is HRA" not in told["hra"]
