"""Adapters of a mixture's experts, as PEFT saves them for transformers 5 (parameters) and as before it (modules).

The oracle is transformers on merged weights. MLA's kv_b_proj cannot be adapted yet: refused by name, and its neighbours
are served.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import engine_support as support
import peft
import pytest
import torch
import transformers
from engine_support import Ask
from safetensors.torch import load_file, save_file
from tiny_models import FEED_FORWARD, HEADS, KV_HEADS, LAYERS, POSITIONS, VOCABULARY, WIDTH, randomise

import flora_vllm

pytestmark = support.ENGINE_MARKS

PROMPT = support.prompt(9, seed=0)
EXPERTS = 4
INNER = 80  # of an expert; the CPU kernel pads it to 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
BOTH = ["mlp.experts.gate_up_proj", "experts.down_proj"]
Change = Callable[[torch.Tensor], torch.Tensor]


def _qwen3() -> transformers.PreTrainedModel:
    """The first layer is dense."""
    config = transformers.Qwen3MoeConfig(
        **COMMON,
        intermediate_size=FEED_FORWARD,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        head_dim=32,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    )
    return transformers.Qwen3MoeForCausalLM(config)


def _qwen2() -> transformers.PreTrainedModel:
    """A shared expert, with a gate of its own, beside the others."""
    config = transformers.Qwen2MoeConfig(
        **COMMON,
        intermediate_size=FEED_FORWARD,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=FEED_FORWARD,
        num_experts=EXPERTS,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def _mixtral() -> transformers.PreTrainedModel:
    """Its checkpoints and vLLM have w1, w2, w3 of block_sparse_moe for what transformers has in mlp."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**COMMON, intermediate_size=INNER, num_local_experts=EXPERTS)
    )


def _gpt_oss() -> transformers.PreTrainedModel:
    """Experts stored the other way round, gate and up alternating, with biases; attention with sinks. vLLM's CPU kernel
    pads no experts of this activation. Only one rank may add the last bias."""
    config = transformers.GptOssConfig(**COMMON, intermediate_size=128, num_local_experts=EXPERTS, head_dim=32)
    return transformers.GptOssForCausalLM(config)


def _saved(path: Path, make: Callable[[], transformers.PreTrainedModel]) -> Path:
    model = make()
    randomise(model, seed=0)
    for parameter in model.parameters():
        if parameter.ndim == 3:  # experts in one: they must matter as much as a module of one
            parameter.data *= parameter.shape[1] ** 0.5
    model.save_pretrained(path)
    return path


def _serve(model: Path, folder: Path, states: Mapping[str, support.State], **options: Any) -> dict[str, float]:
    """The error of each adapter in one batch of all, of which each is the same alone."""
    asks = {name: Ask(PROMPT, None if name == "base" else folder / name) for name in states}
    with support.running(model, max_loras=len(states), **options) as engine:
        together = dict(zip(asks, engine.ask(list(asks.values())), strict=True))
        for name, ask in asks.items():
            assert support.difference(engine.ask([ask])[0], together[name]) < support.LOGPROB_TOLERANCE, name
    oracle = support.Oracle(support.load(model))  # transformers' experts take no float64
    plain = oracle.logprobs(states["base"], PROMPT)
    moved = {name: float((oracle.logprobs(state, PROMPT) - plain).abs().max()) for name, state in states.items()}
    assert min(value for name, value in moved.items() if name != "base") > 0.1, moved
    return {name: oracle.error(states[name], asks[name], together[name]) for name in states}


PARAMETERS = {
    "both": peft.LoraConfig(r=4, lora_alpha=8, target_parameters=BOTH, target_modules=["q_proj"]),
    "down": peft.LoraConfig(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        rank_pattern={"experts.down_proj": 5},
        target_parameters=["mlp.experts.down_proj"],
        target_modules=[],
    ),
    "attention": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]),
}


@pytest.mark.parametrize(("make", "ranks"), [(_qwen3, 1), (_qwen2, 1), (_gpt_oss, 1), (_qwen2, 2), (_gpt_oss, 2)])
def test_parameters_of_experts_are_their_merged_weights(make, ranks, tmp_path):
    model = _saved(tmp_path / "model", make)
    states: dict[str, support.State] = {"base": support.load(model).state_dict()}
    for seed, (name, config) in enumerate(PARAMETERS.items()):
        states[name] = support.save_peft_adapter(model, tmp_path / name, copy.deepcopy(config), seed)
    errors = _serve(model, tmp_path, states, **_ranks(ranks))
    assert max(errors.values()) < support.LOGPROB_TOLERANCE, errors


def _as_vllm_reads_it(folder: Path) -> None:
    """The adapter in `folder` without its target_parameters, and its experts' tensors with an axis for them."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in (name for name in tensors if ".experts" in name):
        tensor = tensors[name]
        axes = (EXPERTS, -1, tensor.shape[1]) if "lora_A" in name else (len(tensor), -1, EXPERTS)
        tensors[name] = tensor.view(axes)
    save_file(tensors, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": None}))


def _shared_outer(folder: Path, base: support.State) -> support.State:
    """One adapter as `--enable-moe-shared-loras` has it: experts share A of gate and up, and B of down."""
    g = torch.Generator().manual_seed(11)
    path, merged = "model.layers.1.mlp.experts", dict(base)
    shapes = {"w1": ((1, 3, WIDTH), (EXPERTS, INNER, 3)), "w2": ((EXPERTS, 3, INNER), (1, WIDTH, 3))}
    pairs = {w: [0.14 * torch.randn(s, generator=g) for s in shapes.get(w, shapes["w1"])] for w in ("w1", "w2", "w3")}
    sides = {"A": 0, "B": 1}
    tensors = {f"{path}.{w}.lora_{side}.weight": pair[i] for w, pair in pairs.items() for side, i in sides.items()}
    _write(folder, {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["experts"]}, tensors)
    gate, down, up = (2 * b @ a for a, b in pairs.values())
    merged[f"{path}.gate_up_proj"] = merged[f"{path}.gate_up_proj"] + torch.cat([gate, up], 1)
    merged[f"{path}.down_proj"] = merged[f"{path}.down_proj"] + down
    return merged


@pytest.mark.parametrize("options", [{}, {"enable_moe_shared_loras": True}, {"enable_mixed_moe_lora_format": True}])
def test_experts_in_the_layouts_of_vllms_lora_are_their_merged_weights(options, tmp_path):
    """Whichever of its options, which choose one of them, is set."""
    model = _saved(tmp_path / "model", _qwen3)
    states: dict[str, support.State] = {"base": support.load(model).state_dict()}
    states["both"] = support.save_peft_adapter(model, tmp_path / "both", copy.deepcopy(PARAMETERS["both"]), 3)
    _as_vllm_reads_it(tmp_path / "both")
    states["shared"] = _shared_outer(tmp_path / "shared", states["base"])
    errors = _serve(model, tmp_path, states, **options, **_ranks(1 if options else 2))
    assert max(errors.values()) < support.LOGPROB_TOLERANCE, errors


def _ranks(count: int) -> dict[str, Any]:
    """Options of an engine of so many tensor-parallel workers."""
    return {"tensor_parallel_size": count, "distributed_executor_backend": "mp"} if count > 1 else {}


def _expert_modules(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Modules of Mixtral's experts with their (O, I), as its checkpoints call them."""
    shapes = {"w1": (INNER, WIDTH), "w3": (INNER, WIDTH), "w2": (WIDTH, INNER)}
    path = "model.layers.{}.block_sparse_moe.experts.{}.{}"
    return {path.format(i, j, name): shapes[name] for i in range(LAYERS) for j in range(EXPERTS) for name in names}


def _write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, path / "adapter_model.safetensors"
    )


def _merged(base: support.State, changes: Mapping[str, Change]) -> support.State:
    """transformers' state of a Mixtral whose checkpoint's modules are changed."""
    state = dict(base)
    for module, change in changes.items():
        path, number, name = module.replace("block_sparse_moe", "mlp").rsplit(".", 2)
        key = f"{path}.{'down_proj' if name == 'w2' else 'gate_up_proj'}"
        rows = {"w1": slice(0, INNER), "w3": slice(INNER, None), "w2": slice(None)}[name]
        state[key] = state[key].clone()
        state[key][int(number), rows] = change(state[key][int(number), rows])
    return state


def _by_module(base: support.State, folder: Path) -> dict[str, support.State]:
    """Adapters of expert modules, as PEFT saved them before transformers 5, and what they amount to."""
    g = torch.Generator().manual_seed(7)
    modules = _expert_modules(("w1", "w3", "w2"))
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        name: (0.14 * torch.randn(3, inputs, generator=g), 0.14 * torch.randn(outputs, 3, generator=g))
        for name, (outputs, inputs) in modules.items()
    }
    common = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    tensors = {f"{name}.lora_{p}.weight": t for name, pair in lora.items() for p, t in zip("AB", pair, strict=True)}
    changes: dict[str, dict[str, Change]] = {
        "lora": {name: lambda w, d=2 * up @ down: w + d for name, (down, up) in lora.items()}
    }
    _write(folder / "lora", common, tensors)

    sizes = {name: 1 + 0.3 * torch.rand(outputs, generator=g) for name, (outputs, _) in modules.items()}
    _write(
        folder / "dora",
        {**common, "use_dora": True},
        tensors | {f"{name}.lora_magnitude_vector": size for name, size in sizes.items()},
    )
    changes["dora"] = {
        name: lambda w, d=2 * up @ down, m=sizes[name]: (w + d) * (m / (w + d).norm(dim=1))[:, None]
        for name, (down, up) in lora.items()
    }

    flora: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        name: (1 + 0.5 * torch.randn(2, inputs, generator=g), 1 + 0.5 * torch.randn(outputs, 2, generator=g))
        for name, (outputs, inputs) in _expert_modules(("w3", "w2")).items()
    }
    support.write_unchecked(folder / "flora", flora)
    changes["flora"] = {name: lambda w, f=(b @ a) / 2: w * f for name, (a, b) in flora.items()}

    ia3 = {name: 1 + 0.5 * torch.randn(1, INNER, generator=g) for name in modules if name.endswith("w2")}
    _write(
        folder / "ia3",
        {"peft_type": "IA3", "target_modules": ["w2"], "feedforward_modules": ["w2"]},
        {f"{name}.ia3_l": scale for name, scale in ia3.items()},
    )
    changes["ia3"] = {name: lambda w, s=scale: w * s for name, scale in ia3.items()}
    return {name: _merged(base, change) for name, change in changes.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_modules_of_experts_are_their_merged_weights(ranks, tmp_path):
    """What is asked of the base (DoRA's norms) is of the whole weights, whatever a rank has of them."""
    model = _saved(tmp_path / "model", _mixtral)
    base = support.load(model).state_dict()
    states: dict[str, support.State] = {"base": base, **_by_module(base, tmp_path)}
    states["both"] = support.save_peft_adapter(model, tmp_path / "both", copy.deepcopy(PARAMETERS["both"]), 3)
    errors = _serve(model, tmp_path, states, **_ranks(ranks))
    assert max(errors.values()) < support.LOGPROB_TOLERANCE, errors


@pytest.mark.slow
def test_compiled_code_serves_merged_experts(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = _saved(tmp_path / "model", _qwen3)
    states: dict[str, support.State] = {"base": support.load(model).state_dict()}
    states["both"] = support.save_peft_adapter(model, tmp_path / "both", copy.deepcopy(PARAMETERS["both"]), 3)
    errors = _serve(model, tmp_path, states, enforce_eager=False, max_num_seqs=8)
    assert max(errors.values()) < support.LOGPROB_TOLERANCE, errors


def _refuse(engine: support.Engine, folder: Path, module: str, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    support.write_unchecked(folder / "refused", {module: factors})
    with pytest.raises(flora_vllm.AdapterError, match=f"'{module}' cannot be adapted: .*absorbed"):
        engine.ask([Ask(PROMPT, folder / "refused")])


def _deepseek(path: Path, **settings: Any) -> Path:
    """MLA in the one size of vLLM's CPU kernel: 512 latent and 64 rotary dimensions."""
    config = transformers.DeepseekV2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        **settings,
    )
    return _saved(path, lambda: transformers.DeepseekV2ForCausalLM(config))


def _plain_answers(folder: Path, base: transformers.PreTrainedModel, merged: support.State) -> list[support.Answer]:
    """Plain vLLM is MLA's oracle, one request at a time: its MLA on CPU differs from transformers, and from itself in
    a batch of two, also without adapters."""
    answers = []
    base.save_pretrained(folder / "base")
    base.load_state_dict(dict(merged))
    base.save_pretrained(folder / "merged")
    for checkpoint in ("base", "merged"):
        with support.running(folder / checkpoint, flora=False) as engine:
            answers += engine.ask([Ask(PROMPT)])
    return answers


def _check(served: Sequence[support.Answer], expected: Sequence[support.Answer]) -> None:
    assert served[0].tokens != served[1].tokens
    for answer, wanted in zip(served, expected, strict=True):
        assert support.difference(answer, wanted) < support.LOGPROB_TOLERANCE


@pytest.mark.slow
def test_mla_serves_all_but_the_absorbed_projection(tmp_path):
    model = _deepseek(tmp_path / "model", first_k_dense_replace=LAYERS)
    base = support.load(model)
    others = [name for name in support.linear_modules(base) if not name.endswith("kv_b_proj")]
    merged = support.write_flora_adapter(base, tmp_path / "others", 3, "mean", seed=1, modules=others)
    absorbed = "model.layers.1.self_attn.kv_b_proj"
    factors = (torch.ones(2, 512), torch.ones(support.linear_modules(base)[absorbed].out_features, 2))
    expected = _plain_answers(tmp_path, base, merged)
    with support.running(model, max_loras=2) as engine:
        _refuse(engine, tmp_path, absorbed, factors)
        assert absorbed in engine.manager().attached.refused
        served = [engine.ask([Ask(PROMPT, path)])[0] for path in (None, tmp_path / "others")]
    _check(served, expected)


@pytest.mark.slow
def test_without_mla_its_projection_is_as_any(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    model = _deepseek(tmp_path / "model", first_k_dense_replace=LAYERS)
    base = support.load(model)
    expected = _plain_answers(tmp_path, base, support.write_flora_adapter(base, tmp_path / "all", 3, "mean", seed=1))
    with support.running(model, max_loras=2) as engine:
        served = [engine.ask([Ask(PROMPT, path)])[0] for path in (None, tmp_path / "all")]
    _check(served, expected)


@pytest.mark.slow
def test_experts_beside_shared_ones_are_their_merged_weights(tmp_path):
    """DeepSeek's: two shared experts in one, beside those that are chosen; the first layer dense."""
    model = _deepseek(
        tmp_path / "model",
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        moe_intermediate_size=INNER,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
    )
    shared = [f"shared_experts.{part}_proj" for part in ("gate", "up", "down")]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_parameters=BOTH, target_modules=["q_proj", *shared])
    merged = support.save_peft_adapter(model, tmp_path / "all", config, 1)
    expected = _plain_answers(tmp_path, support.load(model), merged)
    with support.running(model, max_loras=2) as engine:
        served = [engine.ask([Ask(PROMPT, path)])[0] for path in (None, tmp_path / "all")]
    _check(served, expected)
