"""Turning the flag on costs a LoRA user nothing: one sequence of calls, through stock vLLM's real server and ours.

Every answer has stock's status, error type, phrases that clients match, fields and, where tokens were generated,
stock's tokens and logprobs; or it is an intended difference, with its reason in conformance_differences.py.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import conformance
import conformance_hub
import peft
import pytest
from conformance_calls import CASES, RANK, Case, Reply, Session, write_faulty
from conformance_differences import CALLS
from engine_support import LOGPROB_TOLERANCE, save_peft_adapter
from server_support import BASE, TINY_OPTIONS

from flora_vllm.commands.server_process import ServerProcess

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

OPTIONS = (*TINY_OPTIONS, "--max-lora-rank", str(2 * RANK), "--max-loras", "2", "--max-cpu-loras", "4")
# What differs between any two answers, or servers: the fingerprint is of the engine's configuration.
_OF_THE_MOMENT = {"id", "created", "created_at", "completed_at", "request_id", "system_fingerprint"}
Recorded = dict[str, Reply]


def _record(model: Path, folder: Path, *, flora: bool) -> Recorded:
    adapters = {"lora": folder / "lora"}
    with (
        ServerProcess(model, adapters, flora=flora, served_name=BASE, options=OPTIONS, quiet=True) as server,
        contextlib.closing(Session(server.url, folder)) as session,
    ):
        return {case.name: case.call(session) for case in CASES}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("lora", "other")):
        config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        save_peft_adapter(tiny_model("llama"), folder / name, config, seed)
    write_faulty(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(tiny_model: Callable[[str], Path], folder: Path) -> tuple[Recorded, Recorded]:
    """Stock's answers and ours. The two servers start together: most of that is waiting for imports."""
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, environment), ThreadPoolExecutor(2) as pool:
        stock, ours = (pool.submit(_record, tiny_model("llama"), folder, flora=flora) for flora in (False, True))
        return stock.result(), ours.result()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answers_as_stock_does(case: Case, recorded: tuple[Recorded, Recorded]) -> None:
    theirs, mine = (answers[case.name] for answers in recorded)
    difference = CALLS.get(case.name)
    if difference is not None:
        assert (theirs.status, theirs.kind) == difference.stock, theirs.message
        assert (mine.status, mine.kind) == difference.ours, mine.message
        assert difference.stock != difference.ours, "no difference any more"
    else:
        assert (mine.status, mine.kind) == (theirs.status, theirs.kind), (theirs.message, mine.message)
    assert case.phrase in theirs.message, f"stock no longer says so: {theirs.message}"
    if (theirs.status < 400) == (mine.status < 400):
        assert case.phrase in mine.message
    if theirs.status < 400 and mine.status < 400:
        assert list(_unlike(theirs.body, mine.body, "")) == []


def test_every_difference_is_of_a_case() -> None:
    assert CALLS.keys() <= {case.name for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.slow
def test_what_passes_of_vllms_own_tests_passes_with_the_flag(cache_directory: Path, tmp_path: Path) -> None:
    """Those that start no engine; `make conformance` has the others."""
    tree = conformance.upstream_tree(cache_directory)
    conformance_hub.write_hub(tmp_path)
    assert conformance.compare(tree, tmp_path, conformance.QUICK) == []


def _unlike(one: Any, other: Any, path: str) -> Iterator[str]:
    """Places where two JSON values differ; numbers by more than rounding."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in one.keys() | other.keys():
            if key not in _OF_THE_MOMENT:
                yield from _unlike(one.get(key, "left out"), other.get(key, "left out"), f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _unlike(a, b, f"{path}/{i}")
    elif isinstance(one, float) and isinstance(other, float):
        if abs(one - other) > LOGPROB_TOLERANCE:
            yield f"{path}: {one} {other}"
    elif one != other:
        yield f"{path}: {one!r} {other!r}"
