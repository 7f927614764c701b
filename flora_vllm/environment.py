"""Environment variables of ours, all of them, and the one place where things are kept between runs.

Everything else is an option. `flora-vllm --help` prints the table; a test compares it with the names in the source.
"""

import os
from pathlib import Path

VARIABLES = {
    "FLORA_CACHE": "where models, builds and measurements are kept (default: .cache in a clone, else flora-vllm in "
    "$XDG_CACHE_HOME or ~/.cache)",
    "FLORA_NATIVE": "native CPU kernels: auto (default), 1 (fail where they cannot be built), 0 (never)",
    "FLORA_TUNE": "1 times a few launch parameters for each layer shape on the GPU at hand and keeps the fastest "
    "for later starts; 0 (default): those chosen by arithmetic",
    "FLORA_ALLOW_UNTESTED_VLLM": "1 serves from a vLLM that was not checked, if its hooks fit",
}
# What `flora-vllm serve --restart` tells its server; nobody else sets them.
OF_SUPERVISOR = ("FLORA_KEPT_UPLOADS", "FLORA_RESTARTED")
_CLONE = Path(__file__).resolve().parent.parent


def cache_root() -> Path:
    """The directory of FLORA_CACHE, or its default; it need not exist."""
    chosen = os.environ.get("FLORA_CACHE")
    if chosen:
        return Path(chosen)
    if (_CLONE / "Makefile").is_file() and (_CLONE / "pyproject.toml").is_file():
        return _CLONE / ".cache"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "flora-vllm"
