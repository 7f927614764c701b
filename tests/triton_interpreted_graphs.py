"""CUDA graphs that hold the op: vLLM's own dispatchers and graph wrapper, our managers, the kernels in the interpreter.

What a GPU would do is stood in for: a capture keeps the kernel launches, a replay launches them again on the same
memory. test_triton_linear.py runs this in a process of its own.
"""

# ruff: noqa: E402 - the check comes before Triton is imported and decides how its kernels run.

import os

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/test_triton_linear.py"

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from ops_support import Case, assert_close
from triton_support import CPU, record_launches, replay

from flora_vllm import step as batch
from flora_vllm.errors import ConfigError, StepError
from flora_vllm.ops.dispatch import DispatchRule
from flora_vllm.ops.terms import SliceTerms, group_by_slot
from flora_vllm.plugin import install

pytestmark = pytest.mark.filterwarnings("ignore")

IN, BUDGET, SIZES = 24, 15, (2, 8)
# Adapter id -> rank of its Hadamard terms; 4 is low-rank terms alone, 5 has no layer on this rank, 6 is a LoRA.
RANKS = {1: 1, 2: 2, 3: 5, 4: 1, 5: 1, 6: 1}
MAX_LORAS = 3


class Graph:
    """Stands for a captured CUDA graph."""

    def __init__(self, launches: Sequence, output: tuple[torch.Tensor, ...]) -> None:
        self._launches = list(launches)
        self.output = output

    def replay(self) -> None:
        for tensor in self.output:
            tensor.fill_(float("nan"))
        replay(self._launches)


class Runner:
    """What a model runner does around a step, with vLLM's mixin, on a model of two linear layers."""

    def __init__(self, config: Any, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any] | None = None) -> None:
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        self.config = config
        self.cases = {"one": Case(torch.float32, IN, (40,)), "two": Case(torch.float32, IN, (16, 8), seed=1)}
        for case in self.cases.values():
            low = SliceTerms(down_RI=case.tensor(3, IN), up_RO=case.tensor(3, case.sizes[0]))
            other = [None] * (len(case.sizes) - 1)
            case.slots += [tuple(case.terms(size, rank) for size in case.sizes) for rank in (1, 2, 5)]
            case.slots += [(low, *other), None, (replace(low, plain_O=torch.ones(1)), *other)]
        self.model = (make or make_model)(self.cases)
        self.mixin: Any = LoRAModelRunnerMixin()
        self.mixin.lora_config = config.lora_config
        self.mixin.load_lora_model(self.model, config, CPU)
        self.manager = self.mixin.lora_manager._adapter_manager
        self.launches = record_launches(monkeypatch)
        self.is_capturing = False
        monkeypatch.setattr(batch, "is_capturing", lambda _: self.is_capturing)
        self.x_TI = torch.zeros(max(SIZES), IN)

    def register_adapters(self) -> None:
        from flora_vllm.plugin.manager import LoadedAdapter

        for number, rank in RANKS.items():
            layers = {name: terms for name, case in self.cases.items() if (terms := case.slots[number]) is not None}
            adapted = self.manager.attached.layers
            rows = max((adapted[name].graph_rows(terms) for name, terms in layers.items()), default=1)
            self.manager.add_adapter(LoadedAdapter(number, rank, layers, rows))

    def run(self, tokens: int) -> tuple[torch.Tensor, ...]:
        return self.model(self.x_TI[:tokens])

    def capture(self, tokens: int) -> Graph:
        """The run before, then the captured one; vLLM sets the stand-in adapters first."""
        first = len(self.launches)
        self.is_capturing = True
        output = self.run(tokens)
        self.is_capturing = False
        return Graph(self.launches[first:], output)

    def set_adapters(self, ids: Sequence[int]) -> int:
        """The number of active adapters of a step whose token t uses `ids[t]`; x is new in every step."""
        from vllm.lora.request import LoRARequest

        self.x_TI[: len(ids)] = self.cases["one"].tensor(len(ids), IN)
        requests = {LoRARequest(f"adapter-{i}", i, "nowhere") for i in ids if i}
        self.mixin._set_active_loras(tuple(ids), tuple(ids), requests)
        return len(requests)

    def verify(self) -> None:
        if (fault := self.manager.take_fault()) is not None:
            raise StepError(fault.reason)

    def check(self, ids: Sequence[int], output: tuple[torch.Tensor, ...]) -> None:
        """The step's output may be used, and is right in every row; rows of padding are base rows."""
        self.verify()
        segments = group_by_slot([*ids, *[0] * (output[0].shape[0] - len(ids))])
        x_TI = self.x_TI[: segments.tokens]
        for case, y_TO in zip(self.cases.values(), output, strict=True):
            assert_close(y_TO, case.reference(x_TI, segments), case.bound("triton", x_TI, segments))


def make_model(cases: dict[str, Case]) -> Any:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
    from vllm.model_executor.models.interfaces import SupportsLoRA

    class Model(torch.nn.Module, SupportsLoRA):
        packed_modules_mapping: ClassVar = {"two": ["left", "right"]}

        def __init__(self) -> None:
            super().__init__()
            settings = {"bias": True, "params_dtype": torch.float32, "disable_tp": True}
            self.one = ReplicatedLinear(IN, 40, **settings, prefix="one")
            self.two = MergedColumnParallelLinear(IN, [16, 8], **settings, prefix="two")

        def forward(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
            """Of rows, or, where the engine tries the model once, of tokens."""
            x_TI = input_ids if input_ids.dim() == 2 else torch.zeros(len(input_ids), IN)
            return self.one(x_TI)[0], self.two(x_TI)[0]

    model: Any = Model()
    for name, case in cases.items():
        layer = getattr(model, name)
        layer.weight.data.copy_(case.weight_OI)
        layer.bias.data.copy_(case.bias_O)
        layer.cpu_linear = torch.nn.functional.linear
    return model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine's config, with CUDA graphs as a GPU's would have them."""
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs

    place = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "dtype": "float32"}
    (place / "config.json").write_text(json.dumps(kind | sizes))
    args = EngineArgs(
        model=str(place), skip_tokenizer_init=True, max_model_len=64, enable_lora=True, max_loras=MAX_LORAS,
        max_cpu_loras=8, max_num_seqs=max(SIZES),
    )  # fmt: skip
    made = args.create_engine_config()
    made.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    made.compilation_config.cudagraph_capture_sizes = list(SIZES)
    made.compilation_config.max_cudagraph_capture_size = max(SIZES)
    return made


@pytest.fixture
def runner(config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    from vllm.config import set_current_vllm_config

    monkeypatch.setenv("FLORA_NATIVE", "0")
    monkeypatch.setattr(
        importlib.import_module("flora_vllm.plugin.attach"), "calibrated_rule", lambda *_, **__: DispatchRule("stacked")
    )
    alone = SimpleNamespace(rank_in_group=0, world_size=1, is_first_rank=True, is_last_rank=True)
    for group in ("_TP", "_PP"):
        monkeypatch.setattr(importlib.import_module("vllm.distributed.parallel_state"), group, alone)
    monkeypatch.setattr(config, "additional_config", {"flora": {"graph_rows": BUDGET}})
    install.install_worker_side()
    # Those of other tests, if they are still there.
    importlib.import_module("flora_vllm.plugin.manager")._managers.clear()
    install._once("cuda graphs", install._keep_adapter_steps_out_of_graphs)
    with set_current_vllm_config(config), torch.inference_mode():
        yield Runner(config, monkeypatch)


class RunnerV1:
    """V1 sets the mapping, then dispatches, then replays through the CUDAGraphWrapper of the mode."""

    def __init__(self, runner: Runner, mode: str = "FULL_DECODE_ONLY") -> None:
        from vllm.compilation.cuda_graph import CUDAGraphEntry, CUDAGraphWrapper
        from vllm.config import CUDAGraphMode
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

        self.runner = runner
        self.dispatcher = CudagraphDispatcher(runner.config)
        self.dispatcher.initialize_cudagraph_keys(CUDAGraphMode[mode])
        self.wrappers: dict[Any, Any] = {}
        for runtime_mode, descs in self.dispatcher.get_capture_descs():
            wrapper: Any = object.__new__(CUDAGraphWrapper)
            fields = {"runtime_mode": runtime_mode, "is_debugging_mode": False, "concrete_cudagraph_entries": {}}
            vars(wrapper).update(fields, runnable=runner.model)
            self.wrappers[runtime_mode] = wrapper
            for desc, is_capture in ((desc, is_capture) for desc in descs for is_capture in (False, True)):
                dispatched = self.dispatch(desc.num_tokens, desc.num_active_loras, desc.uniform)
                assert dispatched == (runtime_mode, desc)
                ones = np.ones(desc.num_tokens, dtype=np.int32)
                with runner.mixin.maybe_dummy_run_with_lora(
                    runner.mixin.lora_config, ones, ones, remove_lora=False, num_active_loras=desc.num_active_loras
                ):
                    if is_capture:
                        graph: Any = runner.capture(desc.num_tokens)
                        entry = CUDAGraphEntry(desc, cudagraph=graph, output=graph.output)
                        wrapper.concrete_cudagraph_entries[desc] = entry
                    else:
                        runner.run(desc.num_tokens)
        runner.mixin.maybe_remove_all_loras(runner.mixin.lora_config)
        runner.register_adapters()

    def dispatch(self, tokens: int, adapters: int, uniform: bool = True) -> tuple[Any, Any]:
        return self.dispatcher.dispatch(tokens, uniform, adapters > 0, adapters)

    def step(self, ids: Sequence[int], uniform: bool = True) -> str:
        """Serve a step, check its output, return how it ran."""
        from vllm.forward_context import override_forward_context

        adapters = self.runner.set_adapters(ids)
        mode, desc = self.dispatch(len(ids), adapters, uniform)
        context: Any = SimpleNamespace(cudagraph_runtime_mode=mode, batch_descriptor=desc)
        launched = len(self.runner.launches)
        wrapper = self.wrappers.get(mode)
        with override_forward_context(context):
            output = (wrapper or next(iter(self.wrappers.values())))(self.runner.x_TI[: desc.num_tokens])
        if wrapper is not None and adapters:
            assert len(self.runner.launches) == launched, "a replay launches nothing new"
            assert output is wrapper.concrete_cudagraph_entries[desc].output
        if wrapper is None or adapters:  # what a graph of the base model holds is not launched by us
            self.runner.check(ids, output)
        return mode.name


class RunnerV2:
    """V2 dispatches, then sets the mapping, then replays through its graph manager."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.config import CUDAGraphMode
        from vllm.platforms import current_platform
        from vllm.v1.worker.gpu import cudagraph_utils, lora_utils

        self.runner, self.mode = runner, CUDAGraphMode
        monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda _: None)
        group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
        monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: group)
        lora, compilation = runner.mixin.lora_config, runner.config.compilation_config
        cases = lora_utils.get_lora_capture_cases(lora, compilation)
        self.graphs: Any = cudagraph_utils.CudaGraphManager(
            runner.config, CPU, CUDAGraphMode.FULL_DECODE_ONLY, 1, lora_capture_cases=cases
        )
        hook = lora_utils.create_lora_capture_hook(lora, runner.mixin)
        assert hook is not None
        with runner.mixin.maybe_setup_dummy_loras(lora):
            for desc in self.graphs._capture_descs[CUDAGraphMode.FULL]:
                numbers = (desc.num_active_loras, desc.num_reqs, desc.num_tokens)
                hook(*numbers)
                runner.run(desc.num_tokens)
                hook(*numbers)
                self.graphs.graphs[desc] = runner.capture(desc.num_tokens)
        self.graphs._graphs_captured = True
        runner.register_adapters()

    def step(self, ids: Sequence[int]) -> str:
        desc = self.graphs.dispatch(len(ids), len(ids), 1, len({i for i in ids if i}))
        adapters = self.runner.set_adapters(ids)
        if desc.cg_mode != self.mode.FULL:
            output = self.runner.run(desc.num_tokens)
        else:
            self.graphs.run_fullgraph(desc)
            output = self.graphs.graphs[desc].output
        if desc.cg_mode == self.mode.NONE or adapters:
            self.runner.check(ids, output)
        return desc.cg_mode.name


def test_v1_replays_steps_that_fit_and_serves_all(runner: Runner) -> None:
    engine = RunnerV1(runner)
    assert runner.manager.rows.tokens.graphs.captured == set(SIZES)
    steps = {
        (0, 0, 0): "FULL",
        (1, 0, 2): "FULL",  # 3 rows of 15, padded to 8 tokens
        (3, 0, 3, 0, 3, 0, 0, 0): "FULL",  # 15
        (3, 3, 3, 1): "NONE",  # 16
        (4, 0, 3): "FULL",  # a low-rank term, and an adapter that took another's slot
        (4, 4, 4, 4, 4, 4, 4, 4): "FULL",
        (5, 0, 1): "FULL",  # an adapter that changes nothing here
        (5, 5): "FULL",
        (3,): "FULL",
        (2, 0): "FULL",
    }
    for ids, mode in steps.items():
        assert engine.step(ids) == mode, ids
    # No graph was captured for mixed batches, nor for so many tokens.
    assert engine.step((1, 2), uniform=False) == "NONE"


def test_mixed_steps_follow_vllms_mode(runner: Runner) -> None:
    """Prefills beside decodes replay piecewise graphs, as they do without adapters, if they fit."""
    engine = RunnerV1(runner, "FULL_AND_PIECEWISE")
    assert engine.step((1, 1, 1, 0, 2), uniform=False) == "PIECEWISE"
    assert engine.step((3, 3, 3, 1), uniform=False) == "NONE"
    assert engine.step((4, 4, 3), uniform=False) == "PIECEWISE"
    assert engine.step((1, 0, 2)) == "FULL"


def test_v2_replays_steps_that_must_fit_and_serves_all(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """This runner does not know the step's adapters when it chooses: the largest rank of any of them counts."""
    engine = RunnerV2(runner, monkeypatch)
    assert runner.manager.rows.tokens.graphs.captured == set(SIZES)
    steps = {
        (0, 0, 0): "FULL",
        (1, 0): "FULL",  # 2 tokens of at most 5 rows
        (3, 2): "FULL",
        (1, 4, 1): "FULL",
        (1, 1, 1, 1): "NONE",  # 4 tokens could need 20
        (5, 0): "FULL",
        (2, 3, 1, 0): "NONE",
    }
    for ids, mode in steps.items():
        assert engine.step(ids) == mode, ids
    runner.manager.remove_adapter(3)
    assert engine.step((1, 2, 4, 0, 2, 1)) == "FULL"  # 6 tokens of at most 2 rows


def test_a_replayed_graph_without_the_op_is_found_out(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output would be the base model's; so would that of a graph that vLLM took for another reason."""
    engine = RunnerV2(runner, monkeypatch)
    runner.manager.rows.tokens.graphs.captured.remove(2)
    with pytest.raises(StepError, match="base model's"):
        engine.step((1, 0))
    assert engine.step((1, 0, 2)) == "FULL"
    base = next(d for d in engine.graphs.graphs if d.num_active_loras == 0 and d.num_tokens == 2)
    runner.set_adapters((1, 2))
    engine.graphs.run_fullgraph(base)
    with pytest.raises(StepError, match="base model's"):
        runner.verify()


def test_a_run_without_requests_replays_base_rows(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's warm-up after the capture sets no mapping; the last step's may be too long for the graph it takes."""
    engine = RunnerV2(runner, monkeypatch)
    runner.set_adapters((1, 2, 3, 0, 1))
    desc = engine.graphs.dispatch(2, 2, 1, MAX_LORAS + 1)
    assert desc.num_tokens == 2
    engine.graphs.run_fullgraph(desc)
    runner.manager.rows.tokens.clear()
    runner.check((0, 0), engine.graphs.graphs[desc].output)


def test_a_model_with_a_layer_that_cannot_be_captured_is_refused(
    config: Any, monkeypatch: pytest.MonkeyPatch, runner: Runner
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"2 layers cannot be captured, the first one: it runs on the torch op"):
        Runner(config, monkeypatch)


def test_graphs_are_the_default(config: Any, monkeypatch: pytest.MonkeyPatch, runner: Runner, caplog: Any) -> None:
    """`auto`: as many rows as hide behind reading W; a model that cannot be captured is served without, said aloud."""
    monkeypatch.setattr(config, "additional_config", {"flora": {}})
    importlib.import_module("flora_vllm.plugin.manager")._managers.clear()
    engine = RunnerV1(Runner(config, monkeypatch))
    assert engine.runner.manager.rows.tokens.graphs.row_budget == 256
    for ids in ((3, 3, 3, 1), (4, 0, 3), (3, 3, 3, 3, 3, 3, 3, 3)):
        assert engine.step(ids) == "FULL", ids
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    without = Runner(config, monkeypatch)
    assert without.manager.rows.tokens.graphs is None
    assert "RUN WITHOUT CUDA GRAPHS" in caplog.text
    assert "it runs on the torch op" in caplog.text


class Eighths:
    """A product with integers and a scale, launched as a kernel is: a graph keeps it and launches it again."""

    def __init__(self, weight_OI: torch.Tensor) -> None:
        self._weight_OI = weight_OI.to(torch.int8)

    def __getitem__(self, _grid: None) -> Callable[..., None]:
        return lambda x_TI, y_TO: y_TO.copy_(torch.nn.functional.linear(x_TI, self._weight_OI.float() / 8))


def test_quantised_layers_replay_steps_of_low_rank_adapters(
    config: Any, monkeypatch: pytest.MonkeyPatch, runner: Runner
) -> None:
    """A base without a readable weight is called once in a graph; a step that needs more of it runs eager."""
    from vllm.model_executor.layers.linear import LinearMethodBase

    launches: list = []
    calls: list[int] = []

    class Method(LinearMethodBase):
        def create_weights(self, *_args: Any, **_kwargs: Any) -> None: ...

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            assert bias is None, "the op adds it"
            y_TO = torch.empty(len(x), layer.eighths._weight_OI.shape[0])
            calls.append(len(x))
            launches.append((layer.eighths, None, (x, y_TO), {}))
            layer.eighths[None](x, y_TO)
            return y_TO

    def quantised(cases: dict[str, Case]) -> Any:
        for case in cases.values():
            case.weight_OI = (case.weight_OI * 8).round() / 8
        model = make_model(cases)
        for name, case in cases.items():
            layer = getattr(model, name)
            layer.eighths, layer.quant_method, layer.bias, case.bias_O = (
                Eighths(case.weight_OI * 8),
                Method(),
                None,
                None,
            )
        return model

    importlib.import_module("flora_vllm.plugin.manager")._managers.clear()
    quantised_runner = Runner(config, monkeypatch, quantised)
    launches = quantised_runner.launches
    quantised_runner.x_TI.normal_()  # rows of padding that are nothing would have no rounding to compare with
    engine = RunnerV1(quantised_runner)
    calls.clear()
    for ids in ((6, 0, 6), (0, 6), (5, 6, 0, 0, 6)):
        assert engine.step(ids) == "FULL", ids
    assert not calls, "replayed"
    assert engine.step((2, 0, 6)) == "NONE"
    assert len(calls) == 2, "once a layer"
    assert calls[0] > 3, "with further rows"
