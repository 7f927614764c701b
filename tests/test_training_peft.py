"""FLoRA as a PEFT method: what PEFT's generic checks of custom models ask of LoRA, asked of FLoRA, and contract C1."""

import json
import pickle

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from training_support import tiny_gpt2, tiny_llama, two_linears
from transformers import LlamaConfig, LlamaForSequenceClassification

from flora_vllm.errors import ConfigError
from flora_vllm.formats import read_adapter
from flora_vllm.terms import merged
from flora_vllm.training import FloraConfig, FloraLinear, FloraModel, layer
from flora_vllm.training.peft_type import register

CASES = {
    "regex": {"target_modules": "first"},
    "rank 1": {"target_modules": ["first"]},
    "mean": {"target_modules": ["first", "second"], "r": 3},
    "sum": {"target_modules": ["first", "second"], "r": 2, "reduction": "sum"},
    "pattern": {"target_modules": ["first", "second"], "rank_pattern": {"second": 4}},
    "dropout": {"target_modules": ["first"], "r": 2, "flora_dropout": 0.2},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "excluded": {"target_modules": ["first", "second"], "exclude_modules": ["second"]},
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def inputs(seed: int = 5) -> torch.Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))


def random_adapter(case: dict, seed: int = 0, model: nn.Module | None = None) -> PeftModel:
    model = model or two_linears()
    torch.manual_seed(seed + 100)
    return get_peft_model(model, FloraConfig(**{**case, "init_weights": False})).eval()


def factor_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "flora_" in name]


def test_registration_is_idempotent_and_under_pefts_own_names():
    register(FloraConfig, FloraModel)
    assert peft.PeftType.FLORA == "FLORA"
    assert peft.PeftType("FLORA") is peft.PeftType.FLORA
    assert pickle.loads(pickle.dumps(peft.PeftType.FLORA)) is peft.PeftType.FLORA
    assert "FLORA" in list(peft.PeftType)


def test_starts_as_the_base_and_only_factors_train(case):
    base = two_linears()
    expected = base(inputs())
    model = get_peft_model(base, FloraConfig(**case)).eval()
    # Identity in exact arithmetic; W x and the bias are rounded apart, a float32 ulp of order-1 values.
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-6, atol=1e-6)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == factor_names(model)
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total


def test_training_changes_factors_only_and_lowers_the_loss(case):
    model = get_peft_model(two_linears(), FloraConfig(**case))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss = (model(inputs()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(factor_names(model))


def test_save_and_load_round_trip(case, tmp_path):
    model = random_adapter(case)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(two_linears(), tmp_path)
    assert isinstance(again.base_model, FloraModel)
    assert torch.equal(again.eval()(inputs()), model(inputs()))
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(two_linears(), tmp_path, is_trainable=True)
    assert [n for n, p in trainable.named_parameters() if p.requires_grad] == factor_names(trainable)


def test_loads_without_memory_for_initial_weights(tmp_path):
    model = random_adapter(CASES["mean"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(two_linears(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(again.eval()(inputs()), model(inputs()))


def test_saved_directory_is_contract_c1(tmp_path):
    model = random_adapter(CASES["pattern"], model=two_linears())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "FLORA"
    assert (config["r"], config["reduction"], config["rank_pattern"]) == (1, "mean", {"second": 4})
    assert config["target_modules"] == ["first", "second"]
    assert "lora_alpha" not in config
    assert config["modules_to_save"] is None
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        "base_model.model.first.flora_A.weight": (1, 10),
        "base_model.model.first.flora_B.weight": (12, 1),
        "base_model.model.second.flora_A.weight": (4, 12),
        "base_model.model.second.flora_B.weight": (4, 4),
    }


@pytest.mark.parametrize("name", ["mean", "sum", "pattern", "excluded"])
def test_the_server_reads_what_peft_wrote(name, tmp_path):
    model = random_adapter(CASES[name])
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.family == "FLORA"
    x = torch.randn(3, 10)
    first = model.base_model.model.first
    expected = nn.functional.linear(
        x, *merged(first.base_layer.weight, first.base_layer.bias, adapter.modules["first"].terms)
    )
    torch.testing.assert_close(first(x), expected, rtol=1e-5, atol=1e-5)
    assert set(adapter.modules) == ({"first"} if name == "excluded" else {"first", "second"})


def test_config_survives_a_round_trip_and_is_found_by_peft(tmp_path):
    config = FloraConfig(
        r=3, target_modules=["b", "a"], reduction="sum", layers_to_transform=[0], task_type="CAUSAL_LM"
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]


def test_merge_unmerge_and_unload(case):
    model = random_adapter(case)
    expected, base = model(inputs()), two_linears()(inputs())
    assert not torch.allclose(expected, base, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(inputs()), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, FloraLinear) for m in merged.modules())
    torch.testing.assert_close(merged(inputs()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(random_adapter(case).unload()(inputs()), base)


def test_safe_merge_refuses_broken_factors():
    model = random_adapter(CASES["mean"])
    model.base_model.model.first.flora_B["default"].weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)


def test_disabling_gives_the_base_back_also_when_merged(case):
    base = two_linears()(inputs())
    model = random_adapter(case)
    adapted = model(inputs())
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base)
    assert torch.equal(model(inputs()), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base)


def test_several_adapters_switch_delete_and_stay_apart():
    model = random_adapter(CASES["mean"])
    first = model(inputs())
    model.add_adapter("other", FloraConfig(target_modules=["second"], r=2, init_weights=False))
    assert torch.equal(model(inputs()), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    assert not torch.allclose(model(inputs()), first)
    assert all(p.requires_grad == (".other." in n) for n, p in model.named_parameters())
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("other")
    assert not any(".other." in name for name in model.state_dict())
    model.set_adapter("default")
    assert torch.equal(model(inputs()), first)


@pytest.mark.parametrize("modulated", [False, True])
def test_mixed_batch_is_each_example_alone(modulated, monkeypatch):
    monkeypatch.setattr(layer, "prefers_modulated", lambda *_args: modulated)
    model = random_adapter(CASES["mean"])
    model.add_adapter("other", FloraConfig(target_modules=["second"], r=2, init_weights=False))
    x, alone = inputs(), {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(x)
    with model.disable_adapter():
        alone["__base__"] = model(x)
    names = ["other", "__base__", "default", "other", "default", "__base__"]
    mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        # A row's GEMM runs in another batch size than alone: float32 summation order.
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-5, atol=1e-6)


def test_mixed_batch_refuses_what_it_cannot_do():
    model = random_adapter(CASES["mean"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(inputs(), adapter_names=["default"])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(inputs(), adapter_names=["nobody"] * 6)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(inputs(), adapter_names=["default"] * 6)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(inputs(), adapter_names=["default"] * 6)


def test_generate_with_mixed_adapters_and_beams():
    model = get_peft_model(tiny_llama(), FloraConfig(target_modules=["q_proj"], init_weights=False)).eval()
    ids = torch.tensor([[3, 4, 5], [3, 4, 5]])
    mixed = model.generate(
        input_ids=ids, adapter_names=["default", "__base__"], num_beams=2, do_sample=False, max_new_tokens=4
    )
    alone = model.generate(input_ids=ids[:1], num_beams=2, do_sample=False, max_new_tokens=4)
    assert torch.equal(mixed[0][: alone.shape[1]], alone[0])


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny_llama(), FloraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        ids = torch.arange(2, 18).view(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_gpt2_with_fused_qkv_as_conv1d_merges_to_the_same_logits():
    ids = torch.arange(2, 12).view(1, 10)
    model = random_adapter({"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 2}, model=tiny_gpt2())
    assert model.base_model.model.transformer.h[0].attn.c_attn.flora_B["default"].weight.shape == (48, 2)
    expected = model(ids).logits
    merged = model.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_layers_to_transform_and_layers_pattern():
    config = FloraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    model = get_peft_model(tiny_llama(), config)
    assert model.targeted_module_names == ["model.layers.1.self_attn.q_proj"]


def test_adapters_of_a_half_precision_base_are_kept_in_float32():
    model = get_peft_model(two_linears().bfloat16(), FloraConfig(target_modules=["first"]))
    assert model.base_model.model.first.flora_A["default"].weight.dtype == torch.float32
    assert model(inputs().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern"),
        ({"reduction": "max"}, "reduction='max'"),
        ({"flora_dropout": 1.0}, "flora_dropout"),
        ({"init_weights": "gaussian"}, "init_weights"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern"),
        ({"alora_invocation_tokens": [5], "modules_to_save": ["lm_head"]}, r"\['lm_head'\].*train without one of both"),
        ({"alora_invocation_tokens": [5], "task_type": "SEQ_CLS"}, "'score'.*train without one of both"),
    ],
)
def test_config_names_what_is_wrong(fields, words):
    with pytest.raises(ConfigError, match=words):
        FloraConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["first", "second"], "r": 5}, "second is 12 to 4 features, too small for rank 5"),
        ({"target_modules": ["nothing"]}, "not found"),
    ],
)
def test_targets_that_cannot_be_adapted_leave_the_model_as_it_was(fields, words):
    model = two_linears()
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, FloraConfig(**fields))
    assert type(model.first) is nn.Linear


def tiny_classifier() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def test_a_classifiers_head_is_trained_and_saved_beside_the_factors(tmp_path):
    tokens = torch.randint(1, 50, (4, 6), generator=torch.Generator().manual_seed(1))
    config = FloraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_classifier(), config)
    plain = tiny_classifier()(tokens).logits
    assert torch.allclose(model(tokens).logits, plain, atol=1e-6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model.train()(tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.eval()(tokens).logits
    assert (trained - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert set(adapter.saved) == {"score.weight"}
    assert set(adapter.modules) == {f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")}
    loaded = PeftModel.from_pretrained(tiny_classifier(), tmp_path).eval()
    assert torch.allclose(loaded(tokens).logits, trained, atol=1e-6)
    mixed = loaded(tokens, adapter_names=["default", "__base__", "default", "__base__"]).logits
    assert torch.allclose(mixed, torch.stack([trained[0], plain[1], trained[2], plain[3]]), atol=1e-6)
    assert torch.allclose(loaded.merge_and_unload()(tokens).logits, trained, atol=1e-5)


def test_output_layer_and_embeddings_are_refused():
    with pytest.raises(ConfigError, match=r"(?s)2 of the target modules.*Embedding.*lm_head is the output layer"):
        get_peft_model(tiny_llama(), FloraConfig(target_modules=["lm_head", "embed_tokens"]))


def test_state_dict_keys_carry_no_adapter_name(tmp_path):
    model = get_peft_model(two_linears(), FloraConfig(target_modules=["first"]), adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert not any("mine" in name for name in load_file(tmp_path / "mine" / "adapter_model.safetensors"))
