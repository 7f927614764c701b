"""DLP-LoRA's classifier: an encoder's first position through a norm and a linear map, one number an adapter.

`Decode(norm(encoder(tokens)[0]))`, without an attention mask, on the last `max_tokens` tokens of a prompt: so the first
position is not [CLS] where a prompt is longer (MeCuping/DLP-LoRA: ClassifierModel.py, ClassifierUtilities.py). Built
from bytes that were read before, in float32; no code of the folder's is run.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from flora_vllm.errors import AdapterError, bounded
from flora_vllm.formats.limits import shown
from flora_vllm.formats.tensor_file import TORCH_DTYPES, parse_records, tensor_view

# model_type of a config -> transformers' classes, the authors' two.
ENCODERS = {"albert": ("AlbertConfig", "AlbertModel"), "roberta": ("RobertaConfig", "RobertaModel")}
# Of the authors' state dicts, without a part in what the classifier says.
WITHOUT_EFFECT = ("model.pooler.", "model.embeddings.position_ids", "model.embeddings.token_type_ids")
# What may be built before tensors are counted.
_MOST_LAYERS = 256
_LAYERS = ("num_hidden_layers", "num_hidden_groups", "inner_group_num")


class _Network(torch.nn.Module):
    """Members have the authors' names, which are their state dict's."""

    def __init__(self, encoder: torch.nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.model = encoder
        self.norm = torch.nn.LayerNorm(hidden)
        self.Decode = torch.nn.Linear(hidden, classes)

    def forward(self, tokens_1T: torch.Tensor) -> torch.Tensor:
        first_1H = self.model(input_ids=tokens_1T).last_hidden_state[:, 0]
        return self.Decode(self.norm(first_1H))[0]


class Classifier:
    """`config`: the encoder's config.json. Raises AdapterError with what is wrong or does not fit together."""

    def __init__(
        self, config: Mapping[str, Any], weights: bytearray, tokenizer: bytes, classes: int, max_tokens: int
    ) -> None:
        tensors = _tensors(weights)
        with torch.device("meta"):
            faults = _faults(tensors, _network(config, classes))
        if faults:
            raise AdapterError("; ".join(faults))
        self._network = _network(config, classes).eval().requires_grad_(False)
        self._network.load_state_dict(tensors)
        self._tokenizer = _tokenizer(tokenizer)
        self._max_tokens = max_tokens
        encoder: Any = self._network.model.config
        # RoBERTa's positions begin behind its padding's.
        positions = encoder.max_position_embeddings
        positions -= (encoder.pad_token_id or 0) + 1 if encoder.model_type == "roberta" else 0
        if max_tokens > positions:
            raise AdapterError(f"max_tokens is {max_tokens}; the encoder has {positions} positions")
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= encoder.vocab_size:
            raise AdapterError(f"tokenizer.json has token {largest}; the encoder knows {encoder.vocab_size}")
        try:
            self._network(torch.full((1, max_tokens), largest))
        except Exception as error:  # whatever else in a config makes an encoder that cannot run
            raise AdapterError(f"the encoder cannot be run ({type(error).__name__}: {error})") from error

    @torch.inference_mode()
    def logits(self, prompt: str) -> torch.Tensor:
        """(classes,) float32. Raises AdapterError for a prompt without tokens."""
        tokens = self._tokens(prompt)[-self._max_tokens :]
        if not tokens:
            raise AdapterError("the prompt has no text to choose adapters by")
        return self._network(torch.tensor([tokens]))

    def _tokens(self, prompt: str) -> list[int]:
        try:
            return self._tokenizer.encode(prompt).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics are no Exceptions
            reason = f"{type(error).__name__}: {error}"
            raise AdapterError(f"its tokenizer.json makes no tokens of the prompt ({bounded(reason, 512)})") from error


def _network(config: Mapping[str, Any], classes: int) -> _Network:
    kind = config.get("model_type")
    if kind not in ENCODERS:
        raise AdapterError(f"model_type is {shown(kind)}; allowed: {', '.join(ENCODERS)}")
    for name in _LAYERS:
        if not isinstance(layers := config.get(name, 1), int) or not 1 <= layers <= _MOST_LAYERS:
            raise AdapterError(f"{name} is {shown(layers)}, must be an integer from 1 to {_MOST_LAYERS}")
    transformers = importlib.import_module("transformers")
    make_config, make_model = (getattr(transformers, name) for name in ENCODERS[kind])
    # `attn_implementation` and its like may name code of the hub's, which transformers would fetch and run.
    config = {name: value for name, value in config.items() if "_implementation" not in name}
    try:
        encoder = make_config(**config)
        return _Network(make_model(encoder, add_pooling_layer=False), encoder.hidden_size, classes)
    except Exception as error:  # whatever transformers raises for a config that makes no sense
        raise AdapterError(f"transformers builds no {kind} of it ({type(error).__name__}: {error})") from error


def _tensors(weights: bytearray) -> dict[str, torch.Tensor]:
    records = [record for record in parse_records(weights) if not record.name.startswith(WITHOUT_EFFECT)]
    if strange := sorted({record.dtype for record in records} - set(TORCH_DTYPES)):
        raise AdapterError(f"its tensors are {', '.join(strange)}; allowed: {', '.join(TORCH_DTYPES)}")
    return {record.name: tensor_view(weights, record).float() for record in records}


def _faults(tensors: Mapping[str, torch.Tensor], network: _Network) -> list[str]:
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    faults = []
    if missing := sorted(wanted.keys() - tensors.keys()):
        faults.append(f"tensors are missing: {shown(missing)}")
    if strange := sorted(tensors.keys() - wanted.keys()):
        faults.append(f"tensors that the encoder has no place for: {shown(strange)}")
    for name in sorted(wanted.keys() & tensors.keys()):
        if tuple(tensors[name].shape) != wanted[name]:
            faults.append(f"{name} has shape {tuple(tensors[name].shape)}, must be {wanted[name]}")
        elif not tensors[name].isfinite().all():
            faults.append(f"{name} has values that are not finite")
    return faults


def _tokenizer(content: bytes) -> Any:
    tokenizers = importlib.import_module("tokenizers")
    try:
        found = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise AdapterError(f"tokenizer.json cannot be read ({error})") from error
    found.no_truncation()
    found.no_padding()
    return found
