"""The tables of families, made from the rows that the reader goes by, so that they cannot say anything else.

README has them in groups, formats/README.md one by one.
"""

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


# What a family does to a layer: the group of the first of its terms that has one.
GROUPS = {
    "turn or swap its inputs or outputs": ("Turn", "Swap"),
    "multiply its weights": ("Product",),
    "add a full matrix, kept small": ("Kron", "Circulant", "Sparse", "Bases", "Dense"),
    "choose by token among products of low rank": ("Gated", "Routed"),
    "add a product of low rank": ("Added",),
    "move its outputs": ("Offset",),
    "put rows of their own in the base's place": ("Replaced",),
}

# What is made of loaded adapters, and when they act; no families of their own.
COMBINED = {
    "weigh adapters, by request or by name": "mixes of any that add up, PEFT's merges of LoRAs, DLP-LoRA",
    "begin within the prompt": "aLoRA, of any family",
}


def group_table() -> str:
    """Markdown: a line for each group of served families, then one of what is refused."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for family in ROWS:
        kinds = [kind.__name__ for kind in family.kinds]
        group = next((group for kind in kinds for group, terms in GROUPS.items() if kind in terms), None)
        assert group is not None, f"{family.title} belongs to no group: add its terms {kinds} to GROUPS"
        name = family.title.split(",")[0].split(" (")[0].split(" with")[0]
        if all(name not in names for names in groups.values()):
            groups[group].append(name)
    lines = [f"| {group} | {', '.join(names)} |" for group, names in groups.items() if names]
    lines += [f"| {group} | {ways} |" for group, ways in COMBINED.items()]
    refused = {**REFUSED, **REFUSED_VARIANTS}
    return "\n".join(
        ["| what they do to a layer | families |", "|---|---|", *lines, f"| refused by name | {', '.join(refused)} |"]
    )


def _served(family: Family) -> str:
    # What a module or the adapter has by name, without the parts of those.
    own = [name.split(".")[0] for name in family.names if name not in BIAS_NAMES]
    shared = [name.removesuffix(".weight").removesuffix(".*").split(".")[-1] for name in family.shared_names]
    stems = dict.fromkeys(stem.replace("*", "…") for stem in (*own, *shared))
    kinds = [kind.__name__ for kind in KINDS if kind in family.kinds]
    status = ["served"]
    if family.name != "LORA" and set(family.kinds) <= BECOMES_LORA:
        status.append("`convert --to-lora`")
    if family.note:
        status.append(family.note)
    tensors = ", ".join(f"`{stem}`" for stem in stems)
    return f"| {family.title} | {family.type_name}: {tensors} | {', '.join(kinds)} | {'; '.join(status)} |"


def write_into(path: Path, table: str) -> None:
    """Put `table` between its marks in the file at `path`. Raises ConfigError if they are not there."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path}: it has no lines {BEGIN!r} and {END!r} for the table to stand between")
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
