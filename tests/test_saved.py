"""Modules saved whole against a base model: what is no change, what becomes a term, what is refused; no engine."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora_vllm.adapter import Adapter, ModelLayout, ModuleTerms
from flora_vllm.formats.ranks import Limits
from flora_vllm.terms import Offset, Product, Replaced

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn

LAYOUT = ModelLayout(
    {"q": (4, 4), "embed": (6, 4), "ln": (4, 4)},
    {"tower": "no towers here"},
    embeddings=frozenset({"embed"}),
    norms=frozenset({"ln"}),
)


class Model(torch.nn.Module):
    def __init__(self, model_type: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type=model_type)
        self.q, self.tower = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.embed, self.ln, self.conv = torch.nn.Embedding(6, 4), torch.nn.LayerNorm(4), torch.nn.Conv1d(4, 4, 1)


def judged(
    saved: dict[str, torch.Tensor],
    model_type: str = "llama",
    limit: int | None = None,
    own: tuple[str, ...] = (),
    invoked: tuple[int, ...] | None = None,
) -> tuple[dict[str, Any], str]:
    from flora_vllm.plugin.saved import with_saved

    adapter = Adapter("LORA", 1, {name: ModuleTerms() for name in own}, "", None, invoked, saved)
    found, faults = with_saved(adapter, Model(model_type), LAYOUT, Limits(dense_bytes=limit), {})
    return {name: [type(term) for term in terms.terms] for name, terms in found.modules.items()}, "\n".join(faults)


def state() -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in Model("llama").named_parameters()}


def test_what_equals_the_base_is_no_change_wherever_it_is() -> None:
    assert judged(state()) == ({}, "")
    assert judged({"q.base_layer.weight": state()["q.weight"]}, "gpt2") == ({}, "")


def test_only_what_differs_is_still_held_whole() -> None:
    """What a merge of adapters may then pass over."""
    from flora_vllm.plugin.saved import with_saved

    held = {
        "q.weight": state()["q.weight"],
        "embed.base_layer.weight": state()["embed.weight"],
        "ln.bias": torch.ones(4),
    }
    adapter = Adapter("LORA", 1, {}, "", None, None, held)
    assert [*with_saved(adapter, Model("llama"), LAYOUT, Limits(), {})[0].saved] == ["ln.bias"]


def test_what_differs_is_a_term_of_its_kind() -> None:
    changed = {name: tensor + 1 for name, tensor in state().items() if not name.startswith(("tower", "conv"))}
    assert judged(changed) == ({"q": [Replaced, Offset], "embed": [Replaced], "ln": [Product, Offset]}, "")
    # A module is one: with another bias its weight comes along.
    assert judged({"q.weight": state()["q.weight"], "q.bias": torch.ones(4)})[0] == {"q": [Replaced, Offset]}


@pytest.mark.parametrize(
    ("saved", "options", "said"),
    [
        ({"q.weight": torch.ones(4, 5)}, {}, r"another size \(weight \(4, 5\)\) than the base's \(4, 4\)"),
        ({"q.weight": torch.ones(4, 4)}, {"own": ("q",)}, "of the adapter's family, too"),
        ({"q.weight": torch.ones(4, 4)}, {"model_type": "gpt2"}, "gpt2 stores linear layers the other way round"),
        ({"q.weight": torch.ones(4, 4)}, {"limit": 63}, "--max-flora-dense-bytes 64"),
        ({"q.base_layer.weight": torch.ones(4, 4)}, {}, "serve that base model"),
        ({"tower.weight": torch.ones(4, 4)}, {}, "no towers here"),
        ({"conv.weight": torch.ones(4, 4, 1)}, {}, "modules such as this Conv1d"),
        ({"elsewhere.weight": torch.ones(4, 4)}, {}, "'elsewhere' is saved whole.*it is not in the base model"),
        ({"ln.bias": torch.ones(4)}, {}, "save the whole norm"),
        ({"ln.weight": torch.ones(4), "ln.bias": torch.ones(1)}, {}, "save the whole norm"),
        ({"embed.bias": torch.ones(6)}, {}, "an embedding has no bias"),
        ({"ln.weight": torch.ones(4) * 3}, {"invoked": (5,)}, "with alora_invocation_tokens PEFT has it act on every"),
    ],
)
def test_what_cannot_be_served_is_named(saved: dict[str, torch.Tensor], options: dict[str, Any], said: str) -> None:
    assert re.search(said, judged(saved, **options)[1]), judged(saved, **options)[1]
