"""Sleep level 2 is refused where it would lose the slots."""

from types import SimpleNamespace
from typing import Any

import pytest

from flora_vllm.errors import ConfigError
from flora_vllm.plugin import sleeping

pytestmark = pytest.mark.filterwarnings("ignore")


def _engine(additional_config: Any) -> Any:
    return SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional_config))


def test_level_2_is_refused_on_a_device_with_slots_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    ours, other = _engine({"flora": {}}), _engine({})
    sleeping._check(ours, 2)  # a CPU does not sleep
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    sleeping._check(ours, 1)
    sleeping._check(other, 2)
    with pytest.raises(ConfigError, match="sleep level 2 discards device memory"):
        sleeping._check(ours, 2)
