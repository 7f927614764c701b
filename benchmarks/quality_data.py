"""Training and test data of the quality benchmark: source files in eight languages, recorded prompts in five.

Both come from Debian packages that are downloaded and unpacked, never installed, and end as `train.jsonl`, `dev.jsonl`
(which chooses learning rates) and `test.jsonl` per language. Files and clips are shuffled with a fixed seed, duplicates
dropped, and split whole: nothing of a test file or clip is trained on or chosen by.
"""

import gzip
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Source:
    """Debian packages with code of one language, the ending of its files, its name in MultiPL-E."""

    packages: tuple[str, ...]
    suffix: str
    multipl_e: str


CODE = {
    "lua": Source(("luarocks", "lua-penlight"), ".lua", "lua"),
    "perl": Source(("perl-modules-5.36",), ".pm", "pl"),
    "rust": Source(("rust-src",), ".rs", "rs"),
    "racket": Source(("racket-common",), ".rkt", "rkt"),
    "d": Source(("libphobos2-ldc-shared-dev",), ".d", "d"),
    "ruby": Source(("libruby3.1",), ".rb", "rb"),
    "go": Source(("golang-1.19-src",), ".go", "go"),
    "php": Source(("composer", "phpunit"), ".php", "php"),
}
SPEECH = ("fr", "ru", "it", "es", "en")
SPLITS = ("train", "dev", "test")  # the last one is written last
FILE_BYTES = (400, 40_000)
BYTES = {"test": 60_000, "dev": 60_000, "train": 600_000}
LONGEST = 350  # characters of a transcript to train on: one of Italian's is more than a cell's 128 tokens
CLIP_S = 20
CLIPS = {"test": 100, "dev": 16}


def code_data(folder: Path, language: str) -> Path:
    """The directory with the three files ({"text"} lines) of `language`; made if it is not there."""
    out = folder / "code" / language
    if not (out / "test.jsonl").exists():
        with tempfile.TemporaryDirectory(prefix="flora-deb-") as unpacked:
            _unpack(CODE[language].packages, Path(unpacked))
            texts = list(_texts(Path(unpacked), CODE[language].suffix))
        splits = {}
        for name, size in BYTES.items():
            splits[name], texts = _take(texts, size)
        _write(out, {name: [{"text": text} for text in taken] for name, taken in splits.items()})
    return out


def speech_data(folder: Path, language: str) -> Path:
    """The directory with the three files ({"audio", "text", "language"} lines) and 16 kHz WAV files.

    Prompts of the Asterisk telephone exchange, one speaker a language, CC BY-SA 3.0.
    """
    out = folder / "speech" / language
    if not (out / "test.jsonl").exists():
        name = f"asterisk-core-sounds-{language}"
        with tempfile.TemporaryDirectory(prefix="flora-deb-") as unpacked:
            _unpack((name, f"{name}-g722"), Path(unpacked))
            (words,) = Path(unpacked).rglob(f"core-sounds-{language}.txt.gz")
            transcripts = dict(_transcripts(words))
            recordings = {path: _key(path) for path in sorted(Path(unpacked).rglob("*.g722"))}
            known = [(path, transcripts[key]) for path, key in recordings.items() if key in transcripts]
            clips = [_clip(path, text, language, out) for path, text in tqdm(known, desc=language, file=sys.stderr)]
            rows = [row for row in clips if row is not None]
        random.Random(0).shuffle(rows)
        test, rest = rows[: CLIPS["test"]], rows[CLIPS["test"] :]
        # The same words spoken twice would be trained on and tested with.
        tested = {row["text"].lower() for row in test}
        rest = [row for row in rest if row["text"].lower() not in tested and len(row["text"]) <= LONGEST]
        _write(out, {"train": rest[CLIPS["dev"] :], "dev": rest[: CLIPS["dev"]], "test": test})
    return out


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def digest(folder: Path) -> str:
    """Short hash of what `folder` trains and tests on; changed data are another set-up."""
    parts = hashlib.sha256()
    for name in SPLITS:
        parts.update((folder / f"{name}.jsonl").read_bytes())
    return parts.hexdigest()[:12]


def _unpack(packages: Sequence[str], into: Path) -> None:
    for package in packages:
        place = into / package
        place.mkdir()
        try:
            subprocess.run(["apt-get", "download", package], cwd=place, check=True, stdout=sys.stderr)
            (archive,) = place.glob("*.deb")
            subprocess.run(["dpkg", "-x", str(archive), str(place)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"the data are in Debian's package {package}, which could not be downloaded and unpacked ({error}); "
                "run this on Debian 12 after `apt-get update`"
            ) from None


def _texts(folder: Path, suffix: str) -> Iterator[str]:
    """The texts of all files of a sensible size, shuffled, each once."""
    files = [path for path in sorted(folder.rglob(f"*{suffix}")) if path.is_file() and not path.is_symlink()]
    random.Random(0).shuffle(files)
    seen = set()
    for file in files:
        content = file.read_bytes()
        if not FILE_BYTES[0] < len(content) < FILE_BYTES[1] or content in seen:
            continue
        seen.add(content)
        try:
            yield content.decode()
        except UnicodeDecodeError:
            continue


def _take(texts: Sequence[str], size: int) -> tuple[list[str], list[str]]:
    """The first texts up to `size` bytes, and the rest."""
    taken = 0
    for count, text in enumerate(texts):
        if taken >= size:
            return list(texts[:count]), list(texts[count:])
        taken += len(text.encode())
    return list(texts), []


def _transcripts(file: Path) -> Iterator[tuple[str, str]]:
    """Recording -> what is said; sounds without words and lines with remarks are left out."""
    with gzip.open(file, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, colon, text = line.partition(":")
            text = text.strip()
            if colon and not line.startswith(";") and len(text) >= 3 and not set("[(<\ufffd") & set(text):
                yield key.strip(), text


def _key(recording: Path) -> str:
    """A recording's name in the transcript: its path below the speaker's folder."""
    parts = recording.with_suffix("").parts
    return "/".join(parts[parts.index("sounds") + 2 :])


def _clip(recording: Path, text: str, language: str, out: Path) -> dict | None:
    """Decode one recording to a WAV file in `out` and return its manifest line; None for one longer than CLIP_S."""
    from flora_vllm.training.audio import SAMPLE_RATE, load_audio

    name = f"{_key(recording).replace('/', '_')}.wav"
    samples = load_audio(recording)
    if len(samples) > CLIP_S * SAMPLE_RATE:
        return None
    write_wav(out / name, samples, SAMPLE_RATE)
    return {"audio": name, "text": text, "language": language}


def write_wav(file: Path, samples, rate: int) -> None:
    """Mono float samples in -1..1 as 16-bit PCM."""
    import wave

    import numpy as np

    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def _write(folder: Path, splits: dict[str, list[dict]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        fresh = folder / f"{name}.new"
        fresh.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in splits[name]), encoding="utf-8")
        fresh.replace(folder / f"{name}.jsonl")
