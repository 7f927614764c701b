"""A PEFT directory -> Adapter, or one error that lists everything wrong with it.

Every check that needs no other check's success runs, so a user repairs a checkpoint in one go. What is returned
has passed all of them: nothing later in the line can find a fault.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flora_vllm.adapter import Adapter, ModelLayout, ModuleTerms
from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.config_keys import CheckedConfig, check_config
from flora_vllm.formats.families.family import Axes, Family
from flora_vllm.formats.families.table import FAMILIES
from flora_vllm.formats.files import CONFIG_NAME, WEIGHTS_NAME, collect_files, digest_of
from flora_vllm.formats.limits import shown
from flora_vllm.formats.matching import Targets
from flora_vllm.formats.tensor_file import TensorRecord, load_json_object, parse_records, tensor_view

PREFIX = "base_model.model."
DTYPES = ("F32", "F16", "BF16")
# A message with more lines helps nobody and would be sent over HTTP.
MAX_FAULTS = 100
MAX_LOOKED_FOR = 1000
# Names that a checkpoint's modules may have in place of the layout's, in front of what they share with it.
MAX_PREFIXES = 64

# Last part of a module path -> why it cannot be adapted, whatever the base model.
UNSUPPORTED_MODULES: Mapping[str, str] = {
    **dict.fromkeys(("lm_head", "embed_out"), "the output layer cannot be adapted yet"),
    **dict.fromkeys(("embed_tokens", "embed_in", "wte", "wpe"), "embeddings cannot be adapted yet"),
    "kv_b_proj": "MLA's kv_b_proj is absorbed into the attention and cannot be adapted yet",
    "experts": "mixture-of-experts weights cannot be adapted yet",
}
_NAME_HINTS: Mapping[str, str] = {
    "embedding_A": "it adapts an embedding, which is not supported yet",
    "embedding_B": "it adapts an embedding, which is not supported yet",
    "lora_magnitude_vector": "it belongs to DoRA, which is not supported yet",
    "lora_B.bias": "it is a LoRA bias, which is not supported; train with lora_bias=False",
    **dict.fromkeys(("lora_", "flora_", "hira_", "ia3_"), "it belongs to another family or has a part too many"),
}
_OTHER_NAME = "whole weights beside the adapter (modules_to_save, embeddings, biases) are not supported"


@dataclass(frozen=True, eq=False)
class Examination:
    """What could be learnt about a checkpoint; `adapter` is None exactly if there are faults."""

    adapter: Adapter | None
    faults: tuple[str, ...]
    family: str | None = None
    digest: str | None = None


def read_adapter(
    path: str | os.PathLike[str],
    *,
    layout: ModelLayout | None = None,
    max_flora_rank: int | None = None,
    max_lora_rank: int | None = None,
) -> Adapter:
    """The adapter in the PEFT directory `path`, in canonical form, tensors on the host in the file's dtype.

    With `layout` its modules and shapes must fit that model and every module it targets there must have tensors.
    The limits count the ranks the file states: `max_flora_rank` for FLORA and HIRA, `max_lora_rank` for LORA.
    The tensors are views of one buffer. Raises AdapterError with every fault.
    """
    found = examine(path, layout=layout, max_flora_rank=max_flora_rank, max_lora_rank=max_lora_rank)
    if found.adapter is None:
        raise adapter_error(os.fspath(path), found.faults)
    return found.adapter


def examine(
    path: str | os.PathLike[str],
    *,
    layout: ModelLayout | None = None,
    max_flora_rank: int | None = None,
    max_lora_rank: int | None = None,
) -> Examination:
    """`read_adapter` without the raise."""
    files, faults = collect_files(path)
    found = examine_files(files, layout, {"flora": max_flora_rank, "lora": max_lora_rank})
    digest = digest_of(files) if len(files) == 2 else None
    if faults or found.adapter is None or digest is None:
        return Examination(None, (*faults, *found.faults), found.family, digest)
    return replace(found, adapter=replace(found.adapter, digest=digest), digest=digest)


def examine_files(
    files: Mapping[str, bytearray], layout: ModelLayout | None, limits: Mapping[str, int | None]
) -> Examination:
    """Judge the content of the files that there are; the digest is left to the caller."""
    name, family, config, faults = _examine_config(files, limits)
    records: list[TensorRecord] = []
    if WEIGHTS_NAME in files:
        try:
            records = parse_records(files[WEIGHTS_NAME])
        except AdapterError as error:
            faults.append(f"{WEIGHTS_NAME}: {error}")
        else:
            faults += _value_faults(files[WEIGHTS_NAME], records)
            if family is not None:
                try:
                    # No more than it takes to know that there are too many to list.
                    faults += itertools.islice(_module_faults(family, config, records, layout), MAX_LOOKED_FOR)
                except AdapterError as error:  # a pattern of the config that takes too long
                    faults.append(str(error))
    if len(faults) > MAX_FAULTS:
        faults = [*faults[:MAX_FAULTS], f"and {len(faults) - MAX_FAULTS} more faults"]
    if faults or family is None or WEIGHTS_NAME not in files:
        return Examination(None, tuple(faults), name)
    return Examination(_build(family, config, files[WEIGHTS_NAME], records), (), name)


def _examine_config(
    files: Mapping[str, bytearray], limits: Mapping[str, int | None]
) -> tuple[str | None, Family | None, CheckedConfig, list[str]]:
    """The family's name as the config has it, the family if we read it, the config's keys, and the faults."""
    nothing = CheckedConfig({}, frozenset(), ())
    if CONFIG_NAME not in files:
        return None, None, nothing, []
    try:
        raw = load_json_object(bytes(files[CONFIG_NAME]))
    except AdapterError as error:
        return None, None, nothing, [f"{CONFIG_NAME}: {error}"]
    name = _family_name(raw)
    family = FAMILIES.get(name or "")
    if family is None:
        asked = shown(name or raw.get("peft_type"))
        supported = ", ".join(FAMILIES)
        return name, None, nothing, [f"{CONFIG_NAME}: family {asked} is not supported yet; supported: {supported}"]
    config = check_config(raw, family.keys)
    return name, family, config, [*config.faults, *_rank_faults(config, family, limits)]


def _family_name(raw: Mapping[str, object]) -> str | None:
    name = raw.get("peft_type")
    if name == "LORA" and raw.get("use_dora") is True:
        return "DORA"
    return name if isinstance(name, str) else None


def _rank_faults(config: CheckedConfig, family: Family, limits: Mapping[str, int | None]) -> list[str]:
    limit = limits.get(family.limit or "")
    rank = _stated_rank(config)
    if limit is None or rank <= limit:
        return []
    advice = f"start the server with --max-{family.limit}-rank {rank} or use an adapter of lower rank"
    return [f"{CONFIG_NAME}: rank {rank} is above the limit {limit}; {advice}"]


def _stated_rank(config: CheckedConfig) -> int:
    """The largest rank the config names; 1 for a family without ranks (IA3)."""
    return max(config.values.get("r", 1), *(config.values.get("rank_pattern") or {}).values(), 1)


def _value_faults(data: bytearray, records: list[TensorRecord]) -> Iterator[str]:
    """Faults of single tensors that need no config: dtype, emptiness, NaN and Inf."""
    for record in records:
        if record.dtype not in DTYPES:
            yield (
                f"tensor {record.name!r} has dtype {record.dtype}; allowed: {', '.join(DTYPES)}; "
                "convert it, for example to float32"
            )
        elif 0 in record.shape:
            yield f"tensor {record.name!r} has shape {record.shape}, which is empty; it was not saved completely"
        else:
            tensor = tensor_view(data, record)
            # Minimum and maximum carry NaN and Inf along, and cost a twentieth of isfinite on bfloat16.
            if not torch.isfinite(torch.stack(tensor.aminmax())).all():
                bad = tensor.numel() - int(torch.isfinite(tensor).sum())
                yield f"tensor {record.name!r} has {bad} NaN or Inf of {tensor.numel()} values; retrain or repair it"


def _split_name(family: Family, name: str) -> tuple[str, str] | None:
    """Module path and part of a tensor's name, None if the name is not one of the family's."""
    for part in family.parts:
        if name.startswith(PREFIX) and name.endswith(f".{part}"):
            module = name[len(PREFIX) : -len(part) - 1]
            return (module, part) if module else None
    return None


def _by_module(family: Family, records: list[TensorRecord]) -> dict[str, dict[str, TensorRecord]]:
    modules: dict[str, dict[str, TensorRecord]] = {}
    for record in records:
        split = _split_name(family, record.name)
        if split is not None:
            modules.setdefault(split[0], {})[split[1]] = record
    return modules


def _module_faults(
    family: Family, config: CheckedConfig, records: list[TensorRecord], layout: ModelLayout | None
) -> Iterator[str]:
    """Faults of names, partners, targets and shapes."""
    for record in records:
        if _split_name(family, record.name) is None:
            hint = next((hint for mark, hint in _NAME_HINTS.items() if mark in record.name), _OTHER_NAME)
            yield (
                f"tensor {record.name!r} is not understood: {hint}; family {family.name} has "
                f"{' and '.join(f'{PREFIX}<module>.{part}' for part in family.parts)}"
            )
    modules = _by_module(family, records)
    if not modules:
        yield f"{WEIGHTS_NAME}: no module has tensors of family {family.name}; nothing would be adapted"
    targets = (
        None
        if config.bad & {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        else Targets.from_config(config.values)
    )
    for module, parts in sorted(modules.items()):
        yield from _one_module_faults(family, config, module, parts, layout)
        if targets is not None and not targets.select(module):
            yield (
                f"module {module!r} has tensors but the config does not select it "
                f"(target_modules {shown(config.values['target_modules'])}); PEFT would not apply them: "
                "correct target_modules, exclude_modules or layers_to_transform, or remove the tensors"
            )
    if layout is not None:
        yield from _layout_faults(sorted(modules), targets, layout)


def _layout_faults(modules: Sequence[str], targets: Targets | None, layout: ModelLayout) -> Iterator[str]:
    """Faults of the modules as a whole against the model's: named twice, or selected and absent."""
    present: dict[str, str] = {}
    for module in modules:
        other = present.setdefault(layout.rename(module), module)
        if other != module:
            yield f"modules {other!r} and {module!r} are one module of the base model; keep the tensors of one"
    if targets is None:
        return
    prefixes = sorted({_renamed_prefix(module, layout) for module in modules}, key=lambda pair: (*map(len, pair),))
    if len(prefixes) > MAX_PREFIXES:
        yield f"the modules' names begin in {len(prefixes)} ways; at most {MAX_PREFIXES} are read"
        return
    for path in layout.shapes:
        # What this checkpoint would call the layout's path: with the prefix that its own modules have.
        name = next(
            (theirs + path.removeprefix(ours) for ours, theirs in reversed(prefixes) if path.startswith(ours)), path
        )
        if path not in present and refusal(name, layout) is None and targets.select(name):
            yield f"module {name!r} is selected by target_modules but has no tensors; the file is incomplete"


def _renamed_prefix(module: str, layout: ModelLayout) -> tuple[str, str]:
    """The layout's and the checkpoint's prefix of `module`, up to where their names agree; both empty if equal."""
    theirs, ours = module.split("."), layout.rename(module).split(".")
    while theirs and ours and theirs[-1] == ours[-1]:
        theirs.pop()
        ours.pop()
    return "".join(f"{name}." for name in ours), "".join(f"{name}." for name in theirs)


def _one_module_faults(
    family: Family,
    config: CheckedConfig,
    module: str,
    parts: Mapping[str, TensorRecord],
    layout: ModelLayout | None,
) -> Iterator[str]:
    for part in family.parts:
        if part not in parts:
            yield f"tensor '{PREFIX}{module}.{part}' is missing, its partner {', '.join(parts)} is there"
    reason = refusal(module, layout)
    if reason is not None:
        yield f"module {module!r} cannot be adapted: {reason}; train without it"
        return
    shape = None if layout is None else layout.shapes.get(layout.rename(module))
    if layout is not None and shape is None:
        yield f"module {module!r} is not in the base model; was the adapter trained on another model?"
    sizes = {} if shape is None else dict(zip("OI", shape, strict=True))
    ranks = () if config.bad & {"r", "rank_pattern"} else family.ranks(config.values, module)
    axes = family.axes(config.values, module)
    for part, record in parts.items():
        if part in axes:
            yield from _shape_faults(record, axes[part], ranks, sizes)
    yield from _partner_faults(parts, axes)


def refusal(module: str, layout: ModelLayout | None) -> str | None:
    """Why `module` cannot be adapted, None if it can as far as its name tells."""
    names = module.split(".")
    if layout is not None:
        for key in (layout.rename(module), names[-1]):
            if key in layout.refused:
                return layout.refused[key]
    return next((UNSUPPORTED_MODULES[name] for name in reversed(names) if name in UNSUPPORTED_MODULES), None)


def _shape_faults(record: TensorRecord, axes: Axes, ranks: tuple[int, ...], sizes: Mapping[str, int]) -> Iterator[str]:
    """The tensor's shape against its axes: `sizes` are O and I of the base layer if known."""
    allowed: list[tuple[int, ...] | None] = []
    for axis in axes:
        known = {"R": ranks, "1": (1,)}.get(axis) or ((sizes[axis],) if axis in sizes else None)
        allowed.append(known)
    fits = len(record.shape) == len(axes) and all(
        known is None or size in known for size, known in zip(record.shape, allowed, strict=True)
    )
    if not fits:
        meaning = {"R": "rank", "I": "in features", "O": "out features", "1": "1"}
        wanted = ", ".join(
            meaning[axis] if known is None else f"{' or '.join(map(str, sorted(set(known))))} ({meaning[axis]})"
            for axis, known in zip(axes, allowed, strict=True)
        )
        yield (
            f"tensor {record.name!r} has shape {record.shape}; the config and the base model allow ({wanted}); "
            "correct the config, or the adapter was trained on another model"
        )


def _partner_faults(parts: Mapping[str, TensorRecord], axes: Mapping[str, Axes]) -> Iterator[str]:
    """Two tensors of a module that disagree about its rank, which the config may not settle."""
    ranks = {
        part: record.shape[axes[part].index("R")]
        for part, record in parts.items()
        if "R" in axes.get(part, ()) and len(record.shape) == len(axes[part])
    }
    if len(set(ranks.values())) > 1:
        names = ", ".join(f"{parts[part].name!r} has rank {rank}" for part, rank in ranks.items())
        yield f"the tensors of one module disagree: {names}"


def _build(family: Family, config: CheckedConfig, data: bytearray, records: list[TensorRecord]) -> Adapter:
    modules: dict[str, ModuleTerms] = {}
    for module, parts in sorted(_by_module(family, records).items()):
        tensors = {part: tensor_view(data, record) for part, record in parts.items()}
        modules[module] = family.terms(config.values, module, tensors)
    base_model = config.values.get("base_model_name_or_path")
    return Adapter(family.name, _stated_rank(config), modules, digest="", base_model=base_model)
