"""What a worker knows of adapters by their ids: bounded, and enough to refuse an id whose adapter begins elsewhere."""

import pytest

from flora_vllm.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn

HELD = 7


def test_ids_of_adapters_that_left_are_forgotten_and_held_ones_never() -> None:
    from flora_vllm.plugin.activation import MOST_WHOLE, BaseRows

    rows = BaseRows(lambda: {HELD})
    for adapter in range(3 * MOST_WHOLE):
        rows.learn(adapter, None, "a")
        assert len(rows._whole) <= MOST_WHOLE
    with pytest.raises(AdapterError, match="other alora_invocation_tokens"):
        rows.learn(HELD, (1, 2), "a")
    rows.learn(1, (1, 2), "a")  # which no step can be using: another's id from now on
    assert rows.invocations == {1: (1, 2)}


def test_where_more_are_held_all_are_known_and_not_sought_each_time() -> None:
    from flora_vllm.plugin.activation import MOST_WHOLE, BaseRows

    held: set[int] = set()
    asked = []

    def ask() -> set[int]:
        asked.append(len(held))
        return held

    rows = BaseRows(ask)
    for adapter in range(4 * MOST_WHOLE):
        held.add(adapter)
        rows.learn(adapter, None, "a")
    assert rows._whole == held
    assert len(asked) == 2
