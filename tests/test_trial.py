"""What one run of a model says of its modules: which run on a step's rows, however they are called."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports warn


class Method:
    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        return torch.ones(*ids.shape, 4)


class Module(torch.nn.Module):
    quant_method = Method()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_one_run_says_it_of_layers_embeddings_and_norms(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from flora_vllm.plugin import trial

    layers = {name: Module() for name in ("plain", "expert", "pooled", "absorbed")}
    embedding, norm, runs = Module(), Module(), []

    def run_once(*_: Any) -> None:
        runs.append(1)
        x = embedding.quant_method.embedding(embedding, torch.zeros(trial.TOKENS, dtype=torch.int64))
        layers["plain"].quant_method.apply(layers["plain"], x)
        layers["expert"].quant_method.apply(layer=layers["expert"], x=x)  # as vLLM's mixtures are called
        layers["pooled"].quant_method.apply(layers["pooled"], x[:1])
        norm(norm(x=x))
        if fails:
            raise TypeError("takes no tokens")

    monkeypatch.setattr(trial, "run_once", run_once)
    config = SimpleNamespace(model_config=SimpleNamespace(is_encoder_decoder=False))
    tried = trial.Trial(None, config, torch.device("cpu"), {"embedding": embedding}, {"norm": norm})
    refused = tried.layers_elsewhere(layers)
    assert set(refused) == (set(layers) if fails else {"pooled", "absorbed"})
    assert not fails or set(refused.values()) == {"the model could not be tried at start (TypeError: takes no tokens)"}
    assert tried.rows == ({} if fails else {"embedding": [trial.TOKENS], "norm": [trial.TOKENS] * 2})
    assert ("takes no tokens" in str(tried.fault)) is fails
    assert len(runs) == 1
    assert not any(vars(module).get("forward") for module in (embedding, norm))
    assert all(module.quant_method is Module.quant_method for module in (embedding, *layers.values()))
