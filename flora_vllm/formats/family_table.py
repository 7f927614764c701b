"""README's table of families, made from the rows that the reader goes by, so that it cannot say anything else."""

from pathlib import Path

from flora_vllm.errors import ConfigError
from flora_vllm.formats.families.biases import BIAS_NAMES
from flora_vllm.formats.families.family import Family
from flora_vllm.formats.families.table import REFUSED, REFUSED_VARIANTS, ROWS
from flora_vllm.formats.lora_writer import BECOMES_LORA
from flora_vllm.terms import KINDS

BEGIN, END = "<!-- families: made by `make table` -->", "<!-- end of families -->"
_HEAD = "| family | `peft_type`: tensors | becomes | status |\n|---|---|---|---|"


def family_table() -> str:
    """Markdown: a line for each row, in their order, then one for each reason to refuse."""
    lines = [_HEAD, *map(_served, ROWS)]
    refused: dict[str, list[str]] = {}
    for name, reason in {**REFUSED, **REFUSED_VARIANTS}.items():
        refused.setdefault(reason, []).append(name)
    lines += [f"| {', '.join(names)} | | | refused: {reason} |" for reason, names in refused.items()]
    return "\n".join(lines)


def _served(family: Family) -> str:
    # What a module or the adapter has by name, without the parts of those.
    parts = [name for name in (*family.names, *family.shared_names) if name not in BIAS_NAMES]
    stems = dict.fromkeys(part.split(".")[0].replace("*", "…") for part in parts)
    kinds = [kind.__name__ for kind in KINDS if kind in family.kinds]
    status = ["served"]
    if family.name != "LORA" and set(family.kinds) <= BECOMES_LORA:
        status.append("`convert --to-lora`")
    if family.note:
        status.append(family.note)
    tensors = ", ".join(f"`{stem}`" for stem in stems)
    return f"| {family.title} | {family.type_name}: {tensors} | {', '.join(kinds)} | {'; '.join(status)} |"


def write_into(path: Path) -> None:
    """Put the table between its marks in the file at `path`. Raises ConfigError if they are not there."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path}: it has no lines {BEGIN!r} and {END!r} for the table to stand between")
    path.write_text(f"{before}{BEGIN}\n{family_table()}\n{END}{after}", encoding="utf-8")
