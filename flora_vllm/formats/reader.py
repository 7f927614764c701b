"""A PEFT directory -> Adapter, or one error that lists everything wrong with it.

Every check that needs no other check's success runs, so a user repairs a checkpoint in one go. What is returned
has passed all of them: later only what the engine alone knows can be at fault. Every tensor of the file is one that the
family's row names, or a fault.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from flora_vllm.adapter import Adapter, ModelLayout, ModuleTerms
from flora_vllm.errors import AdapterError, adapter_error
from flora_vllm.formats.activation import EVERYWHERE, invocation_tokens
from flora_vllm.formats.config_keys import EXPERT_PARAMETERS, CheckedConfig, check_config
from flora_vllm.formats.experts import Parameter, expert_modules, parameter_faults, take_parameters
from flora_vllm.formats.families.biases import BIAS_NAMES
from flora_vllm.formats.families.family import FLOATS, Family, ModuleFile
from flora_vllm.formats.families.table import FAMILIES, REFUSED, family_of
from flora_vllm.formats.files import CONFIG_NAME, SIDECAR_NAME, WEIGHTS_NAME, collect_files, digest_of, read_files
from flora_vllm.formats.limits import shown
from flora_vllm.formats.module_faults import (
    Records,
    module_faults,
    refusal,
    scope_of,
    selected_modules,
    shared_faults,
    tying_faults,
    unsaved_faults,
    value_faults,
)
from flora_vllm.formats.names import not_understood, saved_part, split_name
from flora_vllm.formats.ranks import Limits, built_faults, stated_faults, stated_rank
from flora_vllm.formats.tasks import digest_of_task, split_task
from flora_vllm.formats.tensor_file import TORCH_DTYPES, TensorRecord, load_json_object, parse_records, tensor_view
from flora_vllm.formats.token_rows import KEY, TokenRows, module_of_rows, terms_of, token_rows
from flora_vllm.formats.trainer_names import as_peft_names, looks_wrapped
from flora_vllm.pacing import pace
from flora_vllm.terms import Offset, Replaced, check_fit

logger = logging.getLogger(__name__)

# A message with more lines helps nobody and would be sent over HTTP.
MAX_FAULTS = 100
MAX_LOOKED_FOR = 1000
# Bytes by which tensors of one shape are told apart.
_TOLD_APART = 32


@dataclass(frozen=True, eq=False)
class Examination:
    """What could be learnt about a checkpoint; `adapter` is None exactly if there are faults."""

    adapter: Adapter | None
    faults: tuple[str, ...]
    family: str | None = None
    digest: str | None = None
    left_out: tuple[str, ...] = ()  # tensors of modules that the engine never runs


@dataclass(frozen=True, eq=False)
class _Tensors:
    """A file's tensors, sorted: of modules by path and part, of the whole adapter, and what the row does not name.

    `misnamed`: names that a trainer left as they were, with PEFT's.
    """

    modules: Mapping[str, Records]
    shared: Records
    strange: tuple[str, ...]
    misnamed: Mapping[str, str]
    rows: Records  # of embeddings, by module
    saved: Records  # of modules that the file holds whole, as <module>.<weight or bias>
    parameters: tuple[Parameter, ...] = ()  # of experts, which PEFT adapts as parameters instead of modules


def read_adapter(
    path: str | os.PathLike[str],
    *,
    layout: ModelLayout | None = None,
    max_flora_rank: int | None = None,
    max_lora_rank: int | None = None,
    max_dense_bytes: int | None = None,
    task: str | None = None,
) -> Adapter:
    """The adapter in the PEFT directory `path`, in canonical form, tensors on the host in the file's dtype.

    With `layout` its modules and shapes must fit that model and every module it targets there must have tensors.
    The limits count what is built: `max_flora_rank` products with factors (FLORA, HIRA), `max_lora_rank` low-rank
    terms, `max_dense_bytes` whole matrices. The tensors are views of one buffer. `task`: which of the tasks of a family
    that has several (Poly) in one directory. Raises AdapterError with every fault.
    """
    limits = Limits(max_flora_rank, max_lora_rank, max_dense_bytes)
    found = examine(path, layout=layout, limits=limits, task=task)
    if found.adapter is None:
        raise adapter_error(os.fspath(path), found.faults)
    return found.adapter


def digest_and_family(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """`content_digest`, and the family that the config names; "" if it names none. Raises AdapterError."""
    directory, task = split_task(os.fspath(path))
    files = read_files(directory, root)
    try:
        family = family_of(load_json_object(files.config))[0]
    except AdapterError:
        family = None
    return digest_of_task(files.digest, task), family or ""


def warn_of(family: str, where: str) -> None:
    """Log what the user of an adapter of this family must know, if there is something."""
    if FAMILIES[family].caution:
        logger.warning("adapter %s is %s: %s", where, FAMILIES[family].title, FAMILIES[family].caution)


def examine(
    path: str | os.PathLike[str],
    *,
    layout: ModelLayout | None = None,
    limits: Limits | None = None,
    task: str | None = None,
) -> Examination:
    """`read_adapter` without the raise."""
    files, faults = collect_files(path)
    found = examine_files(files, layout, Limits() if limits is None else limits, task)
    digest = digest_of(files) if {CONFIG_NAME, WEIGHTS_NAME} <= files.keys() else None
    if faults or found.adapter is None or digest is None:
        return Examination(None, (*faults, *found.faults), found.family, digest)
    return replace(found, adapter=replace(found.adapter, digest=digest), digest=digest)


def examine_files(
    files: Mapping[str, bytearray], layout: ModelLayout | None, limits: Limits, task: str | None = None
) -> Examination:
    """Judge the content of the files that there are; the digest is left to the caller."""
    name, family, config, faults = _examine_config(files, limits)
    if WEIGHTS_NAME not in files:
        return _refused(name, faults)
    data = files[WEIGHTS_NAME]
    try:
        records, left_out = _of_what_runs(parse_records(data), layout)
    except AdapterError as error:
        return _refused(name, [*faults, f"{WEIGHTS_NAME}: {error}"])
    faults += value_faults(data, records)
    if family is None:
        return _refused(name, faults)
    faults += _task_faults(family, config, task)
    tensors = _sorted(family, config, data, records)
    faults += tensors.strange
    if tensors.misnamed:
        # Whatever else could be said of its modules would only say this again.
        return _refused(name, [*faults, _misnamed_fault(tensors.misnamed)])
    if not config.bad and family.implied(config.values):
        implied, fault = _implied(config, layout)
        if fault is not None:  # without them every tensor would seem to be of no module
            return _refused(name, [*faults, fault])
        tensors = replace(tensors, modules={**implied, **tensors.modules})
    adapts_parameters = family.keys.get("target_parameters") is EXPERT_PARAMETERS
    modules, parameters, misplaced = take_parameters(config.values, tensors.modules, unsaid=adapts_parameters)
    faults += misplaced
    tensors = replace(tensors, modules=modules, parameters=parameters)
    if not (tensors.modules or tensors.parameters or misplaced):
        but = f" but of modules that this engine never runs ({left_out[0]!r})" if left_out else ""
        faults.append(f"{WEIGHTS_NAME}: no module has tensors of family {family.name}{but}; nothing would be adapted")
    rows = TokenRows()
    try:
        # No more than it takes to know that there are too many to list.
        faults += itertools.islice(module_faults(family, config, tensors.modules, layout), MAX_LOOKED_FOR)
        faults += parameter_faults(config, tensors.parameters, layout)
        faults += unsaved_faults(config, tensors.saved, layout)
        faults += tying_faults(config, layout)
        faults += shared_faults(family, config, tensors.shared)
        rows = token_rows(config, tensors.rows, layout)
        faults += rows.faults
    except AdapterError as error:  # a pattern of the config that takes too long
        faults.append(str(error))
    if faults:
        return _refused(name, faults)
    modules, faults = _built(family, config, data, tensors, layout, task, rows)
    faults += built_faults(modules, limits)
    if invocation_tokens(config.values) is not None:
        faults += [
            f"module {module!r} has a weight or bias in the base's place: {EVERYWHERE}"
            for module, terms in modules.items()
            if terms.of(Replaced) or any(term.replaces for term in terms.of(Offset))
        ]
    if faults:
        return _refused(name, faults)
    adapter = Adapter(
        family.name,
        stated_rank(config, family),
        modules,
        digest="",
        base_model=config.values.get("base_model_name_or_path"),
        invocation_tokens=invocation_tokens(config.values),
        saved=_views(data, tensors.saved),
    )
    return Examination(adapter, (), name, left_out=left_out)


def _of_what_runs(
    records: list[TensorRecord], layout: ModelLayout | None
) -> tuple[list[TensorRecord], tuple[str, ...]]:
    """Those of modules that the engine runs, and the names of the others."""
    if layout is None or not layout.never_run:
        return records, ()
    left_out = tuple(record.name for record in records if layout.never_runs(record.name))
    return [record for record in records if not layout.never_runs(record.name)], left_out


def _implied(config: CheckedConfig, layout: ModelLayout | None) -> tuple[dict[str, Records], str | None]:
    """The modules that the config selects, none of which needs tensors of its own; or why they cannot be told."""
    if layout is None:
        return {}, "which modules it adapts depends on the base model; give that model too (--base)"
    try:
        return {path: {} for path in selected_modules(config, layout)}, None
    except AdapterError as error:  # a pattern of the config that takes too long
        return {}, str(error)


def _refused(name: str | None, faults: list[str]) -> Examination:
    if len(faults) > MAX_FAULTS:
        faults = [*faults[:MAX_FAULTS], f"and {len(faults) - MAX_FAULTS} more faults"]
    return Examination(None, tuple(faults), name)


def _examine_config(
    files: Mapping[str, bytearray], limits: Limits
) -> tuple[str | None, Family | None, CheckedConfig, list[str]]:
    """The family's name as the config has it, its row if we read it, the config's keys, and the faults."""
    nothing = CheckedConfig({}, frozenset(), ())
    if CONFIG_NAME not in files:
        return None, None, nothing, []
    try:
        raw = load_json_object(bytes(files[CONFIG_NAME]))
    except AdapterError as error:
        return None, None, nothing, [f"{CONFIG_NAME}: {error}"]
    name, family = family_of(raw)
    if family is None:
        asked = shown(raw.get("peft_type") if name is None else name)
        reason = f" ({REFUSED[name]})" if name is not None and name in REFUSED else ""
        return name, None, nothing, [
            f"{CONFIG_NAME}: family {asked} is not supported yet{reason}; supported: {', '.join(FAMILIES)}"
        ]  # fmt: skip
    config = check_config(raw, family.keys)
    beside = _sidecar(files, family)
    faults = [*config.faults, *stated_faults(config, family, limits), *beside.faults]
    return name, family, CheckedConfig({**config.values, **beside.values}, config.bad | beside.bad, ()), faults


def _sidecar(files: Mapping[str, bytearray], family: Family) -> CheckedConfig:
    """The keys of flora_sidecar.json; a family that needs some needs the file."""
    try:
        raw = load_json_object(bytes(files[SIDECAR_NAME])) if SIDECAR_NAME in files else {}
    except AdapterError as error:
        return CheckedConfig({}, frozenset(family.sidecar_keys), (f"{SIDECAR_NAME}: {error}",))
    return check_config(raw, family.sidecar_keys, SIDECAR_NAME)


def _task_faults(family: Family, config: CheckedConfig, task: str | None) -> list[str]:
    if config.bad:
        return []
    tasks = family.tasks(config.values)
    if task is None and tasks:
        return [f"it has {len(tasks)} tasks; add one to its path as <path>#<task>: {', '.join(tasks)}"]
    if task is not None and task not in tasks:
        there = f"it has {', '.join(tasks)}" if tasks else f"{family.name} adapters have none"
        return [f"there is no task {task!r}; {there}; correct what follows the # of its path"]
    return []


def _misnamed_fault(misnamed: Mapping[str, str]) -> str:
    old, new = next(iter(misnamed.items()))
    return (
        f"{len(misnamed)} tensor names are not as PEFT saves them, for example {old!r} in place of {new!r}; "
        "run `flora-vllm convert --repair DIR OUT` with this directory for DIR, and serve OUT"
    )


def _sorted(family: Family, config: CheckedConfig, data: bytearray, records: list[TensorRecord]) -> _Tensors:
    nested, kept = bool(config.values.get("target_parameters")), tuple(config.values.get("modules_to_save") or ())
    modules: dict[str, dict[str, TensorRecord]] = {}
    shared: dict[str, TensorRecord] = {}
    strange = []
    misnamed: dict[str, str] = {}
    saved: dict[str, TensorRecord] = {}
    rows: dict[str, TensorRecord] = {}
    for record in records:
        pace()
        if KEY in family.keys and (module := module_of_rows(record.name)) is not None:
            rows[module] = record
            continue
        split = split_name(family, record.name)
        # A name in modules_to_save may end an adapter's own tensors' names, too.
        may_be_whole = split is None or split[1] in BIAS_NAMES
        whole = saved_part(record.name, kept, within=split is None) if may_be_whole else None
        if whole is not None:
            if record.dtype not in FLOATS:
                strange.append(
                    f"tensor {record.name!r} has dtype {record.dtype}; allowed of what is saved whole: "
                    f"{', '.join(FLOATS)}; convert it, for example to float32"
                )
            # PEFT writes an embedding or a head that it trains twice, by both names of it.
            other = saved.get(".".join(whole))
            if other is not None and data[other.start : other.end] != data[record.start : record.end]:
                strange.append(
                    f"tensors {other.name!r} and {record.name!r} are both {whole[1]} of {whole[0]!r}; keep one"
                )
            saved[".".join(whole)] = record
            continue
        better = (
            as_peft_names(family, record.name, nested) if split is None or looks_wrapped(record.name) else record.name
        )
        if better != record.name:
            misnamed[record.name] = better
        elif split is None:
            strange.append(not_understood(family, record.name))
        elif split[0] is None:
            shared[split[1]] = record
        else:
            modules.setdefault(split[0], {})[split[1]] = record
    return _Tensors(modules, shared, tuple(strange), misnamed, rows, saved)


def _built(
    family: Family,
    config: CheckedConfig,
    data: bytearray,
    tensors: _Tensors,
    layout: ModelLayout | None,
    task: str | None,
    rows: TokenRows,
) -> tuple[dict[str, ModuleTerms], list[str]]:
    """The canonical form, and what only a row's own reading of a module finds wrong."""
    modules: dict[str, ModuleTerms] = {}
    faults = []
    shared = _views(data, tensors.shared)
    known: dict[tuple, torch.Tensor] = {}
    for module, records in sorted(tensors.modules.items()):
        pace()
        shape = None if layout is None else layout.shape_of(module)
        scope = scope_of(config.values, module, shape, records, task)
        try:
            views = {name: _once(known, data, records[name], tensor) for name, tensor in _views(data, records).items()}
            terms = family.terms(ModuleFile(scope, views, shared))
            if shape is not None:  # for what the axes of its tensors do not tell
                check_fit(shape, terms)
            modules[module] = ModuleTerms(terms)
        except AdapterError as error:
            faults.append(f"module {module!r}: {error}")
    # The file may have the rows of a tied model once, or under the output layer's name, too.
    for module in [*modules] if layout is not None and family.of_heads else ():
        assert layout is not None, "asked above"
        head = layout.tied.get(layout.rename(module))
        if head is not None and head not in map(layout.rename, modules):
            modules[head] = modules[module]
            if (reason := refusal(head, layout)) is not None:
                faults.append(f"module {head!r} has the weight of {module!r} and would have its rows, too: {reason}")
    for parameter in tensors.parameters:
        faults += _experts_built(config, data, parameter, layout, modules)
    of_rows = _views(data, tensors.rows)
    for module in rows.tokens:
        if module in modules:
            faults.append(
                f"module {module!r} has rows of tokens and tensors of family {family.name}; train one of both"
            )
        modules[module] = ModuleTerms((terms_of(rows, module, of_rows),))
    return modules, faults


def _experts_built(
    config: CheckedConfig,
    data: bytearray,
    parameter: Parameter,
    layout: ModelLayout | None,
    modules: dict[str, ModuleTerms],
) -> Iterator[str]:
    """Adds each expert's layers of `parameter` to `modules`; the faults."""
    try:
        for module, terms in expert_modules(parameter, _views(data, parameter.records), config.values, layout):
            if module in modules:
                yield f"module {module!r} has tensors of its own and in {parameter.full!r}; keep those of one"
            modules[module] = ModuleTerms(terms)
    except AdapterError as error:  # a pattern of the config that takes too long
        yield f"parameter {parameter.full!r}: {error}"


def _views(data: bytearray, records: Records) -> dict[str, torch.Tensor]:
    return {name: tensor_view(data, record) for name, record in records.items() if record.dtype in TORCH_DTYPES}


def _once(
    known: dict[tuple, torch.Tensor], data: bytearray, record: TensorRecord, tensor: torch.Tensor
) -> torch.Tensor:
    """The record's `tensor`, or an equal one met before: a file repeats what its modules share (ShareLoRA's one A).

    `known`: the tensors by shape, dtype and first bytes, so that tensors that differ are not compared whole.
    """
    if len(record.shape) < 2 or record.start == record.end:
        return tensor
    start = bytes(data[record.start : min(record.start + _TOLD_APART, record.end)])
    other = known.setdefault((record.shape, record.dtype, start), tensor)
    return other if other is tensor or torch.equal(other, tensor) else tensor
