"""A family's adapter as PEFT makes, fills, saves and merges it, against what our reader makes of the saved folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from formats_support import tiny_model
from peft import PeftConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from flora_vllm.adapter import Adapter
from flora_vllm.formats import FAMILIES, read_adapter
from flora_vllm.formats.base_model import base_layout, open_base
from flora_vllm.formats.merge import merge_model
from flora_vllm.formats.model_order import in_order
from flora_vllm.ops.reference import reference_linear
from flora_vllm.ops.terms import group_by_slot
from flora_vllm.terms import Cut, Term, fold, merged, resolve

# Random factors of this size move every output by about its own size, and no more: an error cannot hide.
STD = 0.3

Fill = Callable[[str, torch.Tensor], None]


def fill_normal(_name: str, parameter: torch.Tensor, std: float = STD) -> None:
    torch.nn.init.normal_(parameter, std=std)


class ModelProbe:
    """`terms.Probe` of a model in memory."""

    def __init__(self, model: PreTrainedModel, state: Mapping[str, torch.Tensor], module: str) -> None:
        self.module = module
        self.modules = in_order(model)
        weight = state[f"{module}.weight"].float()
        self.stores_in_out = type(model.get_submodule(module)).__name__ == "Conv1D"
        self._weight_OI = weight.T if self.stores_in_out else weight
        self.shape = (self._weight_OI.shape[0], self._weight_OI.shape[1])
        self._bias_O = state.get(f"{module}.bias")
        self.dtype = state[f"{module}.weight"].dtype

    def product(self, x_NI: torch.Tensor) -> torch.Tensor:
        return x_NI.float() @ self._weight_OI.T

    def squared_row_norms(self) -> torch.Tensor:
        return self._weight_OI.square().sum(1)

    def weight(self) -> torch.Tensor:
        return self._weight_OI

    def bias(self) -> torch.Tensor | None:
        return self._bias_O


def save_filled(model: PreTrainedModel, config: PeftConfig, path: Path, fill: Fill = fill_normal) -> torch.nn.Module:
    """Wrap `model` in PEFT, fill what is trained, save it at `path`; the wrapped model in eval mode."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            fill(name, parameter.data)
    wrapped.save_pretrained(str(path))
    return wrapped.eval()


def check_folded(
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    terms: tuple[Term, ...],
    new_OI: torch.Tensor,
    new_O: torch.Tensor | None,
) -> None:
    """The terms as a slot holds them do what the merged weight and bias do."""
    size, in_features = weight_OI.shape
    part = fold(terms, Cut(slice(0, size), slice(0, in_features), torch.float32, torch.device("cpu"), bias_O))
    x_TI = torch.randn(3, in_features, generator=torch.Generator().manual_seed(7))
    found = reference_linear(x_TI, weight_OI, bias_O, (size,), [None, (part,)], group_by_slot([1, 1, 1]))
    wanted = torch.nn.functional.linear(x_TI, new_OI, new_O)
    assert float((found - wanted).abs().max()) < 1e-4 * max(1.0, float(wanted.abs().max()))


def ours_merged(model: PreTrainedModel, base: Mapping[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """`base` with the adapter's terms multiplied in."""
    state = dict(base)
    for module, terms in adapter.modules.items():
        resolved = resolve(terms.terms, ModelProbe(model, base, module))
        assert {type(term) for term in resolved} <= set(FAMILIES[adapter.family].kinds), "the row must name its kinds"
        weight, bias = base[f"{module}.weight"], base.get(f"{module}.bias")
        conv1d = type(model.get_submodule(module)).__name__ == "Conv1D"
        weight_OI = weight.T if conv1d else weight
        new_weight, new_bias = merged(weight_OI, bias, resolved)
        check_folded(weight_OI, bias, resolved, new_weight, new_bias)
        state[f"{module}.weight"] = new_weight.T.contiguous() if conv1d else new_weight
        if new_bias is not None:
            state[f"{module}.bias"] = new_bias
    return state


def load(directory: Path) -> PreTrainedModel:
    """Every tensor of the model must be in the files, and no other."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def worst_errors(
    config: PeftConfig,
    path: Path,
    architecture: str = "llama",
    fill: Fill = fill_normal,
    task: str | None = None,
    **changes: Any,
) -> tuple[float, float]:
    """(error of the logits against PEFT's own forward of the folder it saved, the adapter's effect on them).

    PEFT loads the folder into a fresh model, as a user's server would have to. `task`: which task of a family that has
    several both compute.
    """
    from peft import PeftModel

    model = tiny_model(architecture, **changes)
    model.save_pretrained(path / "base")
    save_filled(model, config, path / "adapter", fill)
    tokens = torch.randint(0, 80, (2, 9), generator=torch.Generator().manual_seed(3))
    plain = load(path / "base")
    with torch.no_grad():
        before = plain(tokens).logits
    # As `flora-vllm merge` does it, and what any engine would load.
    base = open_base(str(path / "base"))
    adapter = read_adapter(path / "adapter", layout=base_layout(base), task=task)
    with tqdm(disable=True) as progress:
        merge_model(base, adapter, path / "merged", progress)
    ours = load(path / "merged")
    theirs = PeftModel.from_pretrained(plain, str(path / "adapter")).eval()
    with torch.no_grad():
        wanted = (
            theirs(tokens) if task is None else theirs.base_model(tokens, task_ids=torch.full((2,), int(task)))
        ).logits
        found = ours(tokens).logits
    return float((found - wanted).abs().max()), float((wanted - before).abs().max())
