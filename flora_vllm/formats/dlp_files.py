"""The files of DLP-LoRA's authors -> a folder that a server reads (dlp.py): `flora-vllm convert --dlp`.

Theirs: a text file with a LoRA folder a line, in the order of the classifier's outputs; the encoder's folder with its
config and tokenizer; and the classifier's state dict, of which only tensors are read. top_p (0.6) and the number of
tokens are in their scripts.
"""

import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from flora_vllm.errors import AdapterError
from flora_vllm.formats.dlp import CLASSIFIER_NAME, DLP_NAME, ENCODER_NAME, TOKENIZER_NAME, Chooser, read_chooser
from flora_vllm.formats.dlp_classifier import WITHOUT_EFFECT
from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME
from flora_vllm.formats.foreign import load_tensors
from flora_vllm.formats.out import replaceable


def write_dlp(out: Path, listing: Path, encoder: Path, classifier: Path, top_p: float, max_tokens: int) -> Chooser:
    """Write the folder `out`, see `replaceable`, and read it back. Raises AdapterError, nothing written."""
    out = replaceable(out)
    adapters = _listed(listing)
    tensors, _ = load_tensors(classifier)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
        fresh = Path(made, out.name)
        fresh.mkdir()
        for name, folder in adapters.items():
            (fresh / name).mkdir()
            for file in (CONFIG_NAME, WEIGHTS_NAME):
                _copy(folder / file, fresh / name / file)
        save_file(
            {name: tensor for name, tensor in tensors.items() if not name.startswith(WITHOUT_EFFECT)},
            fresh / CLASSIFIER_NAME,
        )
        _copy(encoder / ENCODER_NAME, fresh / ENCODER_NAME)
        (fresh / TOKENIZER_NAME).write_text(_tokenizer(encoder), encoding="utf-8")
        config = {"adapters": list(adapters), "top_p": top_p, "max_tokens": max_tokens}
        (fresh / DLP_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        read_chooser(fresh)
        if out.exists():
            out.rmdir()
        fresh.rename(out)
    return read_chooser(out)


def _listed(listing: Path) -> dict[str, Path]:
    """Name -> folder, by line; Windows' separators are the authors'."""
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise AdapterError(f"{listing}: cannot be read ({error})") from None
    folders = [Path(line.replace("\\", "/")) for line in lines if line]
    names = {folder.name: folder for folder in folders}
    if not folders or len(names) < len(folders):
        raise AdapterError(f"{listing}: a line must name a folder, and no two folders may have one name")
    return names


def _copy(source: Path, to: Path) -> None:
    try:
        shutil.copyfile(source, to)
    except OSError as error:
        hint = "; a pickle becomes one by `flora-vllm convert --pickle`" if to.name == WEIGHTS_NAME else ""
        raise AdapterError(f"{source}: cannot be read ({error.strerror}){hint}") from None


def _tokenizer(encoder: Path) -> str:
    """As transformers' class for it has it, so that what it is told beside tokenizer.json counts too."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(encoder), local_files_only=True)
        return found.backend_tokenizer.to_str()
    except Exception as error:  # whatever transformers raises for a folder without one
        raise AdapterError(f"{encoder}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error
