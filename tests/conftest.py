"""What every test may count on: no network, seeded torch, tiny models made once, the real ones cached.

The environment is set before anything imports torch, transformers or vLLM: they read it once. It is inherited by
every engine and server that a test starts.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
    # vLLM's default pins every engine to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # A forked engine would inherit this process's threads in the middle of their work.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
if "PYTEST_XDIST_WORKER" in os.environ:
    # It inherits what its controller has set, and shares the cores with the other workers.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402  (the environment comes first)
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cache_directory() -> Path:
    """Where models are kept between test runs: FLORA_CACHE or .cache of the repository."""
    from flora_vllm.environment import cache_root

    return cache_root()


@pytest.fixture(scope="session")
def smollm2_dir(cache_directory: Path) -> Path:
    """SmolLM2-135M-Instruct, bfloat16; downloaded by the first test that needs it."""
    from flora_vllm.demo.model_assets import fetch_smollm2

    with _alone(cache_directory):
        return fetch_smollm2(cache_directory / "smollm2")


@pytest.fixture(scope="session")
def whisper_base_dir(cache_directory: Path) -> Path:
    """Whisper-base, float16; downloaded by the first test that needs it."""
    from flora_vllm.demo.model_assets import fetch_whisper_base

    with _alone(cache_directory):
        return fetch_whisper_base(cache_directory / "whisper-base")


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Of several workers one fetches, the others wait."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model("llama")`: the directory of a tiny float32 model of that kind (see tiny_models.py), made once."""
    from tiny_models import TINY_MODELS

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = TINY_MODELS[kind](tmp_path_factory.mktemp(f"tiny-{kind}"))
        return made[kind]

    return get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, engines next, clusters last; GPU tests are skipped aloud where there is no GPU."""
    order = {"slow": 1, "engine": 2, "cluster": 3}
    items.sort(key=lambda item: max((order[m.name] for m in item.iter_markers() if m.name in order), default=0))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
