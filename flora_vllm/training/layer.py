"""The adapted linear layer of the PEFT method: owns the base call, holds the factors of every adapter.

    y = Σ_s FLoRA_s(x) + W (x - n x) + bias      over the n active adapters s

so several active adapters add their updates `(W_s - W) x`, as LoRA's do, and one adapter is plain FLoRA. The bias is
added once and never scaled. A fused qkv projection is one layer: its one input factor is shared by q, k and v (the
output factor differs by row anyway), which is what `flora_A (r, d_in)` of the checkpoint says.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from flora_vllm.errors import ConfigError
from flora_vllm.training.config import FloraConfig
from flora_vllm.training.modulate import modulated_product, modulated_weight, prefers_modulated, stacked_product

# Standard deviation of the input factors that start with a zero output factor: any value is the exact identity, this
# one lets all components learn at the pace of the first.
NOISE = 1.0


class Factor(nn.Module):
    """One factor of one adapter, a module with a `weight` of its own as LoRA's are, so that FSDP can wrap it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self) -> torch.Tensor:
        """The weight, as a copy: FSDP may take the parameter's memory away once this module's forward is over."""
        return self.weight.clone()


@dataclass(frozen=True, eq=False)
class BaseProduct:
    """One call's way to the base layer: `apply` is W without the bias, `weight` is W where it can be read."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    bias: torch.Tensor | None
    dtype: torch.dtype  # of the layer's result
    weight: torch.Tensor | None = None  # (O, I)

    def finish(self, y: torch.Tensor) -> torch.Tensor:
        return (y if self.bias is None else y + self.bias).to(self.dtype)


class FloraLinear(nn.Module, BaseTunerLayer):
    """A linear layer with FLoRA adapters, around any base layer that maps (…, I) to (…, O) affinely."""

    adapter_layer_names: tuple[str, ...] = ("flora_A", "flora_B")
    other_param_names: tuple[str, ...] = ("r", "reduction", "flora_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, rank: int, config: FloraConfig, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        self.r: dict[str, int] = {}
        self.reduction: dict[str, str] = {}
        self.activated: set[str] = set()  # adapters of the tokens from their invocation on
        self.flora_dropout = nn.ModuleDict()
        self.flora_A = nn.ModuleDict()
        self.flora_B = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._weight_before_merge: torch.Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rank, config)

    def update_layer(self, adapter_name: str, rank: int, config: FloraConfig) -> None:
        """Add or replace the adapter `adapter_name`."""
        self.r[adapter_name] = rank
        self.reduction[adapter_name] = config.reduction
        (self.activated.add if config.alora_invocation_tokens else self.activated.discard)(adapter_name)
        self.flora_dropout[adapter_name] = nn.Dropout(config.flora_dropout) if config.flora_dropout else nn.Identity()
        self.flora_A[adapter_name] = Factor(rank, self.in_features)
        self.flora_B[adapter_name] = Factor(self.out_features, rank)
        self.reset_flora_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_flora_parameters(self, adapter_name: str, identity: bool = True) -> None:
        """Initialise one adapter.

        identity: component 0 is ones times ones (times r for "mean"), so W comes out exactly; every other component
        has a zero output factor, which adds nothing, and a random input factor, which makes its gradient its own:
        components that start equal stay equal for ever. Otherwise: random factors around 1.
        """
        a_RI, b_OR = (self._factor(side, adapter_name).weight for side in (self.flora_A, self.flora_B))
        product = self.r[adapter_name] if self.reduction[adapter_name] == "mean" else 1
        if identity:
            nn.init.normal_(a_RI, std=NOISE)
            a_RI[0] = 1
            nn.init.zeros_(b_OR)
            b_OR[:, 0] = product
        else:
            nn.init.normal_(a_RI, mean=1.0, std=0.5)
            nn.init.normal_(b_OR, mean=product / self.r[adapter_name], std=0.5)

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, I) and (O, R) of one adapter, the reduction folded into the second.

        Divided by R rather than multiplied by 1/R: R / R is exactly 1, so the identity stays exact.
        """
        a_RI, b_OR = self.flora_A[adapter_name](), self.flora_B[adapter_name]()
        return a_RI, b_OR / self.r[adapter_name] if self.reduction[adapter_name] == "mean" else b_OR

    @staticmethod
    def _factor(side: nn.ModuleDict, adapter_name: str) -> Factor:
        factor = side[adapter_name]
        assert isinstance(factor, Factor)
        return factor

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        offsets = kwargs.pop("alora_offsets", None)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.activated.intersection(self.active_adapters if adapter_names is None else adapter_names):
            tokens, names = self._names_of_tokens(x, adapter_names, offsets)
            return self._mixed_batch(tokens, names, *args, **kwargs).unflatten(0, x.shape[:-1])
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(x, self.active_adapters, *args, **kwargs)

    def _check_adapter_names(self, x: torch.Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _names_of_tokens(
        self, x: torch.Tensor, adapter_names: Sequence[str] | None, offsets: Sequence[int | None] | None
    ) -> tuple[torch.Tensor, list[str]]:
        """All tokens of a batch (B, T, I) in one row (B·T, I) and each one's adapter: "__base__" before an invocation.

        `offsets`: for each example how many tokens before the prompt's end its adapter begins; None: it never does.
        """
        active = list(self.active_adapters)
        if offsets is None or x.ndim != 3 or (adapter_names is None and len(active) != 1):
            raise ConfigError(
                "an adapter with alora_invocation_tokens needs the model called with `input_ids`, (batch, tokens, "
                f"features) in each layer and no other adapter active beside it; got {tuple(x.shape)} and {active}"
            )
        count = x.shape[1]
        names: list[str] = []
        for name, offset in zip(adapter_names or active * len(x), offsets, strict=True):
            before = 0 if name not in self.activated else count - min(offset or 0, count)
            names += ["__base__"] * before + [name] * (count - before)
        return x.flatten(0, 1), names

    def _mixed_batch(self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Each example through its own adapter; "__base__" and adapters this layer doesn't have are the base layer.

        All examples' scaled inputs go through the base in one call, as the paper batches them, unless an adapter is
        better off with its scaled weight or drops inputs: then adapter by adapter.
        """
        rows_of: dict[str, list[int]] = {}
        if self.training:  # no token may be an active adapter's; its gradient is then zero, not missing
            rows_of = {name: [] for name in self.active_adapters if name in self.activated}
        for row, name in enumerate(adapter_names):
            rows_of.setdefault(name if name in self.flora_A else "__base__", []).append(row)
        places = {name: torch.tensor(rows, dtype=torch.int64, device=x.device) for name, rows in rows_of.items()}
        back = torch.argsort(torch.cat(list(places.values())))
        inputs = {name: x[rows] for name, rows in places.items()}
        base = self._base_product(x, *args, **kwargs)
        adapters = [name for name in inputs if name != "__base__"]
        if self._drops(adapters) or any(self._prefers_modulated(name, inputs[name], base) for name in adapters):
            return torch.cat([self._adapted(part, [name], *args, **kwargs) for name, part in inputs.items()])[back]
        return base.finish(torch.cat(self._stacked_together(inputs, base))[back])

    def _stacked_together(self, inputs: dict[str, torch.Tensor], base: BaseProduct) -> list[torch.Tensor]:
        """Products (without bias) of each adapter's examples, from one base call for all of them."""
        factors = {name: self.factors(name) for name in inputs if name != "__base__"}
        scaled = [
            (x_s * row_I).to(x_s.dtype) if row_I is not None else x_s
            for name, x_s in inputs.items()
            for row_I in (factors[name][0] if name in factors else (None,))
        ]
        products = iter(base.apply(torch.cat(scaled)).split([len(part) for part in scaled]))
        results = []
        for name in inputs:
            if name not in factors:
                results.append(next(products))
                continue
            terms = [column_O * next(products) for column_O in factors[name][1].T]
            results.append(sum(terms[1:], start=terms[0]))
        return results

    def _adapted(self, x: torch.Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in names if name in self.flora_A]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        dropped = [self.flora_dropout[name](x) for name in names]
        base = self._base_product(x, *args, **kwargs)
        products = [self._product(name, x_s, base) for name, x_s in zip(names, dropped, strict=True)]
        y = sum(products[1:], start=products[0])
        if len(names) > 1 or self._drops(names):
            y = y + base.apply(x - sum(dropped[1:], start=dropped[0]))
        return base.finish(y)

    def _drops(self, names: Sequence[str]) -> bool:
        return self.training and not all(isinstance(self.flora_dropout[name], nn.Identity) for name in names)

    def _prefers_modulated(self, name: str, x: torch.Tensor, base: BaseProduct) -> bool:
        training = torch.is_grad_enabled() and self._factor(self.flora_A, name).weight.requires_grad
        tokens = x.numel() // self.in_features
        return base.weight is not None and prefers_modulated(tokens, self.r[name], x.device.type, training)

    def _product(self, name: str, x: torch.Tensor, base: BaseProduct) -> torch.Tensor:
        a_RI, b_OR = self.factors(name)
        if base.weight is None or not self._prefers_modulated(name, x, base):
            return stacked_product(base.apply, x, a_RI, b_OR)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return modulated_product(base.weight, x, a_RI, b_OR)

    def _base_product(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> BaseProduct:
        """How this call applies W: to the weight itself if it can be read, else by calling the base layer."""
        weight_OI = self._readable_weight()
        if weight_OI is None:
            return self._opaque_base(x, *args, **kwargs)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = self.get_base_layer().bias  # under FSDP a view into the flat parameter, not a Parameter
        assert bias is None or isinstance(bias, torch.Tensor)
        return BaseProduct(partial(nn.functional.linear, weight=weight_OI), bias, dtype, weight_OI)

    def _readable_weight(self) -> torch.Tensor | None:
        """W as (O, I) if the base layer is nothing but `x W.T + bias` with a weight we can read, else None."""
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D) or "forward" in base.__dict__:
            return None  # quantised, another tuner's layer, or accelerate's offloading forward
        weight = base.weight
        if base._forward_hooks or base._forward_pre_hooks or type(weight) not in (nn.Parameter, torch.Tensor):
            return None
        assert isinstance(weight, torch.Tensor)
        if not weight.is_floating_point() or weight.is_meta:
            return None
        return weight.T if isinstance(base, Conv1D) else weight

    def _opaque_base(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> BaseProduct:
        """The bias is taken off the call's result in float32: what is left of it is the rounding of that result."""
        bias = getattr(self.get_base_layer(), "bias", "unknown")
        if not (bias is None or (isinstance(bias, torch.Tensor) and not bias.is_meta)):
            with torch.no_grad():  # an affine layer tells its bias at zero
                bias = self.base_layer(torch.zeros_like(x.reshape(-1, x.shape[-1])[:1]), *args, **kwargs)[0]
        if bias is None:
            return BaseProduct(lambda z: self.base_layer(z, *args, **kwargs), None, x.dtype)
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
        return BaseProduct(lambda z: self.base_layer(z, *args, **kwargs) - bias, bias, x.dtype)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`W_s - W` in the base weight's layout, in the factors' dtype or wider; W is the unmerged weight."""
        weight = self._unmerged_weight()
        a_RI, b_OR = self.factors(adapter)
        a_RI, b_OR = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in (a_RI, b_OR))
        if isinstance(self.get_base_layer(), Conv1D):
            return modulated_weight(weight.T, a_RI, b_OR).T - weight
        return modulated_weight(weight, a_RI, b_OR) - weight

    def _unmerged_weight(self) -> torch.Tensor:
        if self._weight_before_merge is None:
            return self.get_base_weight()
        now = self.get_base_weight()  # the model may have been moved or cast since the merge
        return self._weight_before_merge.to(now.device, now.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters (all active ones if None) into the base weight.

        The base weight is kept, on the host, until `unmerge`: dividing by the factors again would be ill-conditioned.
        With `safe_merge` a weight that is not finite raises ValueError and nothing is changed.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.flora_A]
        if not names:
            return
        if activated := sorted(self.activated.intersection(names)):
            raise ConfigError(
                f"{', '.join(activated)}: alora_invocation_tokens leave a prompt's first tokens to the base model, "
                "which no weight can say"
            )
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ConfigError(
                f"{self.quantization_backend.backend_name} layers can't be written back; load the base unquantised"
            )
        weight = self._unmerged_weight()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in [*self.merged_adapters, *names]:
            merged = merged + self.get_delta_weight(name)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"merging {', '.join(names)} would give weights that are not finite; the adapter is broken"
            )
        if self._weight_before_merge is None:
            self._weight_before_merge = weight.detach().to("cpu", copy=True)
        self.set_base_weight(merged.to(weight.dtype).contiguous())
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was, bit for bit (a quantised one: quantised again)."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self._unmerged_weight())
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "flora." + super().__repr__()


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) features of a base layer that FLoRA can adapt.

    Raises ConfigError for anything that isn't a linear layer, by the name of its class.
    """
    if isinstance(layer, Conv1D):
        rows, columns = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return rows, columns
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ConfigError(
            "the output projection inside torch.nn.MultiheadAttention is never called, its weight is read directly: "
            "an adapter on it would do nothing"
        )
    if isinstance(layer, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
        raise ConfigError(f"{type(layer).__name__} is not a linear layer; FLoRA adapts linear layers only")
    for pair in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size")):
        if all(isinstance(getattr(layer, name, None), int) for name in pair):
            return getattr(layer, pair[0]), getattr(layer, pair[1])
    raise ConfigError(f"{type(layer).__name__} is not a linear layer; FLoRA adapts linear layers only")
