"""Number of replicas from requests and from adapters together; Serve adds bounds, factors and delays."""

import math
from typing import Any

SIGNAL = "flora_replicas_wanted"


def replicas_needed(requests: float, target_requests: float, adapters_want: float) -> int:
    """Enough for the requests (running and queued), and enough slots for the adapters in use or guaranteed."""
    return max(math.ceil(requests / target_requests), math.ceil(adapters_want))


def autoscaling_policy(context: Any) -> tuple[int, dict[str, Any]]:
    """Policy function for Serve's AutoscalingConfig; `context` is its AutoscalingContext."""
    # Serve's bounds still apply; with no replica nobody reports, and Serve itself starts the first.
    reported = (context.aggregated_metrics or {}).get(SIGNAL, {})
    wanted = max(reported.values(), default=0.0)
    target = context.config.get_target_ongoing_requests()
    return replicas_needed(context.total_num_requests, target, wanted), {}
