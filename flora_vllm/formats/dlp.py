"""DLP-LoRA (arXiv 2410.01497): a small classifier reads a prompt once and chooses the LoRAs that the request gets.

`y += s Σ_n w_n B_n A_n x`, s the scale of the *first* adapter and w as `chosen` has it: the authors' code's equation
(MeCuping/DLP-LoRA: LoraModel.py, ClassifierModel.py). Theirs adapts q_proj and v_proj; here, every module of the LoRAs.
The folder, written by hand or by `flora-vllm convert --dlp`, holds

    dlp_config.json         {"adapters": ["poems", "legal"], "top_p": 0.6, "max_tokens": 512}
    classifier.safetensors  the authors' state dict: model.* (the encoder), norm.*, Decode.* (adapters, hidden)
    config.json             the encoder's, of transformers: ALBERT or RoBERTa
    tokenizer.json          the encoder's
    poems/, legal/          PEFT folders of plain LoRA, in the order of the classifier's outputs
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.beneath import Directory
from flora_vllm.formats.config_keys import is_number
from flora_vllm.formats.dlp_classifier import Classifier
from flora_vllm.formats.files import MAX_BYTES, WEIGHTS_NAME, collect_files, digest_of, read_one
from flora_vllm.formats.limits import MAX_CONFIG_BYTES, shown
from flora_vllm.formats.lora_merges import LoraPart, low_rank, part_faults
from flora_vllm.formats.ranks import Limits
from flora_vllm.formats.reader import examine_files
from flora_vllm.formats.tensor_file import load_json_object

DLP_NAME, CLASSIFIER_NAME = "dlp_config.json", "classifier.safetensors"
ENCODER_NAME, TOKENIZER_NAME = "config.json", "tokenizer.json"
MOST_ADAPTERS = 256
_MAX_BYTES = {
    DLP_NAME: MAX_CONFIG_BYTES,
    CLASSIFIER_NAME: MAX_BYTES[WEIGHTS_NAME],
    ENCODER_NAME: MAX_CONFIG_BYTES,
    TOKENIZER_NAME: 64 << 20,
}
_KEYS = ("adapters", "top_p", "max_tokens")
# Sums of probabilities that are equal but for rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Choice:
    """One adapter of a folder, at `path`. `share`: the first adapter's scale over its own."""

    name: str
    path: str
    digest: str
    rank: int
    share: float


@dataclass(frozen=True, eq=False)
class Chooser:
    """A folder as a server keeps it. `digest`: of everything in it that has an effect."""

    choices: tuple[Choice, ...]
    top_p: float
    classifier: Classifier
    digest: str

    @property
    def most(self) -> int:
        """How many can be chosen at once: of n equally likely ones the k-th needs (k - 1) / n to be at most top_p."""
        count = len(self.choices)
        return min(count, math.floor(self.top_p * count + _ROUNDING) + 1)

    def choose(self, prompt: str) -> list[tuple[Choice, float]]:
        """Adapters and weights, the likeliest first. Alone in its batch: the same whatever else is asked."""
        found = chosen(self.classifier.logits(prompt), self.top_p)
        return [(self.choices[place], weight) for place, weight in found]


def chosen(logits_E: torch.Tensor, top_p: float) -> list[tuple[int, float]]:
    """(place, weight) by falling probability, until their sum is above `top_p`; the one that crosses it included.

    The weights are the softmax of the *probabilities* of those kept, as `ClassifierOutput` has it.
    """
    sorted_E, order_E = torch.softmax(logits_E.double(), 0).sort(descending=True, stable=True)
    count = 1 + int((sorted_E.cumsum(0)[:-1] <= top_p).sum())
    return [*zip(order_E[:count].tolist(), torch.softmax(sorted_E[:count], 0).tolist(), strict=True)]


def read_chooser(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Chooser:
    """The folder at `path`; with a `root` nothing outside it is read. Raises AdapterError with every fault."""
    files, faults = _collected(path, root)
    config: dict[str, Any] = {}
    if DLP_NAME in files:
        try:
            config = load_json_object(bytes(files[DLP_NAME]))
            faults += _config_faults(config)
        except AdapterError as error:
            faults.append(f"{DLP_NAME}: {error}")
    if faults:
        raise adapter_error(str(path), faults)
    choices, faults = _choices(path, root, config["adapters"])
    classifier = None
    try:
        encoder = load_json_object(bytes(files[ENCODER_NAME]))
        classes, tokens = len(config["adapters"]), config["max_tokens"]
        classifier = Classifier(encoder, files[CLASSIFIER_NAME], bytes(files[TOKENIZER_NAME]), classes, tokens)
    except AdapterError as error:
        faults.append(f"the classifier ({CLASSIFIER_NAME}, {ENCODER_NAME}, {TOKENIZER_NAME}): {error}")
    if faults or classifier is None:
        raise adapter_error(str(path), faults)
    contents = [digest_of(files), *(choice.digest for choice in choices)]
    digest = hashlib.sha256("\0".join(contents).encode()).hexdigest()
    return Chooser(tuple(choices), float(config["top_p"]), classifier, digest)


def _collected(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None
) -> tuple[dict[str, bytearray], list[str]]:
    files: dict[str, bytearray] = {}
    faults: list[str] = []
    try:
        with Directory(path, root) as directory:
            for name, most_bytes in _MAX_BYTES.items():
                try:
                    files[name], _ = read_one(directory, name, most_bytes)
                except OSError as error:
                    faults.append(f"{name}: cannot be read ({error.strerror})")
                except AdapterError as error:
                    faults.append(f"{name}: {error}")
    except (OSError, ValueError) as error:
        faults.append(f"the folder cannot be opened ({error.strerror if isinstance(error, OSError) else error})")
    return files, faults


def _config_faults(config: Mapping[str, Any]) -> list[str]:
    faults = []
    if set(config) != set(_KEYS):
        faults.append(f"{DLP_NAME} has the keys {shown(sorted(config))}; it must have {', '.join(_KEYS)}")
    values: list[Any] = [config.get(key) for key in _KEYS]
    names, top_p, tokens = values
    fits = isinstance(names, list) and 0 < len(names) <= MOST_ADAPTERS and all(map(_is_below, names))
    if not fits or len({*names}) < len(names):
        faults.append(f"'adapters' is {shown(names)}; it must be 1 to {MOST_ADAPTERS} different folders below this one")
    if not is_number(top_p) or not 0 <= top_p <= 1:
        faults.append(f"'top_p' is {shown(top_p)}, must be a number from 0 to 1 (the authors': 0.6)")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        faults.append(f"'max_tokens' is {shown(tokens)}, must be an integer of at least 1")
    return faults


def _is_below(name: object) -> bool:
    """Without what stands between names in a mix's own name."""
    if not isinstance(name, str) or not name.isprintable() or set(name) & {"*", "?", "#"}:
        return False
    return 0 < len(name) <= 200 and not name.startswith("/") and not {"", ".", ".."} & {*name.split("/")}


def _choices(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None, names: Sequence[str]
) -> tuple[list[Choice], list[str]]:
    found: list[Choice] = []
    faults: list[str] = []
    first = 0.0
    for name in names:
        place = os.fspath(Path(path, name))
        files, wrong = collect_files(place, root)
        adapter = None
        if not wrong:
            examination = examine_files(files, None, Limits())
            adapter, wrong = examination.adapter, [*examination.faults]
        scale = 0.0
        if adapter is not None and not wrong:
            part = LoraPart(1.0, "it", files, adapter)
            wrong = [*part_faults(part)]
            scales = {term.scale for module in adapter.modules if (term := low_rank(part, module)) is not None}
            scale = max(scales, default=0.0)
            if not wrong and (len(scales) > 1 or scale == 0):
                wrong = [f"its modules have the scales {sorted(scales)}; DLP-LoRA has one for all of them, not 0"]
        faults += [f"adapter {name!r}: {fault}" for fault in wrong]
        if adapter is not None and not wrong:
            first = first or scale
            found.append(Choice(name, place, digest_of(files), adapter.rank, first / scale))
    return found, faults
