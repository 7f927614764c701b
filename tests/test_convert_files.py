"""`flora-vllm convert --repair` and `--pickle`: what trainers and others write, made servable and nothing lost."""

import json
from pathlib import Path

import peft
import pytest
import torch
from families_support import save_filled
from formats_support import edit_config, save_peft_adapter, the_fault, tiny_model
from safetensors.torch import load_file, save_file
from test_families_authors import LAYOUT, Q, V, check, lora, mtl_output, mtl_tensors, output, random
from transformers import CLIPConfig, CLIPModel

from flora_vllm.commands.cli import main
from flora_vllm.errors import adapter_error
from flora_vllm.formats import FAMILIES, examine, read_adapter
from flora_vllm.formats.trainer_names import as_peft_names

torch.set_num_threads(1)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


def terms_of(path: Path, task: str | None = None) -> dict[str, torch.Tensor]:
    adapter = read_adapter(path, task=task)
    return {f"{module} {i}": t for module, terms in adapter.modules.items() for i, t in enumerate(terms.tensors())}


def same(one: Path, other: Path) -> bool:
    ours, theirs = terms_of(one), terms_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def rename(path: Path, change) -> None:
    tensors = load_file(path / WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, path / WEIGHTS)


LEFT_BY = {
    "adapter-name": lambda name: name.replace(".weight", ".default.weight"),
    "deepspeed": lambda name: f"module.{name}",
    "compiled": lambda name: name.replace(ROOT, f"{ROOT}_orig_mod."),
    "compiled-outside": lambda name: f"_orig_mod.{name}",
    "fsdp": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."),
    "lightning": lambda name: f"model.{name}".replace(".weight", ".my-run.weight"),
    "no-prefix": lambda name: name.removeprefix(ROOT),
    "twice": lambda name: ROOT + name,
    "base-layer": lambda name: name.replace(".lora_", ".base_layer.lora_"),
}


@pytest.mark.parametrize("how", LEFT_BY)
def test_names_that_a_trainer_left(how: str, tmp_path: Path, capsys) -> None:
    good, path = lora(tmp_path / "good"), lora(tmp_path / "bad")
    rename(path, LEFT_BY[how])
    fault = the_fault(path)  # one, however many tensors
    assert "4 tensor names are not as PEFT saves them, for example" in fault
    assert "flora-vllm convert --repair DIR OUT" in fault
    assert convert("--repair", path, tmp_path / "out") == 0
    assert "renamed 4 tensors, such as" in capsys.readouterr().out
    assert same(tmp_path / "out", good)
    assert read_adapter(tmp_path / "out", layout=LAYOUT).rank == 4


def test_names_of_other_parts() -> None:
    name = f"{ROOT}{Q}.lora_magnitude_vector"
    assert as_peft_names(FAMILIES["DORA"], f"{name}.default.weight") == name
    assert as_peft_names(FAMILIES["DORA"], f"{name}.default") == name
    assert as_peft_names(FAMILIES["IA3"], f"{ROOT}{Q}.ia3_l.default") == f"{ROOT}{Q}.ia3_l"
    assert as_peft_names(FAMILIES["MELORA"], f"{ROOT}{Q}.lora_A.0.weight") == f"{ROOT}{Q}.lora_A.0.weight"
    assert as_peft_names(FAMILIES["VERA"], "module.base_model.vera_A") == "base_model.vera_A"
    tinker, head = f"{ROOT}model.unembed_tokens.lora_A.weight", f"{ROOT}lm_head.lora_A.weight"
    assert as_peft_names(FAMILIES["LORA"], tinker) == head
    nested = f"{ROOT}model.layers.0.mlp.experts.base_layer.lora_A.weight"
    assert as_peft_names(FAMILIES["LORA"], nested, nested=True) == nested
    for kept in (f"{ROOT}{Q}.lora_A.weight", f"{ROOT}{Q}.base_layer.bias", f"{ROOT}lm_head.weight", "nonsense"):
        assert as_peft_names(FAMILIES["LORA"], kept) == kept


def test_two_adapters_in_one_file(tmp_path: Path, capsys) -> None:
    path = lora(tmp_path / "a")
    tensors = load_file(path / WEIGHTS)
    both = {name.replace(".weight", f".{which}.weight"): tensor for which in "ab" for name, tensor in tensors.items()}
    save_file({name: tensor.clone() for name, tensor in both.items()}, path / WEIGHTS)
    assert convert("--repair", path, tmp_path / "out") == 1
    assert "more than one adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_equal_to_the_base_are_dropped_and_others_are_not(tmp_path: Path, capsys) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    head, embed = model.lm_head.weight.detach().clone(), model.get_input_embeddings().weight.detach().clone()
    path = tmp_path / "a"
    save_peft_adapter(model, peft.LoraConfig(target_modules=["q_proj"]), path)
    good = load_file(path / WEIGHTS)
    whole = {f"{ROOT}lm_head.base_layer.weight": head, f"{ROOT}model.embed_tokens.weight": embed}
    save_file({**good, **whole, f"{ROOT}model.norm.weight": torch.full((16,), 3.0)}, path / WEIGHTS)
    edit_config(path, modules_to_save=["lm_head", "embed_tokens"])

    assert convert("--repair", path, tmp_path / "out") == 1
    assert "2 tensors are no part of LORA" in capsys.readouterr().err
    assert convert("--repair", tmp_path / "base", path, tmp_path / "out") == 1
    assert "1 tensors are no part of LORA and not equal" in capsys.readouterr().err
    save_file({**good, **whole}, path / WEIGHTS)
    assert convert("--repair", tmp_path / "base", path, tmp_path / "out") == 0
    assert "dropped 2 weights equal to the base model's" in capsys.readouterr().out
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == good.keys()
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] is None
    # What the adapter has in the base's place stays.
    changed = {f"{ROOT}model.embed_tokens.weight": embed + 1}
    save_file({**good, **whole, **changed}, path / WEIGHTS)
    assert convert("--repair", tmp_path / "base", path, tmp_path / "out") == 0
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == good.keys() | changed.keys()
    # A name that means several modules stays for those that are changed.
    norms = {f"{ROOT}model.norm.weight": model.state_dict()["model.norm.weight"].clone()}
    changed = {f"{ROOT}model.layers.0.input_layernorm.weight": torch.full((16,), 3.0)}
    save_file({**good, **norms, **changed}, path / WEIGHTS)
    edit_config(path, modules_to_save=["norm"])
    assert convert("--repair", tmp_path / "base", path, tmp_path / "out") == 0
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == good.keys() | changed.keys()


def test_pickled_folder(tmp_path: Path, capsys) -> None:
    good, path = lora(tmp_path / "good"), lora(tmp_path / "bad")
    tensors = {f"module.{name}": tensor for name, tensor in load_file(path / WEIGHTS).items()}
    (path / WEIGHTS).unlink()
    torch.save({"state_dict": tensors, "epoch": 3}, path / "adapter_model.bin")
    assert "`flora-vllm convert --pickle DIR OUT`" in the_fault(path)
    assert convert("--repair", path, tmp_path / "out") == 1
    assert "--pickle" in capsys.readouterr().err
    for source, out in ((path, "out"), (path / "adapter_model.bin", "out2")):
        assert convert("--pickle", source, tmp_path / out) == 0
        assert "left out what lies beside its 'state_dict': epoch" in capsys.readouterr().out
        assert same(tmp_path / out, good)


class Dangerous:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("was-run"),)


@pytest.mark.parametrize("content", ["code", "list", "number", "junk", "nothing"])
def test_pickles_that_are_no_tensors(content: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    path = lora(tmp_path / "a")
    (path / WEIGHTS).unlink()
    things = {"code": {"x": Dangerous()}, "list": [torch.ones(1)], "number": {"x": 1}, "nothing": {}}
    if content == "junk":
        (path / "adapter_model.bin").write_bytes(b"junk")
    else:
        torch.save(things[content], path / "adapter_model.bin")
    assert convert("--pickle", path, "out") == 1
    assert "adapter_model.bin: " in capsys.readouterr().err
    assert not Path("was-run").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize("diagonal", [False, True])
def test_mtl_lora_checkpoint(diagonal: bool, tmp_path: Path, capsys) -> None:
    tensors = mtl_tensors(diagonal, scaler=diagonal)
    file = tmp_path / "final_checkpoint.pt"
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, file)
    assert convert("--pickle", file, tmp_path / "out") == 1
    assert "give --alpha and --temperature" in capsys.readouterr().err
    assert convert("--pickle", file, tmp_path / "out", "--alpha", 6, "--temperature", 0.7) == 0
    x = random(3, 24)
    for task in range(3):
        check(output(tmp_path / "out", x, task=str(task)), mtl_output(tensors, x, task, 6, 0.7), 2e-6)
    torch.save({f"{Q}.lora_lambdas": torch.ones(2, 4), f"{Q}.lora_B_q": torch.ones(1, 2, 2)}, file)
    assert convert("--pickle", file, tmp_path / "other", "--alpha", 6, "--temperature", 0.7) == 1
    assert "fused q, k, v" in capsys.readouterr().err


def test_lora_recycle_file(tmp_path: Path, capsys) -> None:
    """PEFT loads what becomes of it into transformers' CLIP; number n adds w_b w_a to layer n // 2."""
    tensors = {f"w_a_{i:03d}": random(2, 32, seed=i) for i in range(4)}
    tensors |= {f"w_b_{i:03d}": random(32, 2, seed=i + 9) for i in range(4)}
    file, out = tmp_path / "w.safetensors", tmp_path / "out"
    save_file({**tensors, "fc_32in_5out": random(5, 32)}, file)
    assert convert("--repair", file, out) == 0
    assert "left out fc_32in_5out" in capsys.readouterr().out
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    towers = {"vision_config": {**sizes, "image_size": 8, "patch_size": 4}, "text_config": sizes}
    model = CLIPModel(CLIPConfig(**towers)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = peft.PeftModel.from_pretrained(model, str(out)).merge_and_unload().state_dict()
    adapter = read_adapter(out)
    assert len(adapter.modules) == 4
    for number in range(4):
        name = f"vision_model.encoder.layers.{number // 2}.self_attn.{'qv'[number % 2]}_proj"
        a, b = tensors[f"w_a_{number:03d}"], tensors[f"w_b_{number:03d}"]
        change = torch.stack([torch.stack([row @ column for column in a.T]) for row in b])
        assert torch.allclose(state[f"{name}.weight"] - before[f"{name}.weight"], change, atol=1e-5)


def test_what_stays_at_fault_is_not_written(tmp_path: Path, capsys) -> None:
    path = lora(tmp_path / "a", use_magic=True)
    assert convert("--repair", path, tmp_path / "out") == 1
    assert "use_magic" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert("--repair", tmp_path / "nowhere", tmp_path / "out") == 1
    assert convert("--to-lora", path, tmp_path / "out") == 1
    assert "BASE is missing" in capsys.readouterr().err


def test_a_hundred_faults_of_one_kind_are_one_line(tmp_path: Path) -> None:
    path = lora(tmp_path / "a", target_modules=["k_proj"])
    faults = examine(path).faults
    assert len(faults) == 2
    hundred = [fault.replace("layers.0", f"layers.{i}") for i in range(50) for fault in faults]
    lines = str(adapter_error("a", hundred)).splitlines()
    assert len(lines) == 2
    assert "(100 faults)" in lines[0]
    assert lines[1].endswith("(and 99 more like it)")
    assert Q in lines[1] or V in lines[1]


@pytest.mark.parametrize("tasks", [10**13, "two"])
def test_tasks_that_a_config_cannot_have_are_told_not_counted(tasks: object, tmp_path: Path, capsys) -> None:
    config = peft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"])
    save_filled(tiny_model("llama"), config, tmp_path / "poly")
    edit_config(tmp_path / "poly", n_tasks=tasks)
    assert convert("--repair", tmp_path / "poly", tmp_path / "out") == 1
    assert "allowed: an integer from 1 to 4096" in capsys.readouterr().err
