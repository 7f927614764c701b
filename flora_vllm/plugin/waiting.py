"""Why requests with adapters wait, for the report of an engine (loads.py)."""

from typing import Any

from flora_vllm.plugin import prefetch, turns

REASONS = ("slot", "loading", "memory")


def counts(scheduler: Any, slots: int) -> dict[str, int]:
    """Requests that wait for a slot, for their adapter to be loaded, or for room for it in host memory.

    Those that wait for what any request of vLLM's does (memory for their tokens, a place in the batch) are in none.
    """
    found: dict[str, int] = dict.fromkeys(REASONS, 0)
    loading = prefetch.loading_in(scheduler)
    running = prefetch.adapters_of(scheduler.running)
    for request in scheduler.waiting:
        if request.lora_request is None:
            continue
        adapter = request.lora_request.lora_int_id
        reason = None if loading is None else loading.why_waits(adapter)
        if reason is None and (turns.holds(scheduler, request) or (adapter not in running and len(running) >= slots)):
            reason = "slot"
        if reason is not None:
            found[reason] += 1
    return found
