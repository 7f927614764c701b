"""vLLM's own layers of experts, taken over without an engine: what is refused, and what each of some ranks serves."""

import importlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import engine_support as support
import pytest
import torch
from experts_support import CHOSEN, CPU, EXPERTS, HIDDEN, INNER, Layer, low_rank, noise, some_tokens

from flora_vllm.step import Step

# vLLM and what it imports warn: it is imported where the marks hold.
pytestmark = support.ENGINE_MARKS


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Iterator[Any]:
    """vLLM's groups of one process, in which layers can be made without an engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = importlib.import_module("vllm.config")
        parallel = importlib.import_module("vllm.distributed")
    made = config.VllmConfig()
    with config.set_current_vllm_config(made):
        place = tmp_path_factory.mktemp("group") / "file"
        parallel.init_distributed_environment(1, 0, f"file://{place}", 0, backend="gloo")
        parallel.initialize_model_parallel(1, 1)
        yield made
    parallel.cleanup_dist_env_and_memory()


def _runner(settings: Any, prefix: str, rank: int = 0, ranks: int = 1, *, has_bias: bool = False) -> Any:
    """A layer of experts of vLLM's own, as one of so many ranks has it, with weights; 40 inner features, padded.

    Ranks cut the inner features, or have half of the experts each where `settings` enable expert parallelism.
    """
    mixture = importlib.import_module("vllm.model_executor.layers.fused_moe")
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(f"{mixture.__name__}.config.get_tensor_model_parallel_rank", lambda: rank)
        made = mixture.FusedMoEFactory(
            num_experts=EXPERTS,
            top_k=CHOSEN,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            prefix=prefix,
            tp_size=ranks,
            has_bias=has_bias,
        )
    experts, layer = made.routed_experts, Layer("silu")
    has_own = settings.parallel_config.enable_expert_parallel
    whole = EXPERTS if has_own else INNER
    part, every = slice(whole // ranks * rank, whole // ranks * (rank + 1)), slice(None)
    numbers, mine = (part, every) if has_own else (every, part)
    experts.w13_weight.data.copy_(torch.cat([layer.gate[numbers, mine], layer.up[numbers, mine]], 1))
    experts.w2_weight.data.copy_(layer.down[numbers, :, mine])
    experts.quant_method.process_weights_after_loading(experts)
    made.settings = settings
    return made


@pytest.fixture(scope="module")
def runner(settings) -> Any:
    return _runner(settings, "a.experts")


def _why_not(runner: Any, path: Any = "auto", device: str = "cpu") -> str | None:
    from flora_vllm.plugin.experts import why_not_adapted

    return why_not_adapted(runner, path, torch.device(device))


def test_what_cannot_be_told_exactly_is_refused(runner, monkeypatch):
    assert _why_not(runner) is None
    experts = runner.routed_experts
    assert "on CPUs and NVIDIA GPUs only" in str(_why_not(runner, device="xpu"))
    assert "'modulated'" in str(_why_not(runner, "modulated"))
    for holder, name, value, reason in (
        (experts.moe_config.moe_parallel_config, "tp_size", 2, "this layout"),
        (experts.moe_config.moe_parallel_config, "ep_size", 2, "cannot run some of the experts"),
        (experts.moe_config.moe_parallel_config, "dp_size", 2, "between ranks"),
        (experts.moe_config.moe_parallel_config, "enable_eplb", True, "between ranks"),
        (experts, "global_num_experts", EXPERTS + 1, "not all routed experts"),
        (experts, "activation", SimpleNamespace(value="relu2"), "activation relu2"),
        (experts, "swiglu_limit", 7.0, "activation silu and limits of its own"),
        (experts.moe_config, "hidden_dim_unpadded", HIDDEN - 1, "this layout"),
        (experts.quant_method.moe_kernel.fused_experts, "_use_zentorch", True, "run on CPUUnquantizedExperts"),
        (experts.quant_method.moe_kernel.fused_experts, "isa", "none", "not known"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(holder, name, value)
            if name == "isa":
                changed.setattr("flora_vllm.plugin.experts.packing", lambda isa, _dtype: None if isa == "none" else 1)
            assert reason in str(_why_not(runner)), name


def test_a_layer_of_vllms_is_taken_over(runner):
    """Its own call where no adapter has terms, the merged weights where one has; also traced before any had."""
    from vllm.forward_context import set_forward_context

    from flora_vllm.plugin.experts import take_over

    logits = noise(5, EXPERTS, seed=11)
    x = noise(5, HIDDEN, seed=7)

    def run() -> torch.Tensor:
        with set_forward_context(None, runner.settings, num_tokens=5):
            return runner(x, logits)

    stock, step, layer = run(), Step(), Layer("silu")
    taken = take_over("a.experts", runner, step, CPU)
    assert not isinstance(taken, str)
    traced = torch.compile(run, backend="eager")
    assert torch.equal(run(), stock)
    assert torch.equal(traced(), stock)
    terms, delta = low_rank(INNER, HIDDEN, seed=20)
    for number in range(EXPERTS):
        taken.layers[f"a.experts.{number}.gate_proj+up_proj"].write_slot(1, (None, terms))
    step.set_mapping([3, 0, 3, 0, 0], {3: 1})
    weights, chosen = torch.softmax(logits, -1).topk(CHOSEN)
    weights = weights / weights.sum(-1, keepdim=True)
    merged = layer.fused(x, weights, chosen, layer.packed_with(layer.gate, layer.up + delta, layer.down))
    for served in (run(), traced()):
        assert torch.equal(served[[1, 3, 4]], stock[[1, 3, 4]])
        torch.testing.assert_close(served[[0, 2]], merged[[0, 2]], rtol=1e-4, atol=1e-5)
    assert (merged - stock).abs().max() > 0.1


def test_on_a_gpu_only_the_kernel_that_keeps_the_checkpoints_order_can_be_adapted(runner, monkeypatch):
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    assert "CPUUnquantizedExperts orders" in str(_why_not(runner, device="cuda"))
    method = runner.routed_experts.quant_method
    triton = SimpleNamespace(fused_experts=object.__new__(TritonExperts), is_monolithic=False)
    triton.can_overlap_shared_experts = False
    monkeypatch.setattr(method, "moe_kernel", triton)
    assert _why_not(runner, device="cuda") is None
    triton.is_monolithic = True
    assert "start the server with --moe-backend triton" in str(_why_not(runner, device="cuda"))


def test_experts_that_are_not_what_their_kernel_computes_are_found_out(runner, monkeypatch):
    """What stands between an unknown order of weights and a wrong answer on a device."""
    from flora_vllm.plugin.experts import why_unlike

    layer = Layer("silu")
    fused, experts = layer.adapted(Step())
    numbers = [*range(EXPERTS)]
    assert why_unlike(fused, runner.routed_experts, numbers, CPU) is None
    layer.packed = layer.packed_with(layer.up, layer.gate, layer.down)  # of the kernel alone
    assert "away from their kernel" in str(why_unlike(fused, runner.routed_experts, numbers, CPU))
    monkeypatch.setattr(experts[0].down, "forward", lambda *_: torch.full((1, HIDDEN), float("nan")))
    assert "away from their kernel" in str(why_unlike(fused, runner.routed_experts, numbers, CPU))
    layer.packed = SimpleNamespace()
    assert "could not be tried" in str(why_unlike(fused, runner.routed_experts, numbers, CPU))


def _adapter(layer: Layer) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Terms of three of the four experts' layers; gate, up and down with them."""
    from flora_vllm.adapter import ModuleTerms
    from flora_vllm.terms import Added

    merged = [layer.gate.clone(), layer.up.clone(), layer.down.clone()]
    modules = {}
    for number in (0, 1, 3):
        for seed, (name, weight) in enumerate(zip(("gate_proj", "up_proj", "down_proj"), merged, strict=True)):
            terms, delta = low_rank(*weight.shape[1:], seed=10 * number + 2 * seed)
            assert terms.down_RI is not None
            assert terms.up_RO is not None
            added = Added(terms.down_RI, terms.up_RO.T.contiguous(), 1.0)
            modules[f"experts.{number}.{name}"] = ModuleTerms((added,))
            weight[number] += delta
    return modules, merged


def _served(runner: Any, modules: Any, ids: list[int], tokens: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Any]:
    """What this rank gives, with its part of the terms in slot 1, and what was taken over."""
    from flora_vllm.plugin.experts import take_over
    from flora_vllm.slots import layer_terms

    step = Step()
    taken = take_over("experts", runner, step, CPU)
    assert not isinstance(taken, str)
    for name, made in taken.layers.items():
        made.write_slot(1, layer_terms(taken.layouts[name], modules, torch.float32))
    step.set_mapping(ids, {1: 1})
    return runner.routed_experts.quant_method.apply(runner.routed_experts, *tokens), taken


def test_ranks_sum_to_the_merged_weights(settings):
    """Each of two tensor-parallel ranks with its part of the weights and of the adapter's terms."""
    layer = Layer("silu")
    modules, merged = _adapter(layer)
    x, weights, chosen = some_tokens(12)
    tokens = x, weights, chosen.int()
    total, stock = torch.zeros(12, HIDDEN), layer.fused(*tokens)
    for rank in (0, 1):
        served, taken = _served(_runner(settings, f"{rank}.experts", rank, 2), modules, [1, 0] * 6, tokens)
        assert taken.layouts["experts.0.down_proj"].adds_bias == (rank == 0)
        total += served
    wanted = layer.fused(*tokens, layer.packed_with(*merged))
    assert (wanted - stock).abs().max() > 0.1
    torch.testing.assert_close(total[::2], wanted[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total[1::2], stock[1::2], rtol=1e-4, atol=1e-5)


def test_terms_that_change_the_last_bias_know_what_all_ranks_add(settings, monkeypatch):
    from flora_vllm.plugin.experts import take_over

    monkeypatch.setattr("flora_vllm.plugin.experts.tensor_model_parallel_all_reduce", lambda mine: mine.add_(2))
    runner = _runner(settings, "bias.experts", 0, 2, has_bias=True)
    runner.routed_experts.w2_bias.data.fill_(1)
    taken = take_over("experts", runner, Step(), CPU)
    assert not isinstance(taken, str)
    bias_O = taken.biases["experts.0.down_proj"]
    assert bias_O is not None
    assert (bias_O == 3).all()
    assert (runner.routed_experts.w2_bias == 1).all()  # which the kernel and the layers add


def test_each_rank_serves_its_own_experts(settings, monkeypatch):
    """Expert parallelism. All rows have terms here: vLLM's CPU kernel, which others take, knows no part of experts."""
    from flora_vllm.plugin.attach import Attached
    from flora_vllm.plugin.model_layout import model_layout
    from flora_vllm.plugin.probe import EngineBase

    layer = Layer("silu")
    modules, merged = _adapter(layer)
    tokens = some_tokens(12)
    monkeypatch.setattr(settings.parallel_config, "enable_expert_parallel", True)
    total = torch.zeros(12, HIDDEN)
    for rank in (0, 1):
        runner = _runner(settings, f"own.{rank}.experts", rank, 2)
        assert "--enable-expert-parallel" in str(_why_not(runner))
        served, taken = _served(runner, modules, [1] * 12, tokens)
        total += served
        attached = Attached(
            layers=dict(taken.layers),
            layouts=taken.layouts,
            dtypes=dict.fromkeys(taken.layouts, torch.float32),
            biases=taken.biases,
            experts={"experts": taken.names},
            elsewhere=taken.elsewhere,
        )
        model: Any = SimpleNamespace()
        assert len(model_layout(attached, model).shapes) == 3 * EXPERTS
        # The base of its own experts is asked of this rank alone: the other waits for nothing.
        base = EngineBase(attached, CPU, dict, lambda _: False)
        own, other = 2 * rank, 2 - 2 * rank
        assert base.holds(f"experts.{own}.up_proj")
        assert not base.holds(f"experts.{other}.up_proj")
        with monkeypatch.context() as alone:
            alone.setattr("flora_vllm.plugin.probe.get_tensor_model_parallel_world_size", lambda: 2)
            alone.setattr("flora_vllm.plugin.probe.tensor_model_parallel_all_reduce", None)
            weight = base.probe("up", f"experts.{own}.up_proj").weight()
        torch.testing.assert_close(weight, layer.up[own])
    torch.testing.assert_close(total, layer.fused(*tokens, layer.packed_with(*merged)), rtol=1e-4, atol=1e-5)


def test_experts_are_found_by_the_names_of_checkpoints_and_of_transformers(runner):
    """A mapper whose names of parameters look like those of an expert's layers (gpt-oss) does not touch these."""
    from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

    from flora_vllm.plugin.attach import Attached
    from flora_vllm.plugin.experts import take_over
    from flora_vllm.plugin.model_layout import model_layout

    path = "model.layers.0.block_sparse_moe.experts"
    taken = take_over(path, runner, Step(), CPU)
    assert not isinstance(taken, str)
    attached = Attached(layouts=taken.layouts, experts={path: taken.names})
    model: Any = SimpleNamespace(hf_to_vllm_mapper=GptOssForCausalLM.hf_to_vllm_mapper)
    layout = model_layout(attached, model)
    for name in ("block_sparse_moe", "mlp"):
        assert layout.rename(f"model.layers.0.{name}.experts") == path
        assert layout.rename(f"layers.0.{name}.experts.2.down_proj") == f"{path}.2.down_proj"
        assert layout.shape_of(f"model.layers.0.{name}.experts.3.down_proj") == (HIDDEN, INNER)
    assert layout.shape_of("model.layers.1.mlp.experts.3.down_proj") is None
