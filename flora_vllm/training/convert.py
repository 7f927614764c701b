"""What converting needs of the running model: weights, input statistics, how far two models' answers are apart."""

from collections.abc import Callable, Iterable, Sequence

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flora_vllm.errors import AdapterError
from flora_vllm.training.config import FloraConfig
from flora_vllm.training.data import batches
from flora_vllm.training.fit import Factors
from flora_vllm.training.layer import FloraLinear
from flora_vllm.training.loop import schedule


def linear_weights(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """W (O, I) of each named layer. Raises AdapterError for a name that isn't a linear layer of the model."""
    weights = {}
    for name in names:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise AdapterError(f"{name}: the base model has no such module") from None
        if not isinstance(layer, nn.Linear | Conv1D):
            raise AdapterError(f"{name}: a {type(layer).__name__} in the base model, not a linear layer")
        weights[name] = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach()
    return weights


@torch.no_grad()
def input_energy(model: nn.Module, names: Sequence[str], blocks: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
    """Mean square (I,) of each named layer's input over `blocks`, float64."""
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + x_TI.square().sum(0).cpu()
            counts[name] += len(x_TI)

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        device = next(model.parameters()).device
        for part in blocks.split(batch):
            model(input_ids=part.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] / counts[name] for name in names}


def as_flora(model: PreTrainedModel, factors: Factors) -> PeftModel:
    """The model with these factors as an active, trainable FLoRA adapter of reduction "sum"."""
    ranks = {a_RI.shape[0] for a_RI, _ in factors.values()}
    assert len(ranks) == 1, "one rank for all modules"
    adapted = get_peft_model(model, FloraConfig(r=ranks.pop(), target_modules=sorted(factors), reduction="sum"))
    for name, (a_RI, b_OR) in factors.items():
        layer = flora_layer(adapted, name)
        with torch.no_grad():
            layer._factor(layer.flora_A, "default").weight.copy_(a_RI)
            layer._factor(layer.flora_B, "default").weight.copy_(b_OR)
    return adapted


def flora_layer(adapted: PeftModel, name: str) -> FloraLinear:
    layer = adapted.get_base_model().get_submodule(name)
    assert isinstance(layer, FloraLinear)
    return layer


def factors_of(adapted: PeftModel, names: Iterable[str]) -> Factors:
    def weight(side: nn.ModuleDict) -> torch.Tensor:
        return FloraLinear._factor(side, "default").weight.detach().cpu()

    layers = {name: flora_layer(adapted, name) for name in names}
    return {name: (weight(layer.flora_A), weight(layer.flora_B)) for name, layer in layers.items()}


def divergence(teacher: nn.Module, student: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher ‖ student) per token in nats, float32; gradients reach the student only."""
    with torch.no_grad():
        wanted = log_softmax(teacher(input_ids=ids).logits.float(), -1).flatten(0, 1)
    given = log_softmax(student(input_ids=ids).logits.float(), -1).flatten(0, 1)
    return kl_div(given, wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def mean_divergence(teacher: nn.Module, student: nn.Module, blocks: torch.Tensor, batch: int) -> float:
    """`divergence` over all blocks (N, L)."""
    device = next(student.parameters()).device
    total = sum(float(divergence(teacher, student, part.to(device))) * len(part) for part in blocks.split(batch))
    return total / len(blocks)


def distill(
    teacher: nn.Module,
    student: PeftModel,
    blocks: torch.Tensor,
    *,
    steps: int,
    rate: float,
    batch: int,
    seen: Callable[[dict[str, float], int], None],
) -> None:
    """Move the student's factors towards the teacher's answers on `blocks`, `steps` Adam steps."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    device = parameters[0].device
    stream = batches(blocks, batch, 0, 0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        ids = next(stream).to(device)
        loss = divergence(teacher, student, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen({"distill": float(loss.detach())}, ids.numel())
