"""What was counted, in the text form that Prometheus reads.

prometheus-client has the forms and writes them; the numbers are those of `mcp_proxy.metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import (
    Metric as Family,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from mcp_proxy.metrics import BOUNDS, METRICS, Key, Kind, Metric, MetricsPage

_LIMITS = (*map(str, BOUNDS), "+Inf")


class Exposition(NamedTuple):
    """A document for whoever scrapes, and its media type."""

    document: bytes
    media_type: str


class PageCollector(Collector):
    """The metrics of a page, as prometheus-client's registries collect them. Thread-safe."""

    def __init__(self, page: MetricsPage) -> None:
        self._page = page

    def collect(self) -> Iterator[Family]:
        """Every metric, those without series left out."""
        found: dict[Metric, dict[Key, list[float]]] = {}
        for key, numbers in self._page.read().items():
            found.setdefault(key.metric, {})[key] = numbers
        for metric in METRICS:
            if metric in found:
                yield _family(metric, found[metric])


def expose(page: MetricsPage, accept: str) -> Exposition:
    """All metrics of a page in the form that a scraper's Accept header prefers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PageCollector(page))
    encode, media_type = choose_encoder(accept)
    return Exposition(encode(registry), media_type)


def _family(metric: Metric, series: Mapping[Key, Sequence[float]]) -> Family:
    if metric.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(metric.name, metric.text, labels=metric.labels)
        for key, numbers in series.items():
            buckets = list(zip(_LIMITS, accumulate(numbers[:-1]), strict=True))
            histogram.add_metric(key.labels, buckets, numbers[-1])
        return histogram
    if metric.kind is Kind.COUNTER:
        counter = CounterMetricFamily(metric.name, metric.text, labels=metric.labels)
        for key, (number,) in series.items():
            counter.add_metric(key.labels, number)
        return counter
    gauge = GaugeMetricFamily(metric.name, metric.text, labels=("worker",))
    for key, (number,) in series.items():
        gauge.add_metric((str(key.slot),), number)
    return gauge
