"""The plugin's options, as vLLM's `additional_config["flora"]` holds them: one way serves the command line, YAML,
Python and Ray. `carried.py` brings them to every process of an engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flora_vllm.ops.paths import PATHS, PathChoice
from flora_vllm.options import (
    Values,
    byte_count,
    check,
    fields_of,
    from_mapping,
    number_above,
    one_of,
    option,
    switch,
    text,
    whole,
)
from flora_vllm.plugin import names

KEY = "flora"


@dataclass(frozen=True)
class FloraOptions:
    """What the user may set. A field here is all of an option: flag, keyword, YAML key, cluster key and check."""

    max_rank: int = option(
        16,
        "--max-flora-rank",
        whole(1),
        "Largest rank of a FLoRA or HiRA adapter, as its file says it; larger ones are refused.",
        metavar="R",
    )
    path: PathChoice = option(
        "auto",
        "--flora-path",
        one_of(PATHS),
        "How adapted rows are computed: auto takes the cheaper way per run of tokens, by measured costs. One fixed "
        "path makes results independent of what else is in the batch, to float rounding.",
    )
    adapter_root: str | None = option(
        None,
        "--flora-adapter-root",
        text("a directory"),
        "Directory that adapter paths arriving by request must lie in. Paths in --lora-modules are not confined.",
        metavar="DIR",
    )
    graph_rows: int | Literal["auto"] = option(
        "auto",
        "--flora-graph-rows",
        whole(0, "auto"),
        "GPUs: steps whose adapter tokens need at most this many base products in all (a FLoRA token of rank r needs "
        "r, most others one) replay CUDA graphs that hold the adapters; larger ones run without. auto: max(256, "
        "largest captured graph), after a self-test on this GPU. 0: every step with adapter tokens runs without.",
        metavar="N",
    )
    max_dense_bytes: int = option(
        64 << 20,
        "--max-flora-dense-bytes",
        whole(0),
        "Largest total of an adapter's whole matrices (LoKr, C3A, SHiRA and others that have no factors), in bytes; "
        "larger ones are refused.",
        metavar="BYTES",
    )
    adapter_memory: int | None = option(
        None,
        "--adapter-memory",
        byte_count(),
        "Bytes that each worker's adapters may take, in memory and in slots together, for example 2GiB. In place of "
        "--max-cpu-loras: how many adapters are kept follows their ranks. An adapter that could run beside others that "
        "it would not fit with is refused.",
        metavar="BYTES",
    )
    adapter_wait: float = option(
        5.0,
        "--adapter-wait",
        number_above(0),
        "Seconds that a request waits at most for a slot while requests of adapters that have one keep coming; then "
        "one of those gets no further requests until its slot is free. Not with --scheduling-policy priority.",
        metavar="SECONDS",
    )
    adapter_shares: str = option(
        "none",
        "--adapter-shares",
        one_of(("none", "prefix", "key")),
        "Fair shares of the engine: the next waiting request is of the tenant that fewest tokens were computed for. "
        "Tenants are told by the part of an adapter's name before the first / (prefix), or by the API key, with "
        "--adapter-acl its tenants (key). Not with --scheduling-policy priority.",
    )
    adapter_names: str = option(
        names.DEFAULT,
        "--flora-adapter-names",
        Values("a regular expression", names.is_expression),
        "What adapters may be called: names that this expression matches as a whole. Whatever it says, a name has at "
        f"most {names.MAX_LETTERS} printable letters and no empty part, . or .. between slashes.",
        metavar="REGEX",
    )
    adapter_acl: str | None = option(
        None,
        "--adapter-acl",
        text("a file"),
        "JSON file that says which API key sees, uses and loads which adapters (flora_vllm/plugin/THREATS.md). Keys of "
        "--api-key remain the operator's, who may do everything.",
        metavar="FILE",
    )
    adapter_digests: str | None = option(
        None,
        "--flora-adapter-digests",
        text("a file"),
        "Load only adapters whose digest (flora-vllm inspect) begins a line of this file.",
        metavar="FILE",
    )
    norms: bool = option(
        False,
        "--flora-norms",
        switch(),
        "Adapters may have norms of their own in a compiled model, too: each of the model's norms is then called for "
        "itself instead of being fused with what is around it, for every request. Without it: with --enforce-eager.",
    )
    max_upload_bytes: int = option(
        256 << 20,
        "--flora-max-upload-bytes",
        whole(0),
        "Largest request to /v1/load_lora_adapter that brings an adapter's files itself, in bytes.",
        metavar="BYTES",
    )

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def from_mapping(cls, values: Any) -> "FloraOptions":
        """Raises ConfigError for anything but a mapping of known keys to allowed values."""
        return from_mapping(cls, values, 'additional_config["flora"]')


# What the HTTP server of `vllm serve` keeps, and nothing else: option -> why to leave it out elsewhere.
_OF_THE_SERVER = {
    "adapter_root": "no client gives a path there",
    "adapter_names": "no client gives a name there",
    "adapter_acl": "ask for keys in front of it",
    "max_upload_bytes": "nothing is uploaded there",
}


def faults_without_server(options: FloraOptions) -> list[str]:
    """One for each option that promises something, and would do nothing where `vllm serve` does not ask for it."""
    known = fields_of(FloraOptions)
    given = {name: why for name, why in _OF_THE_SERVER.items() if getattr(options, name) != known[name].default}
    if options.adapter_shares == "key":
        given["adapter_shares"] = "key needs the requests' keys; use prefix"
    return [
        f"{name} ({known[name].metadata['flag']}) is kept by the HTTP server of `vllm serve` alone and would do "
        f"nothing here; leave it out: {why}"
        for name, why in given.items()
    ]


def options_of(additional_config: Any) -> FloraOptions | None:
    """The options in a vLLM config's `additional_config`; None if FLoRA is not asked for."""
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    return FloraOptions.from_mapping(additional_config[KEY])


def options_of_engine(engine: Any) -> FloraOptions | None:
    """The options of this engine; None if it does not serve FLoRA, or is a stand-in without a config."""
    return options_of(getattr(getattr(engine, "vllm_config", None), "additional_config", None))
