"""What an adapter may be: ranks as the config states them and as they are built, and bytes of dense matrices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flora_vllm.adapter import ModuleTerms
from flora_vllm.formats.config_keys import CheckedConfig, is_rank
from flora_vllm.formats.families.family import Family
from flora_vllm.formats.files import CONFIG_NAME
from flora_vllm.terms import kind_of


@dataclass(frozen=True)
class Limits:
    """None: no limit. `flora`: scaled products a module; `lora`: low-rank terms; `dense_bytes`: of the adapter."""

    flora: int | None = None
    lora: int | None = None
    dense_bytes: int | None = None


def stated_rank(config: CheckedConfig, family: Family) -> int:
    """The largest rank the config names; 1 for a family without ranks (IA3, SuperTuning alone)."""
    rank = config.values.get(family.rank_key, 1)
    pattern = config.values.get("rank_pattern")  # of some families it is no pattern of ranks, and may be anything
    others = pattern.values() if isinstance(pattern, Mapping) else ()
    ranks = [*(rank if isinstance(rank, list) else [rank]), *others]
    return max((rank for rank in ranks if is_rank(rank)), default=1)


def stated_faults(config: CheckedConfig, family: Family, limits: Limits) -> list[str]:
    limit = getattr(limits, family.limit) if family.limit else None
    rank = stated_rank(config, family)
    if limit is None or rank <= limit:
        return []
    advice = _advice(family.limit or "", rank, limit)
    return [f"{CONFIG_NAME}: rank {rank} is above the limit {limit}; {advice}"]


def built_faults(modules: Mapping[str, ModuleTerms], limits: Limits) -> Iterator[str]:
    """Faults of what the terms come to, which for some families is more than their rank."""
    products, low = {}, {}
    for module, terms in modules.items():
        ranks = [kind_of(term).ranks(term) for term in terms.terms]
        products[module] = sum(count for count, _ in ranks)
        low[module] = sum(count for _, count in ranks)
    for name, limit, built in (("flora", limits.flora, products), ("lora", limits.lora, low)):
        above = [module for module, rank in built.items() if limit is not None and rank > limit]
        if above:
            worst = max(above, key=lambda module: built[module])
            yield (
                f"{len(above)} modules are built with more than the limit of {limit}, {worst!r} with rank "
                f"{built[worst]}; {_advice(name, built[worst], limit or 0)}"
            )
    size = sum(kind_of(term).dense_bytes(term) for terms in modules.values() for term in terms.terms)
    if limits.dense_bytes is not None and size > limits.dense_bytes:
        yield (
            f"its dense matrices take {size} bytes, above the limit of {limits.dense_bytes}; start the server with "
            f"--max-flora-dense-bytes {size} or use a family with factors"
        )


def _advice(name: str, rank: int, limit: int) -> str:
    # Clients match vLLM's own words.
    stock = f" (LoRA rank {rank} is greater than max_lora_rank {limit}.)" if name == "lora" else ""
    return f"start the server with --max-{name}-rank {rank} or use an adapter of lower rank{stock}"
