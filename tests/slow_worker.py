"""What a test adds to an engine's workers (`worker_extension_cls`): reading adapters can be made to take its time."""

import importlib
import shutil
import threading
import time
from typing import Any


class SlowReads:
    """Mixed into vLLM's Worker."""

    model_runner: Any
    rank: int

    def slow_reads(self, seconds: float) -> None:
        """From now on each reading of an adapter's files takes so much longer."""
        loader: Any = importlib.import_module("flora_vllm.plugin.loader")
        read = self.__dict__.setdefault("_read", loader.collect_files)

        def read_slowly(*args: Any) -> Any:
            self.__dict__.setdefault("_readers", []).append(threading.current_thread().name)
            time.sleep(seconds)
            return read(*args)

        loader.collect_files = read_slowly

    def fail_reads(self, ranks: list[int]) -> None:
        """From now on these ranks, and no others, run out of memory when they read an adapter's files."""
        loader: Any = importlib.import_module("flora_vllm.plugin.loader")
        read = self.__dict__.setdefault("_read", loader.collect_files)

        def fail(*_: Any) -> Any:
            raise MemoryError("of a test")

        loader.collect_files = fail if self.rank in ranks else read

    def readers(self) -> list[str]:
        """Names of the threads that have read since this was asked last."""
        return self.__dict__.pop("_readers", [])

    def lose_copies(self) -> None:
        """The folder of kept copies goes, as by a careless cleaner of the temporary directory."""
        root = self.model_runner.lora_manager._loader._root
        for copy in root.iterdir():
            shutil.rmtree(copy, ignore_errors=True)
