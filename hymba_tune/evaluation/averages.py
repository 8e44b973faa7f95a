"""Plain means of metrics that were measured on different items."""

import math
from collections.abc import Sequence

from hymba_tune.evaluation.results import Metric


def mean_of_metrics(metrics: Sequence[Metric]) -> Metric:
    """Each weighs the same, whatever its n; the standard error is exact for independent items: |errors| / how many."""
    errors = [metric.stderr for metric in metrics if metric.stderr is not None]
    stderr = math.hypot(*errors) / len(metrics) if len(errors) == len(metrics) else None
    return Metric(sum(metric.value for metric in metrics) / len(metrics), sum(metric.n for metric in metrics), stderr)
