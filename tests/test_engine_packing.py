"""Models whose packed layers are not one checkpoint tensor a slice: every slice that a tensor fills is adapted.

The oracle is transformers on merged weights.
"""

import inspect
from collections.abc import Callable

import engine_support as support
import peft
import pytest
import torch
import transformers
from engine_support import Ask
from tiny_models import FEED_FORWARD, HEADS, KV_HEADS, POSITIONS, VOCABULARY, WIDTH, randomise

from flora_vllm.plugin.packing import Origin, idle_modules, origins_by_mapper, origins_by_mapping, reordered_modules

pytestmark = support.ENGINE_MARKS

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": FEED_FORWARD,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}


def _gemma4() -> transformers.PreTrainedModel:
    """A sliding layer, and one of full attention whose key projection is its value projection too."""
    config = transformers.Gemma4TextConfig(
        **COMMON,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        attention_k_eq_v=True,
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=KV_HEADS,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCABULARY,
        sliding_window=64,
        enable_moe_block=False,
    )
    return transformers.Gemma4ForCausalLM(config)


def _glm4() -> transformers.PreTrainedModel:
    """gate_up_proj is one tensor in the checkpoint, and has two names in vLLM's mapping."""
    config = transformers.Glm4Config(**COMMON, num_hidden_layers=2, head_dim=32, pad_token_id=0, eos_token_id=2)
    return transformers.Glm4ForCausalLM(config)


def _qwen3_5() -> transformers.PreTrainedModel:
    """A layer of linear attention, whose in_proj_qkv is three of a packed layer's four slices."""
    config = transformers.Qwen3_5TextConfig(
        **COMMON,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=32,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_conv_kernel_dim=4,
    )
    return transformers.Qwen3_5ForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], list[str]]] = {
    "gemma4": (_gemma4, ["q_proj", "k_proj", "o_proj"]),
    "glm4": (_glm4, ["q_proj", "gate_up_proj"]),
    "qwen3_5": (_qwen3_5, ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj", "gate_proj"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_are_their_merged_weights(kind, tmp_path):
    if kind == "qwen3_5":
        pytest.importorskip(
            "torchvision", reason="vLLM's Qwen3.5 imports torchvision, which has no build for this torch"
        )
    make, targets = MODELS[kind]
    model = make()
    randomise(model, seed=0)
    path = tmp_path / "model"
    model.save_pretrained(path)
    base = support.load(path)
    states = {"base": base.state_dict()}
    states["lora"] = support.save_peft_adapter(
        path, tmp_path / "lora", peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets), 3
    )
    some = [name for name in support.linear_modules(base) if name.endswith(tuple(targets))]
    states["flora"] = support.write_flora_adapter(base, tmp_path / "flora", 3, "mean", 4, some)
    oracle = support.oracle_of(path)
    asks = {name: Ask(support.prompt(20, seed=5), None if name == "base" else tmp_path / name) for name in states}
    with support.running(path, max_loras=2) as engine:
        answers = dict(zip(asks, engine.ask(list(asks.values())), strict=True))
        refused = engine.manager().attached.refused
    errors = {name: oracle.error(states[name], asks[name], answers[name]) for name in states}
    assert max(errors.values()) < support.LOGPROB_TOLERANCE, errors
    assert not [name for name in refused if name.endswith(tuple(targets))]


class _Mapped(torch.nn.Module):
    def __init__(self, mapper) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.hf_to_vllm_mapper = mapper


def _mapper(**entries):
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(**entries)


def test_a_weight_mapper_says_which_slices_a_tensor_fills():
    stacked = {
        "layers.0.self_attn.q_proj.": ("layers.0.self_attn.qkv_proj.", "q"),
        "layers.0.self_attn.k_proj.": ("layers.0.self_attn.qkv_proj.", ["k", "v"]),
        ".in_proj_qkv.": (".in_proj_qkvz.", (0, 1, 2)),
        ".in_proj_z.": (".in_proj_qkvz.", 3),
        ".mlp.gate_proj.": (".mlp.gate_up_proj.", 0),
    }
    origins = origins_by_mapper(_Mapped(_mapper(orig_to_new_stacked=stacked)))
    assert origins("model.layers.0.self_attn.qkv_proj", 3) == [
        Origin("q_proj", (0,)),
        Origin("k_proj", (1,)),
        Origin("k_proj", (2,)),
    ]
    whole = Origin("in_proj_qkv", (0, 1, 2))
    assert origins("model.layers.3.linear_attn.in_proj_qkvz", 4) == [whole, whole, whole, Origin("in_proj_z", (3,))]
    assert origins("model.layers.3.self_attn.qkv_proj", 3) is None
    assert origins("model.layers.3.mlp.gate_up_proj", 2) is None, "half of it is not said"
    assert origins("visual.layers.0.self_attn.qkv_proj", 3) is None


def test_a_list_of_names_says_it_where_there_is_one_for_all_or_one_for_each():
    assert origins_by_mapping({"gate_up_proj": ["gate_proj", "up_proj"]}, "gate_up_proj", 2) == [
        Origin("gate_proj", (0,)),
        Origin("up_proj", (1,)),
    ]
    assert origins_by_mapping({}, "c_attn", 3) == [Origin("c_attn", (0, 1, 2))] * 3
    assert "cannot be told apart" in str(origins_by_mapping({"a": ["b", "c"]}, "a", 4))


def test_what_a_model_has_no_use_for_is_named():
    dropped = {"layers.7.self_attn.k_proj.": None, "rotary_emb.inv_freq": None, "layers.7.self_attn.k_norm.": None}
    assert list(idle_modules(_Mapped(_mapper(orig_to_new_substr=dropped)))) == ["model.layers.7.self_attn.k_proj"]


def test_queries_and_keys_that_vllm_reorders_are_named_and_those_of_its_tower_are_not():
    from vllm.model_executor.models.llama4 import Llama4ForCausalLM

    model, language = torch.nn.Module(), torch.nn.Module()
    language.permute_qk_weight_for_rotary = Llama4ForCausalLM.permute_qk_weight_for_rotary
    model.language_model = language
    attention = "language_model.model.layers.0.self_attn"
    names = [*(f"{attention}.{own}_proj" for own in "qkvo"), "vision_model.layers.0.self_attn.q_proj"]
    assert [*reordered_modules(model, names)] == names[:2]
    assert reordered_modules(torch.nn.Module(), names) == {}


@pytest.mark.parametrize(("rope", "folds", "reordered"), [(4, True, 2), (8, True, 0), (4, False, 0)])
def test_k2_horizons_queries_and_keys_are_reordered_with_its_partial_rotary(rope: int, folds: bool, reordered: int):
    from vllm.model_executor.models import k2_horizon

    assert "fold_rope_weights" in inspect.getsource(k2_horizon.K2HorizonModel.load_weights)
    model = torch.nn.Module()
    model.self_attn = torch.nn.Module()
    model.self_attn.fold_rope_weights, model.self_attn.rope_head_dim, model.self_attn.head_dim = folds, rope, 8
    names = [f"self_attn.{own}_proj" for own in "qkvo"]
    assert [*reordered_modules(model, names)] == names[:reordered]
