"""The adapted norm alone: whose rows change, and that a norm without adapters is called as it always was."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flora_vllm.norms import AdaptedNorm
from flora_vllm.ops.terms import SliceTerms
from flora_vllm.step import Step

WIDTH, ADAPTERS = 6, (5, 5, 0, 0, 8, 9)  # of the tokens; 8 leaves the norm alone


class AddingNorm(torch.nn.Module):
    """RMS norm of x + residual, both written in place, as vLLM's kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual.add_(x)
        x.copy_(torch.nn.functional.rms_norm(residual, (WIDTH,), self.weight))
        return x, residual


def layer_norm() -> torch.nn.Module:
    return torch.nn.LayerNorm(WIDTH).requires_grad_(False)


def own_of(norm: torch.nn.Module, seed: int) -> SliceTerms:
    g = torch.Generator().manual_seed(seed)
    bias = None if getattr(norm, "bias", None) is None else torch.randn(WIDTH, generator=g)
    return SliceTerms(torch.randn(WIDTH, generator=g), offset_O=bias)


@pytest.mark.parametrize("make", [AddingNorm, layer_norm])
def test_a_tokens_row_is_normed_with_its_adapters_weights(make: Callable[[], torch.nn.Module]) -> None:
    torch.manual_seed(0)
    module, step = make(), Step()
    norm = AdaptedNorm(module, step)
    terms = {2: own_of(module, 1), 1: own_of(module, 2)}
    step.set_mapping(ADAPTERS, {5: 2, 8: 3, 9: 1})

    def called(state: dict[str, Any] | None = None) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(7)
        count = 2 if isinstance(module, AddingNorm) else 1
        inputs = [torch.randn(len(ADAPTERS), 2, WIDTH, generator=g) for _ in range(count)]
        found = module(*inputs) if state is None else torch.func.functional_call(make(), state, tuple(inputs))
        return [*found] if isinstance(found, tuple) else [found]

    plain = called()
    for slot, part in terms.items():
        norm.write_slot(slot, (part,))
    own = {
        slot: called({"weight": part.plain_O, **({} if part.offset_O is None else {"bias": part.offset_O})})
        for slot, part in terms.items()
    }
    for output, (base, changed) in enumerate(zip(plain, called(), strict=True)):
        assert torch.equal(changed[2:5], base[2:5]), "others' rows are the base's, to the bit"
        assert torch.equal(changed[:2], own[2][output][:2])
        assert torch.equal(changed[5], own[1][output][5])
    if isinstance(module, AddingNorm):  # as some models call it
        x, residual = torch.randn(2, len(ADAPTERS), WIDTH)
        named, placed = module(x.clone(), residual=residual.clone()), module(x, residual)
        assert all(torch.equal(one, other) for one, other in zip(named, placed, strict=True))
    for slot in terms:
        norm.write_slot(slot, None)
    assert "forward" not in vars(module)
    assert all(torch.equal(a, b) for a, b in zip(called(), plain, strict=True))


@pytest.mark.parametrize("make", [AddingNorm, layer_norm])
def test_compiled_code_norms_each_row_with_its_adapters_weights(make: Callable[[], torch.nn.Module]) -> None:
    """What was compiled before an adapter came serves it, and what the norm writes into stays as it was."""
    torch.manual_seed(0)
    module, eager, step = make(), make(), Step()
    eager.load_state_dict(module.state_dict())
    norm, reference = AdaptedNorm(module, step, is_compiled=True), AdaptedNorm(eager, step)
    inputs = [torch.randn(len(ADAPTERS), 2, WIDTH) for _ in range(2 if isinstance(module, AddingNorm) else 1)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = module(*(x * 1 for x in given))
        return found if isinstance(found, tuple) else (found,)

    plain = model(*inputs)
    terms = own_of(module, 1)
    for one in (norm, reference):
        one.write_slot(1, (terms,))
    step.set_mapping(ADAPTERS, {5: 1, 8: 0, 9: 1})
    wanted: Any = eager(*(x.clone() for x in inputs))
    changed = model(*inputs)
    for base, found, want in zip(plain, changed, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert torch.equal(found, want)
        assert torch.equal(found[2:5], base[2:5])
    assert not torch.equal(changed[0][:2], plain[0][:2])
    norm.write_slot(1, None)
    assert all(torch.equal(a, b) for a, b in zip(model(*inputs), plain, strict=True))


@pytest.mark.filterwarnings("ignore")  # vLLM's imports warn
def test_in_a_compiled_model_they_are_refused_by_name_unless_asked_for() -> None:
    from types import SimpleNamespace

    from vllm.config import CompilationMode

    from flora_vllm.plugin.attach import Attached
    from flora_vllm.plugin.norms import attach_norms
    from flora_vllm.plugin.trial import TOKENS, Trial

    module, device = layer_norm(), torch.device("cpu")
    config = SimpleNamespace(compilation_config=SimpleNamespace(mode=CompilationMode.VLLM_COMPILE))
    trial = Trial(None, config, device, {}, {"norm": module})
    trial.rows = {"norm": [TOKENS]}
    for asked in (False, True):
        attached = Attached()
        attach_norms(trial, attached, lambda _: Step(), lambda _: True, config, device, compiled_too=asked)
        assert [*attached.norms] == ["norm"] * asked
        assert ("--flora-norms" in attached.refused.get("norm", "")) is not asked
        assert ("forward" in vars(module)) is asked


def test_who_asks_beside_a_step_gets_the_bases_weights() -> None:
    """Loads compare what a file holds with the base's, while steps norm rows with other adapters' weights."""
    module, step = layer_norm(), Step()
    base, seen = module.weight, []
    norm = AdaptedNorm(module, step)
    stock = norm._stock

    def slow(x: torch.Tensor) -> torch.Tensor:
        if module.weight is not base:
            asking.start()
            asking.join(0.1)
        return stock(x)

    norm._stock = slow
    norm.write_slot(1, (own_of(module, 1),))
    step.set_mapping([5], {5: 1})
    asking = threading.Thread(target=lambda: seen.append(norm.base_values()["weight"]))
    module(torch.randn(1, WIDTH))
    asking.join()
    assert seen == [base]


def test_what_a_norm_of_this_model_cannot_be_is_said_before_it_has_a_slot() -> None:
    norm, large = AdaptedNorm(AddingNorm().half(), Step()), torch.full((WIDTH,), 7e4)
    assert norm.fault(SliceTerms(torch.ones(WIDTH))) is None
    assert "leave the range of torch.float16" in str(norm.fault(SliceTerms(large)))
    assert "has a bias" in str(norm.fault(SliceTerms(torch.ones(WIDTH), offset_O=torch.ones(WIDTH))))
    assert AdaptedNorm(layer_norm(), Step()).fault(SliceTerms(large, offset_O=large)) is None
