"""What clients may write for a mix, and that the engine reads back what the server wrote."""

from types import SimpleNamespace

import pytest

from flora_vllm.errors import AdapterError
from flora_vllm.plugin.mixes import Part, checked, decoded, digest_of_mix, encoded, parts_of, weights_in

A, B = (SimpleNamespace(lora_name=f"{n}@{n * 16}", lora_path=f"adapters/{n}") for n in "ab")


def test_text_and_object_say_the_same():
    assert weights_in("mix:a*0.7+b*-3e-1") == checked({"a": 0.7, "b": -0.3}) == {"a": 0.7, "b": -0.3}
    assert weights_in("mix:x*y*2") == {"x*y": 2.0}


@pytest.mark.parametrize(
    "text", ["mix:", "mix:a", "mix:a*", "mix:*1", "mix:a*1+a*2", "mix:a*nan", "mix:a*1e999", "mix:a*1+"]
)
def test_text_that_says_nothing(text):
    with pytest.raises(AdapterError, match="mix"):
        weights_in(text)


@pytest.mark.parametrize(
    "weights",
    [
        None,
        [],
        {},
        {"a": "1"},
        {"a": True},
        {"a": float("nan")},
        {"a": 10**400},
        {1: 1.0},
        {f"a{i}": 1.0 for i in range(9)},
    ],
)
def test_object_that_says_nothing(weights):
    with pytest.raises(AdapterError, match="a mix must be an object of 1 to 8 names"):
        checked(weights)


def test_parts_come_back_from_what_stands_in_place_of_a_path():
    parts = parts_of({"a": 0.7, "b": 0.3}, {"a": A, "b": B})
    assert parts == (Part(0.7, "a@" + "a" * 16, "adapters/a"), Part(0.3, "b@" + "b" * 16, "adapters/b"))
    assert decoded(encoded(parts)) == parts
    assert decoded("adapters/a") is None
    with pytest.raises(AdapterError, match=r"\['c'\] are not loaded"):
        parts_of({"a": 1.0, "c": 1.0}, {"a": A})


def test_a_mix_of_a_mix_is_one_mix():
    inner = SimpleNamespace(lora_name="ab@0", lora_path=encoded(parts_of({"a": 0.5, "b": 2.0}, {"a": A, "b": B})))
    parts = parts_of({"ab": 0.5, "a": 1.0}, {"ab": inner, "a": A})
    assert [(part.weight, part.path) for part in parts] == [(0.25, A.lora_path), (1.0, B.lora_path), (1.0, A.lora_path)]
    with pytest.raises(AdapterError, match="has 9 parts"):
        parts_of({f"n{i}": 1.0 for i in range(5)}, {f"n{i}": inner if i < 4 else A for i in range(5)})


def test_the_digest_is_that_of_contents_and_weights():
    one = parts_of({"a": 0.7, "b": 0.3}, {"a": A, "b": B})
    moved = parts_of({"x": 0.7, "b": 0.3}, {"x": SimpleNamespace(lora_name="x@" + "a" * 16, lora_path="c"), "b": B})
    assert digest_of_mix(one) == digest_of_mix(moved)
    for other in (parts_of({"a": 0.6, "b": 0.3}, {"a": A, "b": B}), parts_of({"a": 0.7, "b": 0.3}, {"a": B, "b": B})):
        assert digest_of_mix(one) != digest_of_mix(other)
