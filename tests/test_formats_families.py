"""Adapters that PEFT saved, with features or ranks that we refuse, by family."""

from pathlib import Path

import pytest
import torch
from formats_support import edit_config, faults_of, linear_layout, save_peft_adapter, the_fault, tiny_model
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model

from flora_vllm.formats import read_adapter
from flora_vllm.terms import Product

torch.set_num_threads(1)

Q0 = "model.layers.0.self_attn.q_proj"

# What PEFT writes when a feature is on that we do not compute.
LORA_CASES: dict[str, tuple[dict, str]] = {
    "dora-zero": ({"use_dora": 0}, "'use_dora' is 0; allowed: False"),
    "bias": ({"bias": "boft_only"}, "'bias' is 'boft_only'; allowed: 'none' or 'all' or 'lora_only'"),
    **{
        init: ({"init_lora_weights": init}, "path_initial_model_for_weight_conversion")
        for init in ("pissa_niter_4", "corda", "lora_ga", "loftq")
    },
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices names tokens whose rows are not in the file"),
    "tokens twice": ({"trainable_token_indices": {"wte": [1, 1]}}, "'trainable_token_indices' is {'wte': [1, 1]}"),
    "parameters": ({"target_parameters": ["experts.up"]}, "'target_parameters'"),
    "replication": ({"layer_replication": [[0, 2]]}, "'layer_replication'"),
    "alora": ({"alora_invocation_tokens": [5, -1]}, "'alora_invocation_tokens' is [5, -1]; allowed: null, or a list"),
    "qalora": ({"use_qalora": True, "qalora_group_size": 0}, "'qalora_group_size' is 0"),
    "bdlora": ({"use_bdlora": {"nblocks": 2, "blocks": 3}}, "'use_bdlora' is"),
    "alpha-nan": ({"lora_alpha": float("nan")}, "'lora_alpha' is nan; allowed: a finite number"),
    "alpha-huge": ({"lora_alpha": 10**400}, "'lora_alpha' is 1000"),
    "alpha-missing": ({"lora_alpha": ...}, "key 'lora_alpha' is missing"),
    "alpha-pattern": ({"alpha_pattern": {"q_proj": "8"}}, "'alpha_pattern'"),
    "rslora": ({"use_rslora": 1}, "'use_rslora' is 1; allowed: true or false"),
}


@pytest.mark.parametrize("case", LORA_CASES)
def test_lora_features_that_change_the_result(case: str, tmp_path: Path) -> None:
    changes, message = LORA_CASES[case]
    save_peft_adapter(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    assert "limit 3; start the server with --max-lora-rank 4" in the_fault(tmp_path, max_lora_rank=3)
    assert read_adapter(tmp_path, max_lora_rank=4, max_flora_rank=1).rank == 4
    edit_config(tmp_path, **changes)
    assert message in the_fault(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_reduced_for_every_token_is_none_of_an_adapter_that_begins_later(start: str, tmp_path: Path) -> None:
    """PEFT itself: a prompt without the sequence is not the base model's."""
    tokens = torch.randint(0, 80, (1, 9), generator=torch.Generator().manual_seed(3))
    config = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=start, alora_invocation_tokens=[79, 79], task_type="CAUSAL_LM"
    )
    with torch.no_grad():
        before = tiny_model("llama")(tokens).logits
        after = get_peft_model(tiny_model("llama"), config).eval()(input_ids=tokens).logits
    assert float((after - before).abs().max()) > 1e-4
    config.alora_invocation_tokens = None
    save_peft_adapter(tiny_model("llama"), config, tmp_path)
    for none in (None, []):
        edit_config(tmp_path, alora_invocation_tokens=none)
        assert read_adapter(tmp_path).invocation_tokens is None
    edit_config(tmp_path, alora_invocation_tokens=[79, 79])
    assert "'alora_invocation_tokens' is [79, 79]; allowed: null or empty" in the_fault(tmp_path)


def test_ia3_side_and_shape_must_agree(tmp_path: Path) -> None:
    model = tiny_model("llama")
    layout = linear_layout(model)
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    save_peft_adapter(model, config, tmp_path)
    assert read_adapter(tmp_path, layout=layout, max_flora_rank=1).rank == 1
    edit_config(tmp_path, feedforward_modules=["k_proj"])
    assert all("ia3_l' has shape" in fault for fault in faults_of(tmp_path))
    assert len(faults_of(tmp_path)) == 4
    edit_config(tmp_path, feedforward_modules=None)
    assert "'feedforward_modules' is None" in the_fault(tmp_path, layout=layout)


def test_hira_rank_is_limited_without_its_identity(tmp_path: Path) -> None:
    save_peft_adapter(tiny_model("llama"), HiraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    adapter = read_adapter(tmp_path, max_flora_rank=4)
    plain, scaled = adapter.modules[Q0].of(Product)
    assert (plain.input, scaled.scale, scaled.rank) == (None, 1.0, 4)
    assert "limit 3" in the_fault(tmp_path, max_flora_rank=3)
    edit_config(tmp_path, r=5)
    assert len(faults_of(tmp_path)) == 4
