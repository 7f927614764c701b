"""What the saved file of a family may be besides the plainest: pruned, converted, renamed, packed, of several tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from families_support import ModelProbe, fill_normal, ours_merged, save_filled, worst_errors
from formats_support import edit_config, edit_tensors, linear_layout, the_fault, tiny_model
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from flora_vllm.errors import AdapterError
from flora_vllm.formats import examine, read_adapter, split_task
from flora_vllm.terms import Added, Dense, FromBase, merged, resolve

torch.set_num_threads(1)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"


def error_of(path: Path, model: PreTrainedModel, architecture: str = "llama", **changes: Any) -> float:
    """Of the logits, against PEFT's own forward of the folder on `model`, which stays as it is."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours, theirs = tiny_model(architecture, **changes), tiny_model(architecture, **changes)
    theirs.load_state_dict(base)
    ours.load_state_dict(ours_merged(model, base, read_adapter(path, layout=linear_layout(model))))
    tokens = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(theirs, str(path)).eval()(tokens).logits
        assert (wanted - model(tokens).logits).abs().max() > 0.01
        return float((ours(tokens).logits - wanted).abs().max())


# PEFT takes a pruned factor for a lost shard.
@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:The following rank_pattern keys")
def test_adalora_pruned_by_its_own_allocator_to_nothing_in_some_modules(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, lora_alpha=5, tinit=1, tfinal=2, total_step=6, target_modules=LINEAR
    )
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            fill_normal("", parameter.data)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(4))
    for step in range(6):
        wrapped(tokens, labels=tokens).loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    wrapped.save_pretrained(str(tmp_path))
    model = tiny_model("llama")
    terms = [module.terms for module in read_adapter(tmp_path, layout=linear_layout(model)).modules.values()]
    ranks = sorted(sum(term.rank for term in module if isinstance(term, Added)) for module in terms)
    assert ranks[0] == 0
    assert ranks[-1] > 1
    assert error_of(tmp_path, model) < 1e-5


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # whichever it is, of one of the two
def test_an_olora_of_conv1d_and_linear_layers_says_one_thing_of_both(tmp_path: Path) -> None:
    """Its one `fan_in_fan_out` is the last layer's: what a layer's start was is told by the base."""
    options = {"tie_word_embeddings": False}
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["attn.c_proj", "lm_head"], init_lora_weights="olora", fan_in_fan_out=True
    )
    wrapped = peft.get_peft_model(tiny_model("gpt2", **options), config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            fill_normal(name, parameter.data)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    model = tiny_model("gpt2", **options)
    assert error_of(tmp_path, model, "gpt2", **options) < 1e-4
    edit_config(tmp_path, fan_in_fan_out=True)
    assert error_of(tmp_path, model, "gpt2", **options) < 1e-4


# PEFT warns of what the conversion undoes.
@pytest.mark.filterwarnings("ignore:.*changes the base weights", "ignore:.*niter")
@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_converted_start_is_plain_lora(start: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=LINEAR, init_lora_weights=start)
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    wrapped.save_pretrained(str(tmp_path / "start"))
    edit_config(tmp_path / "start", init_lora_weights=True)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    wrapped.save_pretrained(str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = tiny_model("llama")
    adapter = read_adapter(tmp_path / "out", layout=linear_layout(model))
    assert (adapter.family, adapter.rank) == ("LORA", 6)
    assert error_of(tmp_path / "out", model) < 1e-5


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "start",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": peft.KasaConfig()}],
    ids=["pissa", "olora", "kasa"],
)
def test_a_reduced_output_layer_may_lie_beside_its_factors(start: dict, tmp_path: Path) -> None:
    """PEFT writes it unasked: what is taken off the served base's is that, or the file is of another base."""
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["lm_head", "q_proj"], **start)
    save_filled(tiny_model("llama"), config, tmp_path)
    name = "base_model.model.lm_head.base_layer.weight"
    saved = load_file(tmp_path / "adapter_model.safetensors")[name]
    model = tiny_model("llama")
    assert not torch.equal(saved, model.lm_head.weight)
    assert error_of(tmp_path, model) < 1e-4
    terms = read_adapter(tmp_path, layout=linear_layout(model)).modules["lm_head"].terms
    model.to(torch.bfloat16)
    resolve(terms, ModelProbe(model, model.state_dict(), "lm_head"))
    edit_tensors(tmp_path, **{name: model.lm_head.weight.detach().float()})
    terms = read_adapter(tmp_path, layout=linear_layout(model)).modules["lm_head"].terms
    with pytest.raises(AdapterError, match="save it again with save_embedding_layers=False"):
        resolve(terms, ModelProbe(model, model.state_dict(), "lm_head"))


def _measured(model: PreTrainedModel, config: peft.LoraConfig) -> None:
    """What PEFT wants done before training, for the starts that look at data."""
    tokens = torch.randint(0, 80, (1, 60), generator=torch.Generator().manual_seed(4))
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, run_model=lambda: model(tokens))
    else:
        preprocess_loraga(model, config, lambda: model(tokens, labels=tokens).loss.backward())


@pytest.mark.filterwarnings("ignore:.*_config. specified but will be ignored", "ignore:Full backward hook")
@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "corda", "corda_config": peft.tuners.lora.config.CordaConfig(corda_method="ipm")},
        {"init_lora_weights": "lora_ga", "lora_ga_config": peft.tuners.lora.config.LoraGAConfig()},
    ],
    ids=["corda", "lora_ga"],
)
def test_a_converted_start_may_keep_its_settings(settings: dict, tmp_path: Path) -> None:
    """What the refusal of an unconverted one advises is read, though PEFT leaves the start's own key in it."""
    torch.manual_seed(2)
    model = tiny_model("llama")
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"], **settings)
    _measured(model, config)
    wrapped = peft.get_peft_model(model, config)
    config.init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "start"))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    wrapped.save_pretrained(str(tmp_path / "out"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["corda_config"] or written["lora_ga_config"]
    assert error_of(tmp_path / "out", tiny_model("llama")) < 1e-5
    edit_config(tmp_path / "out", init_lora_weights=settings["init_lora_weights"])
    assert "path_initial_model_for_weight_conversion" in the_fault(tmp_path / "out")


@pytest.mark.parametrize("start", ["Gaussian", "MICA"])
def test_starts_are_compared_in_any_case(start: str, tmp_path: Path) -> None:
    save_filled(tiny_model("llama"), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=start), tmp_path)
    assert error_of(tmp_path, tiny_model("llama")) < 1e-5


def test_bone_is_miss_under_other_names(tmp_path: Path) -> None:
    config = peft.MissConfig(r=8, target_modules=["q_proj", "down_proj"])
    error, _ = worst_errors(config, tmp_path)
    assert error < 1e-5
    folder = tmp_path / "adapter"
    layout = linear_layout(tiny_model("llama"))
    miss = read_adapter(folder, layout=layout)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace("miss_block", "bone_block"): tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    edit_config(folder, peft_type="BONE", miss_dropout=..., mini_r=...)
    bone = read_adapter(folder, layout=layout)
    assert bone.family == "BONE"
    for module, terms in miss.modules.items():
        for mine, same in zip(terms.tensors(), bone.modules[module].tensors(), strict=True):
            assert torch.equal(mine, same)


def test_qalora_pools_its_input(tmp_path: Path) -> None:
    """PEFT has QALoRA on GPTQ layers only: its forward is asked directly."""
    save_filled(tiny_model("llama"), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]), tmp_path)
    down, up = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.randn(64, 4)
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    edit_tensors(tmp_path, **{prefix.format(i, x): t.clone() for i in (0, 1) for x, t in (("A", down), ("B", up))})
    edit_config(tmp_path, use_qalora=True, qalora_group_size=8)
    model = tiny_model("llama")
    (term,) = read_adapter(tmp_path, layout=linear_layout(model)).modules[Q0].of(Added)
    weight, bias = merged(torch.zeros(64, 64), None, (term,))
    assert bias is None
    layer = SimpleNamespace(
        lora_A={"default": SimpleNamespace(weight=down)},
        lora_B={"default": SimpleNamespace(weight=up)},
        lora_dropout={"default": torch.nn.Identity()},
        scaling={"default": 6 / 4},
        qalora_group_size={"default": 8},
        training=False,
        in_features=64,
    )
    x = torch.randn(2, 5, 64)
    plain = torch.zeros(2, 5, 64)
    theirs = QALoraLinearVariant.forward(layer, "default", x, plain)  # pyright: ignore[reportArgumentType]
    ours = x @ weight.T
    torch.testing.assert_close(ours - (x @ torch.zeros(64, 64)), theirs, rtol=1e-5, atol=1e-4)


def test_a_task_is_asked_for_by_name(tmp_path: Path) -> None:
    config = peft.PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["q_proj"])
    save_filled(tiny_model("llama"), config, tmp_path)
    assert "it has 3 tasks; add one to its path as <path>#<task>: 0, 1, 2" in the_fault(tmp_path)
    for task in ("3", "x", ""):
        assert f"there is no task {task!r}; it has 0, 1, 2" in examine(tmp_path, task=task).faults[0]
    first, second = (read_adapter(tmp_path, task=task).modules[Q0].terms[0] for task in ("0", "1"))
    assert isinstance(first, Added)
    assert isinstance(second, Added)
    assert not torch.equal(first.down, second.down)  # pyright: ignore[reportArgumentType]


def test_a_task_of_a_family_without_tasks(tmp_path: Path) -> None:
    save_filled(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    assert "there is no task '1'; LORA adapters have none" in examine(tmp_path, task="1").faults[0]


def test_paths_with_tasks(tmp_path: Path) -> None:
    named = tmp_path / "a#b"
    named.mkdir()
    assert split_task(str(named)) == (str(named), None)
    assert split_task(f"{named}#1") == (str(named), "1")
    assert split_task("adapters/poly#qa") == ("adapters/poly", "qa")
    assert split_task("adapters/poly") == ("adapters/poly", None)
    assert split_task("adapters/poly#") == ("adapters/poly#", None)


def test_unilora_without_indices_needs_the_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_filled(model, peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=["q_proj"]), tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1
    assert "which modules it adapts depends on the base model" in the_fault(tmp_path)
    model = tiny_model("llama")
    adapter = read_adapter(tmp_path, layout=linear_layout(model))
    assert sorted(adapter.modules) == [Q0, Q0.replace("0", "1")]
    probe = ModelProbe(model, model.state_dict(), Q0)
    probe.module = "language_model.layers.0.self_attn.q_proj"
    with pytest.raises(AdapterError, match="save the adapter with save_indices=True"):
        resolve(adapter.modules[Q0].terms, probe)


def test_a_pattern_too_slow_to_tell_the_modules_is_a_fault_among_the_others(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_filled(model, peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=["q_proj"]), tmp_path)
    edit_config(tmp_path, target_modules="(.|..|...)+[#!]", unheard_of=1)
    found = examine(tmp_path, layout=linear_layout(tiny_model("llama")))
    assert "takes too long to match module names" in "\n".join(found.faults)
    assert "'unheard_of'" in "\n".join(found.faults)
    assert found.family == "UNILORA"


# More rows in the embedding than any linear layer has, and draws that would differ with it among the modules.
@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize(
    "make",
    [
        lambda targets: peft.UniLoraConfig(r=3, theta_d_length=50, target_modules=targets),
        lambda targets: peft.RandLoraConfig(r=5, save_projection=False, target_modules=targets),
        lambda targets: peft.TinyLoraConfig(r=3, u=8, save_projection=False, target_modules=targets),
        lambda targets: peft.WaveFTConfig(
            n_frequency=200, proportional_parameters=True, target_modules=targets, init_weights=False
        ),
    ],
    ids=["unilora", "randlora", "tinylora", "waveft"],
)
def test_all_linear_counts_no_embedding(make: Callable[[str], peft.PeftConfig], tmp_path: Path) -> None:
    """PEFT saves the names that it found; a config may say the word itself, too."""
    model = tiny_model("llama", vocab_size=500)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = save_filled(model, make("all-linear"), tmp_path)
    edit_config(tmp_path, target_modules="all-linear")
    plain = tiny_model("llama", vocab_size=500)
    ours = ours_merged(plain, base, read_adapter(tmp_path, layout=linear_layout(plain)))
    wanted = wrapped.merge_and_unload().state_dict()
    for name in (f"{Q0}.weight", "model.layers.1.mlp.down_proj.weight"):
        assert float((wanted[name] - base[name]).abs().max()) > 1e-3
        assert float((ours[name] - wanted[name]).abs().max()) < 1e-4


def test_unilora_draws_nothing_for_what_is_saved_whole(tmp_path: Path) -> None:
    """Though target_modules names it: every other module's numbers come from another place of the draw without it."""
    config = peft.UniLoraConfig(
        r=3, theta_d_length=50, target_modules=["q_proj", "o_proj", "up_proj"], modules_to_save=["o_proj", "lm_head"]
    )
    error, effect = worst_errors(config, tmp_path, "llama")
    assert effect > 0.01
    assert error < 1e-4


def test_indices_outside_are_refused(tmp_path: Path) -> None:
    config = peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=["q_proj"], save_indices=True)
    save_filled(tiny_model("llama"), config, tmp_path / "unilora")
    name = f"base_model.model.{Q0}.unilora_indices_A"
    edit_tensors(tmp_path / "unilora", **{name: torch.full((2, 64), 50)})
    assert "leave the 50 numbers of unilora_theta_d" in the_fault(tmp_path / "unilora")
    config = peft.VBLoRAConfig(
        r=2, num_vectors=20, vector_length=16, topk=2, target_modules=["q_proj"], save_only_topk_weights=True
    )
    save_filled(tiny_model("llama"), config, tmp_path / "vblora")
    name = f"base_model.model.{Q0}.vblora_logits_A_topk_indices"
    edit_tensors(tmp_path / "vblora", **{name: torch.full((2, 4, 2), 20, dtype=torch.uint8)})
    assert "a bank of 20 does not have" in the_fault(tmp_path / "vblora")
    edit_tensors(tmp_path / "vblora", **{name: torch.full((2, 4, 2), 19, dtype=torch.uint8)})
    assert "names a vector twice" in the_fault(tmp_path / "vblora")


def test_limits_count_what_is_built(tmp_path: Path) -> None:
    layout = linear_layout(tiny_model("llama"))
    save_filled(tiny_model("llama"), peft.LoHaConfig(r=3, target_modules=["q_proj"]), tmp_path / "loha")
    assert "with rank 9" in the_fault(tmp_path / "loha", max_lora_rank=8)
    assert read_adapter(tmp_path / "loha", max_lora_rank=9).rank == 3
    config = peft.MissConfig(r=8, target_modules=["q_proj"], init_weights="bat")
    save_filled(tiny_model("llama"), config, tmp_path / "bat")
    size = 2 * 4 * 64 * 64
    assert f"{size} bytes, above the limit" in the_fault(tmp_path / "bat", layout=layout, max_dense_bytes=size - 1)
    read_adapter(tmp_path / "bat", layout=layout, max_dense_bytes=size)


def test_osf_is_dense_only_where_factors_are_larger(tmp_path: Path) -> None:
    model = tiny_model("llama")
    kinds = {}
    for rank, name in ((32, "half"), (60, "few")):
        config = peft.OSFConfig(target_modules=["q_proj"], effective_rank=rank)
        save_filled(tiny_model("llama"), config, tmp_path / name)
        (term,) = read_adapter(tmp_path / name, layout=linear_layout(model)).modules[Q0].terms
        assert isinstance(term, FromBase)
        (built,) = resolve((term,), ModelProbe(model, model.state_dict(), Q0))
        kinds[name] = type(built), term.rank, term.dense_bytes
    assert kinds == {"half": (Dense, 0, 4 * 64 * 64), "few": (Added, 8, 0)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_untrained_osf_changes_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT keeps what it starts from in the base's dtype, and so does what is taken off here."""
    model = tiny_model("llama").to(dtype)
    peft.get_peft_model(model, peft.OSFConfig(target_modules=["q_proj"], effective_rank=40)).save_pretrained(tmp_path)
    plain = tiny_model("llama").to(dtype)
    (*_, terms) = read_adapter(tmp_path, layout=linear_layout(plain)).modules.values()
    probe = ModelProbe(plain, plain.state_dict(), Q0.replace("0", "1"))
    change, _ = merged(torch.zeros(64, 64), None, resolve(terms.terms, probe))
    # The sums' own rounding; that of the factors is 1e-3 of it and more.
    assert float(change.abs().max()) < 1e-6 * float(probe.weight().abs().max())


def test_config_and_file_of_a_block_diagonal_lora_must_agree(tmp_path: Path) -> None:
    blocks = peft.BdLoraConfig(["q_proj"], None, nblocks=2)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_bdlora=blocks)
    save_filled(tiny_model("llama"), config, tmp_path)
    layout = linear_layout(tiny_model("llama"))
    assert read_adapter(tmp_path, layout=layout).family == "BDLORA"
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["use_bdlora"]
    edit_config(tmp_path, use_bdlora={**saved, "nblocks": 4})
    assert all("lora_A.weight' has shape (4, 32)" in fault for fault in examine(tmp_path, layout=layout).faults)
    edit_config(tmp_path, use_bdlora=None)
    assert all("lora_A.weight' has shape (4, 32)" in fault for fault in examine(tmp_path, layout=layout).faults)


@pytest.mark.parametrize(
    ("architecture", "options"), [("qwen2", {}), ("qwen2", {"use_dynamic_rank": True, "random_seed": 3})]
)
def test_adamss_finds_pefts_clusters(architecture: str, options: dict, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="AdaMSS's clusters need scikit-learn")
    config = peft.AdamssConfig(
        r=20, num_subspaces=3, subspace_rank=2, target_modules=["q_proj", "v_proj", "up_proj"], **options
    )
    error, effect = worst_errors(config, tmp_path, architecture)
    assert effect > 0.01
    assert error < 1e-5


def test_adamss_whose_clusters_have_other_sizes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="AdaMSS's clusters need scikit-learn")
    config = peft.AdamssConfig(r=20, num_subspaces=2, subspace_rank=2, target_modules=["q_proj"])
    save_filled(tiny_model("llama"), config, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first, second = (f"base_model.model.{Q0}.adamss_B.{i}" for i in (0, 1))
    one, two = tensors[first], tensors[second]
    edit_tensors(tmp_path, **{first: torch.cat([one, two[:1]]), second: two[1:]})
    model = tiny_model("llama")
    adapter = read_adapter(tmp_path, layout=linear_layout(model))
    with pytest.raises(AdapterError, match=f"clusters of .{len(one)}, {len(two)}., the file has .{len(one) + 1}, "):
        resolve(adapter.modules[Q0].terms, ModelProbe(model, model.state_dict(), Q0))
