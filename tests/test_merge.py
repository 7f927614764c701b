"""`flora-vllm merge`: the written checkpoint is PEFT's own merge, for every family, layout and sharding."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from formats_support import save_peft_adapter, tiny_model
from peft import HiraConfig, IA3Config, LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from flora_vllm.commands.cli import main
from flora_vllm.errors import AdapterError
from flora_vllm.formats import write_flora
from flora_vllm.terms import Added, Gain, Product, merged

torch.set_num_threads(1)

# Float32 on both sides, at most 8 products summed, values below 50: (8 + 4) half-ulps of 50 are 4e-5.
TOLERANCE = 4e-5


def merge(base: Path, adapter: Path, out: Path) -> int:
    return main(["merge", str(base), str(adapter), str(out)])


def loaded_state(path: Path) -> dict[str, torch.Tensor]:
    model, report = cast(tuple, AutoModelForCausalLM.from_pretrained(path, output_loading_info=True))
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.state_dict()


CASES: dict[str, tuple[str, PeftConfig]] = {
    "lora": ("llama", LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "down_proj"])),
    "lora-fused": ("phi3", LoraConfig(r=4, target_modules=["qkv_proj", "gate_up_proj"])),
    "lora-conv1d": ("gpt2", LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "lora-gpt-bigcode": ("gpt_bigcode", LoraConfig(r=8, target_modules=["c_attn"])),
    "ia3": ("llama", IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3-bias": ("qwen2", IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=[])),
    "ia3-conv1d": ("gpt2", IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)),
    "lora-saved": ("llama", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "up_proj"])),
    "hira": ("qwen2", HiraConfig(r=4, target_modules=["q_proj", "up_proj"])),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_equals_pefts(case: str, tmp_path: Path, capsys) -> None:
    architecture, config = CASES[case]
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    wanted = save_peft_adapter(model, config, tmp_path / "adapter")

    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0

    assert "merged" in capsys.readouterr().out
    merged = loaded_state(tmp_path / "out")
    assert set(merged) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, atol=TOLERANCE, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def flora_for(model: PreTrainedModel, path: Path, **options) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Rank 2 on every query, rank 3 on every down projection."""
    torch.manual_seed(3)
    pairs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("q_proj", "down_proj")):
            rank = 2 if name.endswith("q_proj") else 3
            pairs[name] = (torch.randn(rank, module.in_features), torch.randn(module.out_features, rank))
    write_flora(path, pairs, **options)
    return pairs


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_flora_sharded_and_tied(reduction: str, tmp_path: Path) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    pairs = flora_for(model, tmp_path / "adapter", reduction=reduction)

    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0

    merged = loaded_state(tmp_path / "out")
    for name, tensor in base.items():
        if (pair := pairs.get(name.removesuffix(".weight"))) is None:
            assert torch.equal(merged[name], tensor), name
        else:
            scale = 1 / len(pair[0]) if reduction == "mean" else 1
            torch.testing.assert_close(merged[name], scale * tensor * (pair[1] @ pair[0]), atol=TOLERANCE, rtol=1e-6)


def test_dtype_is_kept_and_rounded_once(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "base")
    pairs = flora_for(model, tmp_path / "adapter", reduction="sum")
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    merged, base = (load_file(tmp_path / side / "model.safetensors") for side in ("out", "base"))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for module, (a_RI, b_OR) in pairs.items():
        wanted = (base[f"{module}.weight"].float() * (b_OR @ a_RI)).to(torch.bfloat16)
        assert torch.equal(merged[f"{module}.weight"], wanted)


def test_only_what_serving_needs_is_copied(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE"):
        (tmp_path / "base" / name).write_text(f"the {name}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json", "README.md"):
        (tmp_path / "base" / name).write_text("not merged")
    flora_for(model, tmp_path / "adapter")
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors"}
    assert names == wanted | {"tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the tokenizer.json"


def test_a_checkpoint_without_its_head(tmp_path: Path) -> None:
    """Hub checkpoints such as gpt2 name `h.0…` what the full model calls `transformer.h.0…`."""
    model = tiny_model("gpt2")
    cast(PreTrainedModel, model.base_model).save_pretrained(tmp_path / "base")
    wanted = save_peft_adapter(model, LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True), tmp_path / "a")
    assert merge(tmp_path / "base", tmp_path / "a", tmp_path / "out") == 0
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[f"transformer.{name}"], atol=TOLERANCE, rtol=1e-6)


def refused(tmp_path: Path, capsys, out: str = "out") -> str:
    before = sorted(tmp_path.rglob("*"))
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / out) == 1
    assert sorted(tmp_path.rglob("*")) == before
    return capsys.readouterr().err


def test_refusals(tmp_path: Path, capsys) -> None:
    assert "not a directory" in refused(tmp_path, capsys)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    assert "does not exist" in refused(tmp_path, capsys)
    flora_for(model, tmp_path / "adapter")
    assert "exists and is not an empty directory" in refused(tmp_path, capsys, out="base")

    config = tmp_path / "base" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "quantization_config": {"quant_method": "awq"}}))
    assert "quantised" in refused(tmp_path, capsys)
    config.write_text("{")
    assert "not valid JSON" in refused(tmp_path, capsys)
    config.write_text(text)

    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, weights)
    assert f"tensor '{name}' of the base model has dtype I8" in refused(tmp_path, capsys)
    save_file({**tensors, name: torch.full_like(tensors[name], torch.inf)}, weights)
    assert f"merging tensor '{name}' gives NaN or Inf" in refused(tmp_path, capsys)
    save_file({**tensors, name: torch.ones(8, 8)}, weights)
    assert "allow (8 (out features), 2 (rank))" in refused(tmp_path, capsys)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated" in refused(tmp_path, capsys)
    weights.rename(tmp_path / "base" / "pytorch_model.bin")
    assert "only safetensors is read" in refused(tmp_path, capsys)
    (tmp_path / "base" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    assert "no usable weight_map" in refused(tmp_path, capsys)


def test_an_empty_directory_may_be_the_target(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    flora_for(model, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_all_terms_together() -> None:
    """g ∘ [(s_h B A + 1) ∘ W + s_l U V] and h ∘ bias, with every part present, against the formula in float64."""
    torch.manual_seed(0)
    weight, bias, gain = torch.randn(5, 3).double(), torch.randn(5).double(), torch.randn(5).double()
    a_RI, b_OR, down, up = (torch.randn(*shape).double() for shape in ((2, 3), (5, 2), (4, 3), (5, 4)))
    terms = (Product(), Product(a_RI, b_OR, 0.5), Added(down, up, 3.0), Gain(gain, scales_bias=True))
    merged_weight, merged_bias = merged(weight, bias, terms)
    wanted = torch.diag(gain) @ (weight * (0.5 * b_OR @ a_RI + 1) + 3.0 * up @ down)
    torch.testing.assert_close(merged_weight, wanted)
    torch.testing.assert_close(merged_bias, gain * bias)
    unscaled = merged(weight, bias, (Gain(gain, scales_bias=False),))[1]
    assert unscaled is not None
    assert torch.equal(unscaled, bias)
    with pytest.raises(AdapterError, match="do not fit"):
        merged(weight.T, None, terms)
