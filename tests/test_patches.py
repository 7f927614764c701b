"""patches/: each seam we replace has a diff that applies, is still needed, and makes our replacement step aside."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
from vllm_sources import REPOSITORY, Sources, copied_files, installed_package, source_package

from flora_vllm.plugin import hooks

PATCHES = REPOSITORY / "patches"
_SERVING = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
VERSIONS = ("0.31", "0.32", "0.33")
LORA_OPS = "vllm/lora/ops/torch_ops/lora_ops.py"
# Where a fix of vLLM's own stands in the place of ours, the diff no longer applies: that is how it is seen.
FIXED_ELSEWHERE = {"0002"}
# Seams that we replace and have no diff for yet: failing a step's requests, the bounded series of adapters in metrics,
# the route that takes an adapter's files, the sleep that would lose slots, the gate in front of the API, the output
# layer's rows when a prompt's logprobs are asked for, the turns of adapters that wait for a slot and of tenants, a
# request's span, its tokens by adapter, loads that hold up no step, encoder runs of one adapter each, the status of a
# server whose engine died, the tables of stored responses, the adapters of a server that is started again, which
# adapters handlers may still ask with, what the speech server aborts, new weights where the old are packed.
WITHOUT_DIFF = {
    "vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait",
    "vllm.entrypoints.launchers.api_server.entry:build_and_serve",
    "vllm.entrypoints.launchers.app:init_entrypoints_middleware",
    "vllm.entrypoints.llm:LLM._run_engine",
    "vllm.entrypoints.llm:LLM._run_tiling_engine",
    f"{_SERVING}.__init__",
    f"{_SERVING}.init_static_loras",
    "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.__init__",
    "vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters",
    "vllm.entrypoints.serve.exception_handling.error_response:sanitize_message",
    "vllm.entrypoints.serve.exception_handling.handlers.http:sanitize_message",
    "vllm.entrypoints.serve.exception_handling.handlers.validation:clean_loc_for_param",
    "vllm.entrypoints.serve.exception_handling.handlers.validation:sanitize_message",
    "vllm.entrypoints.serve.lora.api_router:attach_router",
    "vllm.entrypoints.speech_to_text.base.serving:SpeechToTextBaseServing.__init__",
    "vllm.entrypoints.speech_to_text.base.serving:SpeechToTextBaseServing._maybe_get_adapters",
    "vllm.entrypoints.speech_to_text.realtime.connection:sanitize_message",
    "vllm.v1.core.sched.scheduler:Scheduler.__init__",
    "vllm.v1.core.sched.scheduler:Scheduler._handle_blocked_waiting_request",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "vllm.v1.engine.core:EngineCoreProc._process_input_queue",
    "vllm.v1.engine.core:EngineCoreProc.add_lora",
    "vllm.v1.engine.core:EngineCoreProc.add_request",
    "vllm.v1.engine.core:EngineCoreProc.has_work",
    "vllm.v1.engine.core:EngineCoreProc.remove_lora",
    "vllm.v1.executor.abstract:Executor.add_lora",
    "vllm.v1.executor.abstract:Executor.pin_lora",
    "vllm.v1.engine.async_llm:AsyncLLM._add_request",
    "vllm.v1.engine.async_llm:AsyncLLM.sleep",
    "vllm.v1.engine.llm_engine:LLMEngine.sleep",
    "vllm.v1.engine.output_processor:OutputProcessor._update_stats_from_finished",
    "vllm.v1.engine.output_processor:OutputProcessor._update_stats_from_output",
    "vllm.v1.engine.output_processor:OutputProcessor.do_tracing",
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
    "vllm.v1.engine.output_processor:instrument_manual",
    "vllm.v1.metrics.loggers:PrometheusStatLogger.__init__",
    "vllm.v1.worker.gpu.mm.encoder_runner:group_and_batch_mm_kwargs",
    "vllm.v1.worker.gpu.model_runner:set_active_mm_loras",
    "vllm.v1.worker.gpu_model_runner:group_and_batch_mm_kwargs",
    "vllm.v1.engine.core:EngineCore.collective_rpc",
    "vllm.v1.worker.gpu_worker:Worker.add_lora",
    "vllm.v1.worker.gpu_worker:Worker.pin_lora",
    "vllm.v1.worker.gpu_worker:Worker.reload_weights",
    "vllm.v1.worker.gpu_worker:Worker.start_weight_update",
    "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs",
    "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_token_id_logprobs",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",
}
# These a patch replaces, and tenants' checks stand around them whoever wrote what is inside.
GUARDED = {f"{_SERVING}.{name}" for name in ("load_lora_adapter", "unload_lora_adapter", "resolve_lora")}


@dataclass(frozen=True)
class Entry:
    """One row of the ledger; fields as explained at its top."""

    file: str
    symbols: list[str]
    replaces: list[str]
    why: str
    applies_to: list[str]
    upstream: str
    goes_when: str
    replaced_by: str
    probe: str
    after: list[str] = field(default_factory=list)

    @property
    def number(self) -> str:
        return self.file.split("-")[0]

    @property
    def text(self) -> str:
        return (PATCHES / self.file).read_text()

    @property
    def touched(self) -> list[str]:
        return re.findall(r"^\+\+\+ b/(\S+)$", self.text, re.MULTILINE)


LEDGER = [Entry(**row) for row in tomllib.loads((PATCHES / "ledger.toml").read_text())["patch"]]
ALL = pytest.mark.parametrize("entry", LEDGER, ids=lambda entry: entry.number)


def package_of(minor: str) -> Path:
    installed = hooks.vllm_version().startswith(f"{minor}.")
    return installed_package() if installed else source_package(minor)


def apply(patches: list[Entry], tree: Path) -> str:
    """Apply the diffs in order, exactly (no fuzz); the first complaint, or nothing."""
    # Without a ceiling git would take a repository above `tree` for the one meant and skip what is not in it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    for entry in patches:
        command = ["git", "apply", "--whitespace=error-all", str(PATCHES / entry.file)]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return done.stderr
    return ""


def stack(entry: Entry) -> list[Entry]:
    return [*(below for below in LEDGER if below.number in entry.after), entry]


def test_ledger_and_files_agree_both_ways():
    assert sorted(path.name for path in PATCHES.iterdir()) == sorted([*(e.file for e in LEDGER), "ledger.toml"])
    assert [entry.number for entry in LEDGER] == [f"{n:04}" for n in range(1, len(LEDGER) + 1)]


@ALL
def test_entry_says_what_it_must(entry):
    assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.patch", entry.file)
    for text in (entry.why, entry.upstream, entry.goes_when):
        assert len(text) > 8
    assert re.match(r"not filed$|https://github\.com/vllm-project/vllm/(issues|pull)/\d+", entry.upstream)
    assert set(entry.applies_to) <= set(VERSIONS)
    assert "0.32" in entry.applies_to
    assert all(below < entry.number for below in entry.after)


@ALL
def test_patch_is_small_and_says_why(entry):
    head, _, diff = entry.text.partition("\ndiff --git ")
    assert re.match(r"Subject: \[PATCH\] (\[\w+\])+ .{20,70}\n\n.{40,}", head)
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?!\+\+|--)", line)]
    assert 0 < len(changed) < 80
    assert max(len(line) for line in changed) <= 89  # vLLM's own limit, and the sign


@ALL
def test_named_symbols_exist_in_touched_files_and_in_our_code(entry):
    vllm, ours = Sources(installed_package()), Sources(REPOSITORY / "flora_vllm")
    for symbol in (*entry.symbols, *entry.replaces):
        assert vllm.find(symbol) is not None, symbol
    for symbol in entry.symbols:
        assert symbol.partition(":")[0].replace(".", "/") + ".py" in entry.touched
    assert ours.find(entry.replaced_by) is not None, entry.replaced_by


@pytest.mark.parametrize("minor", VERSIONS)
@ALL
def test_patch_applies_exactly_to_the_versions_it_claims(entry, minor, tmp_path):
    patches = stack(entry)
    tree = copied_files(package_of(minor), sorted({f for e in patches for f in e.touched}), tmp_path)
    complaint = apply(patches, tree)
    assert (complaint == "") == (minor in entry.applies_to), complaint
    for name in entry.touched if not complaint else ():
        compile((tree / name).read_text(), name, "exec")


def test_all_patches_apply_in_order(tmp_path):
    tree = copied_files(installed_package(), sorted({f for e in LEDGER for f in e.touched}), tmp_path)
    assert apply(LEDGER, tree) == ""


@ALL
def test_patch_is_still_needed(entry, tmp_path):
    """Fails on the day vLLM has the hook: then the diff, its row and our replacement go."""
    if not entry.probe:
        assert entry.number in FIXED_ELSEWHERE
        return
    patches = stack(entry)
    assert Sources(installed_package()).find(entry.probe) is None, f"{entry.probe} is there: {entry.file} can go"
    tree = copied_files(installed_package(), sorted({f for e in patches for f in e.touched}), tmp_path)
    assert apply(patches, tree) == ""
    assert Sources(tree / "vllm").find(entry.probe) is not None


# The index of rows without an adapter; the last of three slots is in use, and must not be theirs.
INDICES = torch.tensor([-1, 0, -1, 2])


def lora_ops(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_ops_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base_rows_changed(ops: ModuleType, add_inputs: bool) -> list[bool]:
    """For shrink, expand and expand_slice: whether a row without an adapter came out other than it went in."""
    torch.manual_seed(0)
    x_TI, a_SRI, b_SOR = torch.randn(4, 6), torch.randn(3, 1, 2, 6), torch.randn(3, 1, 5, 2)
    before_TO = torch.randn(4, 8)
    shrunk_TR = torch.zeros(4, 2)
    ops.bgmv_shrink(x_TI, a_SRI, shrunk_TR, INDICES, 0.5)
    expanded_TO, sliced_TO = before_TO.clone(), before_TO.clone()
    ops.bgmv_expand(torch.ones(4, 2), b_SOR, expanded_TO, INDICES, add_inputs)
    ops.bgmv_expand_slice(torch.ones(4, 2), b_SOR, sliced_TO, INDICES, 3, 5, add_inputs)
    for row in (1, 3):
        slot = int(INDICES[row])
        wanted_R = 0.5 * a_SRI[slot, 0] @ x_TI[row]
        wanted_O = b_SOR[slot, 0].sum(1)
        torch.testing.assert_close(shrunk_TR[row], wanted_R)
        torch.testing.assert_close(expanded_TO[row, :5], wanted_O + add_inputs * before_TO[row, :5])
        torch.testing.assert_close(sliced_TO[row, 3:], wanted_O + add_inputs * before_TO[row, 3:])
    base = INDICES < 0
    pairs = ((shrunk_TR, torch.zeros(4, 2)), (expanded_TO, before_TO), (sliced_TO, before_TO))
    return [not torch.equal(after[base], before[base]) for after, before in pairs]


@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("minor", VERSIONS)
def test_index_fix_leaves_rows_without_adapter_alone_where_vllm_does_not(minor, add_inputs, tmp_path):
    entry = next(e for e in LEDGER if e.number == "0002")
    tree = copied_files(package_of(minor), [LORA_OPS], tmp_path)
    needs_fix = minor in entry.applies_to
    assert base_rows_changed(lora_ops(tree / LORA_OPS), add_inputs) == [needs_fix] * 3
    if needs_fix:
        assert apply([entry], tree) == ""
        assert base_rows_changed(lora_ops(tree / LORA_OPS), add_inputs) == [False] * 3


def overlay(tree: Path) -> Path:
    """A `vllm` package of links to the installed one, with the files that diffs change as copies."""
    package = installed_package()
    touched = {Path(f) for e in LEDGER for f in e.touched}
    for folder in sorted({parent for f in touched for parent in f.parents if parent != Path()}):
        (tree / folder).mkdir()
    for folder in {parent for f in touched for parent in f.parents if parent != Path()}:
        for item in (package.parent / folder).iterdir():
            place = tree / folder / item.name
            if not place.exists() and folder / item.name not in touched and item.name != "__pycache__":
                place.symlink_to(item)
    return copied_files(package, sorted(map(str, touched)), tree)


def run_plugin(*first_on_path: Path) -> dict:
    """The report of tests/patched_vllm.py in a process of its own."""
    symbols = [symbol for entry in LEDGER for symbol in (*entry.symbols, *entry.replaces)]
    path = os.pathsep.join(map(str, (*first_on_path, REPOSITORY)))
    settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    script = Path(__file__).parent / "patched_vllm.py"
    command = [sys.executable, str(script), json.dumps(symbols)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    reports = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(reports[0].removeprefix("REPORT "))


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> tuple[dict, dict]:
    """(vLLM as installed, with every diff applied)."""
    tree = overlay(tmp_path_factory.mktemp("patched"))
    assert apply(LEDGER, tree) == ""
    stock, patched = run_plugin(), run_plugin(tree)
    assert stock["vllm"] == str(installed_package() / "__init__.py")
    assert patched["vllm"] == str(tree / "vllm" / "__init__.py")
    return stock, patched


def test_ledger_lists_everything_we_replace(reports):
    listed = {symbol for entry in LEDGER for symbol in entry.replaces}
    assert (listed | WITHOUT_DIFF) ^ set(reports[0]["replaced"]) == set()


def test_every_replacement_steps_aside_where_its_patch_is_applied(reports):
    assert set(reports[1]["replaced"]) ^ (WITHOUT_DIFF | GUARDED) == set()


def test_what_we_ask_vllm_for_is_what_the_patches_add(reports):
    wanted = sorted({entry.probe for entry in LEDGER if entry.probe})
    assert reports[0]["probes"] == reports[1]["probes"] == wanted


def test_hooks_hold_on_patched_vllm_too(reports):
    assert reports[0]["faults"] == reports[1]["faults"] == []


@pytest.mark.parametrize("part", ["options", "serving", "preload", "graphs", "encoder", "speech", "activation"])
def test_plugin_does_the_same_through_vllms_hooks_as_by_replacement(reports, part):
    stock, patched = (report["results"][part] for report in reports)
    assert stock == patched


def test_what_is_compared_is_what_serving_needs(reports):
    results = reports[0]["results"]
    options = dict(results["options"])
    assert "mode=NONE" in options["lora alone"]
    assert options["flora"] == options["flora by config"]
    assert options["flora"].split(" {")[0] == options["no adapters"].replace("lora=False", "lora=True").split(" {")[0]
    assert all(options[name].startswith("refused: ") for name in ("rank without flora", "bad rank"))
    assert options["sharded"] == options["flora"].replace("'max_rank': 4", "'max_rank': 16")
    assert options["weights"] == [[True, True, False], [False, False, False]]
    assert options["managers"] == ["FloraWorkerManager", "LRUCacheWorkerLoRAManager"]
    assert options["experts"] == ["refused: experts with LoRA: False", "refused: experts with LoRA: True"]
    told = ["run", [3, 4], "replay", "run", "run", [1, 4], "replay"]
    assert results["graphs"] == ["FULL", "FULL", "NONE", "NONE", "FULL", "FULL", *told]
    assert results["speech"] == {"a": "one", "base": None}
    blocks, *by_runner = results["activation"]
    assert blocks[2:7] == ["bbb-", "bbb", "bb--", "---", "b---"]  # as patched_activation.py explains
    assert blocks[7:] == [
        "its prompt has embeddings in place of tokens",
        "its prompt comes in pieces (a streaming session)",
    ]
    assert by_runner == [[["000000000000001122222222", 0, 1, 2], ["001122", 0, 1, 2]]] * 2
    rows, *orders = results["encoder"]
    assert rows == ["TOWER", "CONNECTOR", "LANGUAGE", None, 100, 100]
    assert orders == [["new", "old"], [[2, 2, 1, 1], [2, 2, 1, 1]], ["new", "old"]]
    # Loaded twice, reloaded by content while a request runs, released once it finished; a faulty adapter is a 400.
    *answers, calls = results["serving"]
    released = ["add one inplace=False", "add two inplace=False", "finished", "remove one"]
    assert calls[:4] == released
    assert calls[-2:] == ["given back", "remove two"], "who was lent it may still ask"
    assert [400, True] in answers
    assert ["base", "a"] in answers
    loaded = ["add one inplace=False", "add bad inplace=False", "remove one", 2]
    assert results["preload"] == [True, loaded, True, loaded]
