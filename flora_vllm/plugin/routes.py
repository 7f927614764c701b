"""Which route a request is for."""

from collections.abc import Mapping
from typing import Any


def path_of(scope: Mapping[str, Any]) -> str:
    """The path without the server's --root-path, as vLLM's router takes it off: only where a "/" comes after it."""
    path, root = scope.get("path", ""), scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
