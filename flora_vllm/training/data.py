"""Training text -> blocks of token ids of one length, split into training and held-out blocks.

Documents are joined with the end-of-text token between them and cut into blocks (packing): no padding, no masks, and
the same number of tokens in every step. Chats are rendered by the model's own template and trained on as a whole.
"""

import json
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from flora_vllm.errors import ConfigError

# The label of a place whose prediction doesn't count (torch's default).
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward takes: `inputs` by argument name, each (N, ...); `labels` (N, L) is the token wanted at each
    place of the logits, IGNORED where none is.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tokens(self) -> int:
        """How many predictions count."""
        return int((self.labels != IGNORED).sum())


T = TypeVar("T", covariant=True)
R = TypeVar("R")


class Indexed(Protocol[T]):
    """Examples that are taken by the numbers of their rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int], /) -> T: ...


# What is trained on or measured with: blocks of token ids (N, L), or clips (speech.py).
Examples = Indexed[torch.Tensor] | Indexed[Batch]


class Split(Protocol):
    """Examples to train on and, apart from them, to measure with."""

    @property
    def train(self) -> Examples: ...

    @property
    def held_out(self) -> Examples: ...

    @property
    def train_tokens(self) -> int:
        """How many tokens are trained on in one pass; notices changed data."""
        ...


@dataclass(frozen=True, eq=False)
class Blocks:
    """Token ids ready to train on: `train` (N, L) and `held_out` (M, L), int64, host; no token is in both, and no
    document if there are enough of them.
    """

    train: torch.Tensor
    held_out: torch.Tensor

    @property
    def train_tokens(self) -> int:
        return self.train.numel()


def as_batch(examples: "torch.Tensor | Batch", device: torch.device) -> Batch:
    """Examples on `device`; of token ids (N, L) each place wants the next id, and the last one none."""
    if isinstance(examples, Batch):
        inputs = {name: value.to(device) for name, value in examples.inputs.items()}
        return Batch(inputs, examples.labels.to(device))
    ids = examples.to(device)
    return Batch({"input_ids": ids}, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED))


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents at `path`: .jsonl of {"text"} or {"messages"} lines, a directory of text files, or one text file.

    Raises ConfigError listing the lines or files that can't be used, or saying that there is nothing.
    """
    if not path.exists():
        raise ConfigError(f"training data {path}: no such file or directory")
    if path.is_dir():
        documents = _read_directory(path)
    elif path.suffix == ".jsonl":
        documents = read_lines(path, lambda line: _document(line, tokenizer))
    else:
        documents = [_read_text(path)]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise ConfigError(f"training data {path}: no text in it; give .jsonl lines, text files or a directory of them")
    return documents


def make_blocks(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    held_out_share: float,
    seed: int,
    where: str,
) -> Blocks:
    """Split documents, tokenise and cut into blocks of `length` tokens; what is left over at the end is dropped.

    More documents than the share are held out until they fill a block. With fewer than 20, or if that leaves no block
    to train on, the token stream is split instead, its end held out. Raises ConfigError if there is not enough text for
    one block on each side.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(documents), generator=generator).tolist()
    ids = [_tokenise(documents[i], tokenizer) for i in order]
    ends = list(accumulate(map(len, ids)))
    cut = max(1, round(len(ids) * held_out_share), bisect_left(ends, length) + 1)
    held_out, train = _join(ids[:cut]), _join(ids[cut:])
    if len(documents) < 20 or len(train) < length:
        stream = _join(ids)
        cut = max(length, round(len(stream) * held_out_share / length) * length)
        train, held_out = stream[:-cut], stream[-cut:]
    if len(train) < length or len(held_out) < length:
        way_out = "lower --held-out" if len(train) + len(held_out) >= 2 * length else "add text or lower --length"
        raise ConfigError(
            f"training data {where}: {len(train) + len(held_out)} tokens in {len(documents)} document(s) are too few; "
            f"one block of {length} tokens is needed to train on and one to measure with: {way_out}"
        )
    return Blocks(_cut(train, length), _cut(held_out, length))


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """All documents in order, joined and cut into blocks (N, `length`); the rest at the end is dropped."""
    return _cut(_join([_tokenise(document, tokenizer) for document in documents]), length)


def _read_directory(path: Path) -> list[str]:
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise ConfigError(f"training data {path}: the directory holds no files")
    documents, faults = [], []
    for file in files:
        try:
            documents.append(_read_text(file))
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError(f"training data {path}: {len(faults)} file(s) can't be used\n  " + "\n  ".join(faults[:20]))
    return documents


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # without the mark that editors on Windows put first
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None


def read_lines(path: Path, parse: Callable[[str], R], desc: str | None = None) -> list[R]:
    """What `parse` makes of each line that isn't blank, with a progress bar if `desc` says what takes long.

    Raises ConfigError listing the lines `parse` raises one for.
    """
    parsed, faults = [], []
    # Not splitlines(): JSON may hold U+2028 and other separators as they are.
    lines = _read_text(path).split("\n")
    for number, line in enumerate(tqdm(lines, desc=desc, file=sys.stderr, disable=desc is None), start=1):
        if not line.strip():
            continue
        try:
            parsed.append(parse(line))
        except ConfigError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        raise ConfigError(f"training data {path}: {len(faults)} line(s) can't be used\n  " + "\n  ".join(faults[:20]))
    return parsed


def parse_line(line: str) -> Any:
    """What a line of JSON says. Raises ConfigError for what is no JSON or has text that is no Unicode."""
    try:
        row = json.loads(line)
        if "\\u" in line:  # an escape can be half a character, which no tokeniser and no file name takes
            json.dumps(row, ensure_ascii=False).encode()
    except RecursionError:
        raise ConfigError("is nested too deep") from None
    except UnicodeEncodeError:
        raise ConfigError(r"has text with half a character (\ud800 to \udfff without its other half)") from None
    except ValueError as error:
        raise ConfigError(f"not JSON ({getattr(error, 'msg', error)})") from None
    return row


def _document(line: str, tokenizer: PreTrainedTokenizerBase) -> str:
    row = parse_line(line)
    if isinstance(row, dict) and "audio" in row:
        raise ConfigError('has "audio", and the base is a text model: audio trains a Whisper base')
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError('a chat needs a chat template, which this model\'s tokenizer lacks; use "text" lines')
        # A template is code that came with the model; what it raises is up to it (jinja2 and whatever it calls).
        from jinja2 import TemplateError

        try:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"the model's chat template refuses the messages ({error})") from None
        if not isinstance(text, str):  # of a list of chats it is a list
            raise ConfigError('"messages" is a list of chats; give each chat a line of its own')
        return text
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ConfigError(f'needs "text": a string, or "messages": a list; it has {keys}')


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [*ids, end] if isinstance(end, int) else list(ids)


def _join(ids: Sequence[list[int]]) -> list[int]:
    return [token for document in ids for token in document]


def _cut(ids: list[int], length: int) -> torch.Tensor:
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)


def batches(examples: "Indexed[T]", size: int, seed: int, first_step: int) -> Iterator[T]:
    """`size` examples for step `first_step`, `first_step` + 1, … for ever; each pass over them is shuffled.

    Batch n depends on (examples, size, seed, n) only, so a resumed run sees what it would have seen.
    """
    count, permutations = len(examples), {}
    step = first_step
    while True:
        places = range(step * size, (step + 1) * size)
        rows = []
        for place in places:
            epoch = place // count
            if epoch not in permutations:
                permutations = {epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))}
            rows.append(int(permutations[epoch][place % count]))
        yield examples[rows]
        step += 1
