"""Every metric can be printed."""

from runtime.bench.metrics_table import METRICS


def test_every_metric_has_a_title() -> None:
    assert all(metric.title and metric.decimals >= 0 for metric in METRICS.values())
