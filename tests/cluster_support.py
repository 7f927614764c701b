"""What the tests of the cluster's parts share: an adapter directory and the smallest configuration."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any


def write_adapter(
    root: Path, name: str, content: bytes = b"weights", config: str = '{"peft_type": "FLORA", "r": 4}'
) -> Path:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(config)
    (directory / "adapter_model.safetensors").write_bytes(content)
    return directory


def minimal(**model: Any) -> dict[str, Any]:
    return {"models": [{"name": "base", "source": "/models/base", **model}]}


async def play(script: Sequence[Any]) -> AsyncIterator[Any]:
    """One attempt at an answer: the chunks of `script`; an exception among them is raised."""
    for item in script:
        if isinstance(item, Exception):
            raise item
        yield item
