"""DLP-LoRA folders: tiny LoRAs, a tiny classifier and a tokenizer of words, and the authors' code that judges them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from engine_support import State, save_peft_adapter
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"w{i}" for i in range(30)]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}


class TransformerClassifier(torch.nn.Module):
    """`Transformer_Classifier` of MeCuping/DLP-LoRA (srcClassifier/ClassifierModel.py, CC0)."""

    def __init__(self, config: Any, classes: int, mode: str) -> None:
        super().__init__()
        if mode == "albert":
            self.model = transformers.AlbertModel(config, add_pooling_layer=False)
        elif mode == "roberta":
            self.model = transformers.RobertaModel(config)
        self.norm = torch.nn.LayerNorm(config.hidden_size)
        self.Decode = torch.nn.Linear(config.hidden_size, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=tokens, attention_mask=None).last_hidden_state[:, 0, :]
        return self.Decode(self.norm(out))


def classifier_output(out: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`ClassifierOutput(out, "topp", top_p)`, line by line."""
    prob = torch.softmax(out, dim=-1)
    sorted_prob, sorted_index = torch.sort(prob, descending=True)
    cumulative_prob = torch.cumsum(sorted_prob, dim=-1)
    mask = cumulative_prob <= top_p
    mask[..., 1:] = mask[..., :-1].clone()
    mask[..., 0] = 1
    return sorted_index[mask], torch.softmax(sorted_prob[mask], -1)


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(mark, VOCABULARY[mark]) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=marks)
    return tokenizer


def write_classifier(folder: Path, names: Sequence[str], mode: str = "albert", **more: Any) -> TransformerClassifier:
    """Everything of a folder but its adapters."""
    torch.manual_seed(8)
    make = {"albert": transformers.AlbertConfig, "roberta": transformers.RobertaConfig}[mode]
    config = make(**SIZES, **({"embedding_size": 8} if mode == "albert" else {"pad_token_id": 0}))
    network = TransformerClassifier(config, len(names), mode).eval()
    for name, parameter in network.named_parameters():
        # Without biases, which would outweigh the prompt.
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.6 if "Decode" in name else 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(network.state_dict(), folder / "classifier.safetensors")
    transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer()).save_pretrained(folder)
    (folder / "dlp_config.json").write_text(json.dumps({"adapters": [*names], "top_p": 0.6, "max_tokens": 20, **more}))
    return network


def write_adapters(model: Path, folder: Path, names: Sequence[str], **options: Any) -> dict[str, State]:
    """LoRAs of different scales; the weights of PEFT's merge of each."""
    states = {}
    for number, name in enumerate(names):
        config = {
            "r": 2 + 2 * (number % 2),
            "lora_alpha": 4 + number,
            "target_modules": ["q_proj", "v_proj"],
            **options,
        }
        states[name] = save_peft_adapter(model, folder / name, peft.LoraConfig(**config), 40 + number)
    return states
