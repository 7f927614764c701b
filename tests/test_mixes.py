"""What clients may write for a mix, and that the engine reads back what the server wrote."""

from types import SimpleNamespace

import pytest

from flora_vllm.errors import AdapterError
from flora_vllm.formats.arrow import Routing
from flora_vllm.formats.merge_methods import Method
from flora_vllm.plugin.mix_requests import MOST_UNNAMED, outdated
from flora_vllm.plugin.mixes import Asked, Mix, Part, asked_in, checked, decoded, digest_of_mix, encoded, mix_of

TIES = Method("ties", density=0.5)
A, B = (SimpleNamespace(lora_name=f"{n}@{n * 64}", lora_path=f"adapters/{n}") for n in "ab")


def mix(weights, loaded, method=None):
    return mix_of(Asked(weights, method), loaded)


def test_text_and_object_say_the_same():
    assert asked_in("mix:a*0.7+b*-3e-1").weights == checked({"a": 0.7, "b": -0.3}) == {"a": 0.7, "b": -0.3}
    assert asked_in("mix:x*y*2") == Asked({"x*y": 2.0})
    assert asked_in('mix:{"mix": 2}') == Asked({"mix": 2.0})
    assert asked_in('mix:{"mix": {"a": 1}, "method": "ties", "density": 0.5}') == Asked({"a": 1.0}, TIES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('"method": "arrow"', "allowed: linear"),
        ('"density": 0.5', "options of a merge need its method"),
        ('"method": "ties"', "method ties: it needs density"),
        ('"method": "cat", "weights": 1', "['weights'] are no options"),
        ('"method": "svd"', "flora-vllm merge --method"),
        ('"method": ["cat"]', "method is ['cat']"),
    ],
)
def test_methods_that_a_server_does_not_take(options, words):
    with pytest.raises(AdapterError) as raised:
        asked_in(f'mix:{{"mix": {{"a": 1, "b": 1}}, {options}}}')
    assert words in str(raised.value)


def test_an_arrow_names_adapters_and_its_gate():
    one = Asked({"a": 1.0, "b": 1.0}, Routing(top_k=2))
    assert asked_in("arrow:a+b") == asked_in('arrow:{"adapters": ["a", "b"]}') == one
    assert asked_in("arrow:a+b+c+d").method == Routing(top_k=3)
    text = 'arrow:{"adapters": ["a", "b"], "top_k": 1, "temperature": 0.5, "seed": 7}'
    assert asked_in(text).method == Routing(1, 0.5, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arrow:", "2 to 64 different names"),
        ("arrow:a", "2 to 64 different names"),
        ("arrow:a+a", "2 to 64 different names"),
        ("arrow:{", "not what JSON calls an object"),
        ('arrow:{"adapters": "ab"}', "2 to 64 different names"),
        ('arrow:{"adapters": ["a", "b"], "weights": 1}', "['weights'] are no options of an arrow"),
        ('arrow:{"adapters": ["a", "b"], "top_k": 0}', "top_k is 0, must be an integer of at least 1"),
        ('arrow:{"adapters": ["a", "b"], "top_k": "2"}', "top_k is '2', must be an integer of at least 1"),
        ('arrow:{"adapters": ["a", "b"], "temperature": 0}', "temperature is 0, must be a number above 0"),
        ('arrow:{"adapters": ["a", "b"], "seed": 1.5}', "seed is 1.5, must be an integer from 0"),
    ],
)
def test_arrows_that_say_nothing(text, words):
    with pytest.raises(AdapterError) as raised:
        asked_in(text)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "text", ["mix:", "mix:a", "mix:a*", "mix:*1", "mix:a*1+a*2", "mix:a*nan", "mix:a*1e999", "mix:a*1+"]
)
def test_text_that_says_nothing(text):
    with pytest.raises(AdapterError, match="mix"):
        asked_in(text)


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
    parts = (Part(0.7, "a@" + "a" * 64, "adapters/a"), Part(0.3, "b@" + "b" * 64, "adapters/b"))
    for method in (None, TIES, Method("dare_ties", 1, "frequency", 3), Routing(1, 0.5, 7)):
        found = mix({"a": 0.7, "b": 0.3}, {"a": A, "b": B}, method)
        assert found == Mix(parts, method)
        assert decoded(encoded(found)) == found
    assert decoded("adapters/a") is None
    with pytest.raises(AdapterError, match=r"\['c'\] are not loaded"):
        mix({"a": 1.0, "c": 1.0}, {"a": A})


def test_a_mix_of_a_mix_is_one_mix():
    inner = SimpleNamespace(lora_name="ab@0", lora_path=encoded(mix({"a": 0.5, "b": 2.0}, {"a": A, "b": B})))
    parts = mix({"ab": 0.5, "a": 1.0}, {"ab": inner, "a": A}).parts
    assert [(part.weight, part.path) for part in parts] == [(0.25, A.lora_path), (1.0, B.lora_path), (1.0, A.lora_path)]
    with pytest.raises(AdapterError, match="has 9 parts"):
        mix({f"n{i}": 1.0 for i in range(5)}, {f"n{i}": inner if i < 4 else A for i in range(5)})


def test_a_merge_is_no_part_and_has_no_mix_for_one():
    both = {"a": A, "b": B}
    added, merged, routed = (
        SimpleNamespace(lora_name="ab@0", lora_path=encoded(mix({"a": 0.5, "b": 2.0}, both, method)))
        for method in (None, TIES, Routing(1))
    )
    for inner, method in ((merged, None), (added, TIES), (merged, TIES), (added, Routing(1)), (routed, None)):
        with pytest.raises(AdapterError, match="'ab' is a mix itself; a merge's parts are adapters"):
            mix({"ab": 0.5, "a": 1.0}, {**both, "ab": inner}, method)


def test_the_digest_is_that_of_contents_weights_and_method():
    both = {"a": A, "b": B}
    one = mix({"a": 0.7, "b": 0.3}, both)
    moved = mix({"x": 0.7, "b": 0.3}, {"x": SimpleNamespace(lora_name="x@" + "a" * 64, lora_path="c"), "b": B})
    assert digest_of_mix(one) == digest_of_mix(moved)
    others = [one, mix({"a": 0.6, "b": 0.3}, both), mix({"a": 0.7, "b": 0.3}, {"a": B, "b": B})]
    others += [mix({"a": 0.7, "b": 0.3}, both, Method("ties", density)) for density in (0.5, 0.6)]
    others += [mix({"a": 0.7, "b": 0.3}, both, Method("ties", 0.5, "frequency"))]
    others += [mix({"a": 1.0, "b": 1.0}, both, routing) for routing in (None, Routing(1), Routing(2), Routing(1, 0.5))]
    assert len({digest_of_mix(other) for other in others}) == len(others)


def test_unnamed_mixes_are_unloaded_when_many_and_of_no_use():
    recent = [f"mix:{i}" for i in range(MOST_UNNAMED + 3)]
    assert outdated(recent, ()) == ["mix:0", "mix:1", "mix:2"]
    assert outdated(recent, {"mix:1", "mix:60"}) == ["mix:0", "mix:2"]
    assert outdated(recent[3:], ()) == []
