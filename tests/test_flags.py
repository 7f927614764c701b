"""The engine flag in all its forms, and what it must not change when it is not given."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flora_vllm
from flora_vllm.errors import ConfigError
from flora_vllm.options import fields_of
from flora_vllm.plugin.carried import CarriedOptions, carried
from flora_vllm.plugin.options import FloraOptions, options_of

# vLLM and what it imports warn in this process.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> str:
    return str(tiny_model("llama"))


def parse(*words: str) -> Any:
    """EngineArgs as `vllm serve` makes them of a command line."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(words)))


def engine_config(engine_args: Any) -> Any:
    return engine_args.create_engine_config()


def test_flags_become_options(model: str) -> None:
    args = parse("--model", model, "--enable-flora", "--max-flora-rank", "8", "--flora-path", "stacked")
    assert args.enable_lora
    assert options_of(args.additional_config) == FloraOptions(8, "stacked", None)
    # Where there is no GPU, graphs are off.
    assert options_of(engine_config(args).additional_config) == FloraOptions(8, "stacked", None, graph_rows=0)


def test_defaults(model: str) -> None:
    assert options_of(parse("--model", model, "--enable-flora").additional_config) == FloraOptions()


def test_yaml_config(model: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {model}\nenable-flora: true\nmax-flora-rank: 4\n")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(["serve", "--config", str(file)]))
    assert options_of(args.additional_config) == FloraOptions(max_rank=4)


def test_python_options_imply_lora(model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = engine_config(EngineArgs(model=model, additional_config={"flora": {"path": "modulated"}}))
    assert config.lora_config is not None
    assert isinstance(config.additional_config["flora"], CarriedOptions)


def test_keywords_go_before_the_mapping_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "LLM", lambda **options: options["additional_config"])
    given = {"flora": {"max_rank": 64, "path": "stacked"}, "other": 1}
    assert flora_vllm.LLM("x", additional_config=given) == given
    assert flora_vllm.LLM("x", additional_config=given, max_flora_rank=8) == {
        "flora": {"max_rank": 8, "path": "stacked"},
        "other": 1,
    }
    assert flora_vllm.LLM("x", max_flora_rank=8) == {"flora": {"max_rank": 8}}
    for bad, words in ((["on"], "must be a mapping"), ({"adapter_acl": "acl"}, "adapter_acl .* alone")):
        with pytest.raises(ConfigError, match=words):
            flora_vllm.LLM("x", additional_config={"flora": bad})


def test_what_only_the_http_server_keeps_is_refused_elsewhere(model: str) -> None:
    """In Python, and for the gRPC server, which shares `vllm serve`'s command line."""
    words = r"adapter_acl \(--adapter-acl\) is kept by the HTTP server of `vllm serve` alone"
    with pytest.raises(ConfigError, match=words):
        flora_vllm.LLM("no model", adapter_acl="acl")
    with pytest.raises(ConfigError, match=words):
        parse("--model", "x", "--enable-flora", "--adapter-acl", "acl", "--grpc")
    assert parse("--model", model, "--enable-flora", "--flora-path", "stacked", "--grpc").enable_lora


@pytest.mark.parametrize(
    ("flora", "word"),
    [
        ({"max_ranks": 8}, "max_ranks"),
        ({"max_rank": 0}, "max_rank"),
        ({"max_rank": True}, "max_rank"),
        ({"path": "fast"}, "stacked"),
        ({"adapter_root": 3}, "adapter_root"),
        ({"graph_rows": -1}, "graph_rows"),
        ({"graph_rows": True}, "graph_rows"),
        ("on", "mapping"),
    ],
)
def test_bad_options_are_refused(model: str, flora: Any, word: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ConfigError, match=word):
        engine_config(EngineArgs(model=model, additional_config={"flora": flora}))


def test_an_option_without_the_flag_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="--enable-flora"):
        parse("--model", model, "--max-flora-rank", "8")


def test_fully_sharded_loras_is_accepted_and_does_nothing(model: str, caplog: pytest.LogCaptureFixture) -> None:
    from vllm.engine.arg_utils import EngineArgs

    caplog.set_level("INFO", "flora_vllm")
    config = engine_config(EngineArgs(model=model, fully_sharded_loras=True, additional_config={"flora": {}}))
    assert not config.lora_config.fully_sharded_loras
    assert [record.getMessage() for record in caplog.records if "fully-sharded" in record.getMessage()] == [
        "--fully-sharded-loras has no effect: an adapter takes what its own rank needs, nothing is padded"
    ]


def test_parsed_arguments_carry_the_options_to_processes_without_the_plugin(model: str) -> None:
    """vLLM starts its other API servers and data-parallel ranks with them."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", model, "--enable-flora", "--max-flora-rank", "8"])
    assert options_of(parsed.additional_config) == FloraOptions(8)
    assert parsed.enable_lora
    stock = EngineArgs._flora_wrapped[1](AsyncEngineArgs, pickle.loads(pickle.dumps(parsed)))
    assert options_of(stock.additional_config) == FloraOptions(8)
    assert parse("--model", model, "--enable-flora") == parse("--model", model, "--enable-flora"), (
        "folding again is idle"
    )


def test_the_rust_server_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ConfigError, match="VLLM_USE_RUST_FRONTEND: vLLM's Rust server loads no Python plugins"):
        engine_config(EngineArgs(model=model, additional_config={"flora": {}}))


def test_layers_that_run_on_the_last_tokens_of_a_prompt_are_refused(model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    options = {"model": model, "kv_sharing_fast_prefill": True}
    with pytest.raises(ConfigError, match=r"--kv-sharing-fast-prefill: layers that share .*; leave it out"):
        engine_config(EngineArgs(**options, additional_config={"flora": {}}))
    assert engine_config(EngineArgs(**options)).cache_config.kv_sharing_fast_prefill, "ours alone refuse it"


def test_graphs_with_adapters_are_refused_where_they_cannot_be(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU; on a GPU where graphs are off, or replay where the op would not see it."""
    args = parse("--model", model, "--enable-flora", "--flora-graph-rows", "64")
    assert options_of(args.additional_config) == FloraOptions(graph_rows=64)
    with pytest.raises(ConfigError, match=r"graph_rows .* the device is not an NVIDIA GPU; CUDA graphs are off"):
        engine_config(args)
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    from flora_vllm.plugin.graphs import config_faults, resolve

    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH", raising=False)
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    config: Any = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL, max_cudagraph_capture_size=8),
        parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1, use_ubatching=False),
        speculative_config=None,
        model_config=SimpleNamespace(is_encoder_decoder=False),
    )
    assert config_faults(config) == []
    assert resolve(FloraOptions(), config) == FloraOptions()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    config.parallel_config = SimpleNamespace(data_parallel_size=2, pipeline_parallel_size=2, use_ubatching=True)
    config.speculative_config = object()
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    faults = " ".join(config_faults(config))
    for word in ("graphs are off", "data parallel", "pipeline", "microbatches", "speculative", "breakable"):
        assert word in faults
    # What nobody asked for is said, not refused.
    assert resolve(FloraOptions(), config).graph_rows == 0
    with pytest.raises(ConfigError, match="graphs are off"):
        resolve(FloraOptions(graph_rows=8), config)


def test_without_the_flag_nothing_changes(model: str) -> None:
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    # Another engine of this process uses FLoRA: its replacements are in place.
    engine_config(EngineArgs(model=model, additional_config={"flora": {}}))
    plain, lora = (engine_config(EngineArgs(model=model, enable_lora=on)) for on in (False, True))
    assert plain.lora_config is None
    assert "flora" not in lora.additional_config
    assert lora.compilation_config.mode == CompilationMode.NONE, "vLLM's own choice for LoRA on CPU"
    import torch
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    manager = mixin.LRUCacheWorkerLoRAManager(lora, torch.device("cpu"), {})
    assert type(manager) is LRUCacheWorkerLoRAManager


def test_compile_mode_is_plain_vllms(model: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    plain = engine_config(EngineArgs(model=model))
    flora = engine_config(EngineArgs(model=model, additional_config={"flora": {}}))
    assert flora.compilation_config.mode == plain.compilation_config.mode
    assert flora.compilation_config.backend == plain.compilation_config.backend


def test_options_install_the_worker_side_where_they_arrive(tmp_path: Path) -> None:
    """What a worker process does first is read its config; that alone must put our manager in place, or fail."""
    file = tmp_path / "options.pickle"
    file.write_bytes(pickle.dumps(carried(FloraOptions(max_rank=3))))
    script = (
        "import pickle, sys\n"
        f"options = pickle.load(open({str(file)!r}, 'rb'))\n"
        "from vllm.v1.worker import lora_model_runner_mixin as mixin\n"
        "print(options['max_rank'], mixin.LRUCacheWorkerLoRAManager.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == ["3", "make_worker_manager"], done.stderr

    (tmp_path / "flora_vllm").mkdir()
    (tmp_path / "flora_vllm" / "__init__.py").write_text("raise ImportError('broken')\n")
    broken = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert broken.returncode != 0
    assert "broken" in broken.stderr


def test_help_teaches_the_flags() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parser._search_keyword = "FLoRA"  # as `--help=FLoRA` sets it
    text = parser.format_help()
    shown = " ".join(text.split())
    for flag in ("--enable-flora", *(field.metadata["flag"] for field in fields_of(FloraOptions).values())):
        assert flag in shown
    assert "larger ones are refused. Default: 16. " in shown, "our default, not argparse's None"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flora"], "there is no --flora; --enable-flora"),
        (["--enable-flora", "--max-flora-rank", "0"], "must be a whole number of at least 1, got '0'"),
        (["--enable-flora", "--flora-path", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_mistakes_on_the_command_line_are_usage_errors(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse("--model", "x", *words)
    assert message in capsys.readouterr().err
