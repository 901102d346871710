"""`/metrics`: Prometheus metrics under `radixgen:` and, if requested, under vLLM's names."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from radixgen.core import FinishReason, RequestOutput, Stats

COMPAT = ("vllm",)
_OWN = "radixgen:"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKENS = tuple(float(2**exponent) for exponent in range(21))


@dataclass(slots=True)
class Histogram:
    """Histogram of observed values. Used by the event loop only."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus expects."""
        buckets, total = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class Metrics(Collector):
    """Metrics of the server's requests, and the engine's latest `Stats`."""

    def __init__(self, model: str, compat: str | None = None) -> None:
        """compat: an element of `COMPAT`, whose metric names are added."""
        self.first_token = Histogram(_LONG)
        self.inter_token = Histogram(_SHORT)
        self.end_to_end = Histogram(_LONG)
        self.queued = Histogram(_LONG)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.refused: dict[int, int] = {}
        """Number of error responses by status"""
        self.open_requests = 0
        self.stats: Stats | None = None
        self._model = model
        self._compat = compat
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._load = CollectorRegistry()
        self._load.register(_Load(self.collect_load))

    def expose(self, stats: Stats | None, *, everything: bool) -> bytes:
        """Metrics in Prometheus's text format.

        stats: those of the engine; None if there are none yet.
        everything: whether to include more than the load. Other metrics could reveal other callers' requests.
        """
        self.stats = stats
        return generate_latest(self._registry if everything else self._load)

    def collect_load(self) -> Iterator[Metric]:
        """Metrics that every caller may read."""
        yield GaugeMetricFamily(_OWN + "http_open_requests", "Requests being answered", self.open_requests)
        if self.stats is not None:
            yield from _load_of(self.stats, _OWN, {})
            if self._compat:
                yield from _load_of(self.stats, "vllm:", {"model_name": self._model})

    def collect(self) -> Iterator[Metric]:
        yield from self.collect_load()
        yield from self._of_requests(_OWN, {})
        if self.stats is not None:
            yield from _of_engine(self.stats)
        if self._compat:
            labels = {"model_name": self._model}
            yield from self._of_requests("vllm:", labels)
            if self.stats is not None:
                yield from _vllm(self.stats, labels)

    def _of_requests(self, prefix: str, labels: dict[str, str]) -> Iterator[Metric]:
        for name, says, histogram in (
            ("time_to_first_token_seconds", "Time to the first token", self.first_token),
            ("inter_token_latency_seconds", "Time between two tokens of one request", self.inter_token),
            ("e2e_request_latency_seconds", "Time to the end of a request", self.end_to_end),
            ("request_queue_time_seconds", "Time to the admission of a request", self.queued),
            ("request_prompt_tokens", "Prompt tokens per prompt", self.prompt_tokens),
            ("request_generation_tokens", "Output tokens per prompt, of all choices", self.generation_tokens),
        ):
            family = HistogramMetricFamily(prefix + name, says, labels=list(labels))
            family.add_metric(list(labels.values()), histogram.buckets(), sum_value=histogram.total)
            yield family
        finished = CounterMetricFamily(
            prefix + "request_success", "Finished sequences", labels=[*labels, "finished_reason"]
        )
        for reason, count in self.finished.items():
            finished.add_metric([*labels.values(), reason], count)
        yield finished
        if prefix == _OWN:
            errors = CounterMetricFamily(prefix + "http_errors", "Error responses by status", labels=["status"])
            for status, count in sorted(self.refused.items()):
                errors.add_metric([str(status)], count)
            yield errors


def _of_engine(stats: Stats) -> Iterator[Metric]:
    """Metrics of the engine. Counters start at zero with the engine."""
    for name, says, value in (
        ("waiting_tokens", "Prompt tokens of waiting requests", stats.num_waiting_tokens),
        ("kv_cache_usage_perc", "Fraction of slots that can't be evicted, from 0 to 1", _usage(stats)),
        ("kv_tokens", "Slots of the KV pool", stats.kv_tokens_total),
        ("kv_tokens_used", "Slots with computed KV", stats.kv_tokens_used),
        ("kv_tokens_cached", "Slots with computed KV that could be evicted", stats.kv_tokens_cached),
        ("kv_tokens_pinned", "Slots on the paths of pins", stats.kv_tokens_pinned),
        ("pins", "Pinned prefixes", stats.num_pins),
        ("tree_nodes", "Nodes of the radix tree", stats.num_nodes),
        ("shared_tokens", "Slots saved by sharing among running sequences", stats.shared_tokens),
    ):
        yield GaugeMetricFamily(_OWN + name, says, value)
    for name, says, count in (
        ("steps", "Steps", stats.steps),
        ("prompt_tokens", "Prompt tokens of admitted requests", stats.prompt_tokens),
        ("cached_prompt_tokens", "Cached prompt tokens of admitted requests", stats.cached_prompt_tokens),
        ("computed_prompt_tokens", "Rows computed for prompts", stats.computed_prompt_tokens),
        ("generation_tokens", "Output tokens", stats.generated_tokens),
        ("computed_rows", "Rows computed by the model", stats.computed_rows),
        ("wasted_rows", "Rows computed ahead but not used", stats.wasted_rows),
        ("saved_prompt_rows", "Prompt tokens not computed because they were shared or cached", stats.rows_saved),
        ("kv_bytes_read", "KV bytes read by attention", stats.kv_bytes_read),
        ("kv_bytes_unshared", "KV bytes that attention would have read without sharing", stats.kv_bytes_unshared),
        ("kv_bytes_saved", "KV bytes not read because of sharing", stats.kv_bytes_saved),
        ("evicted_tokens", "Evicted tokens", stats.evicted_tokens),
        ("num_preemptions", "Preempted sequences", stats.preemptions),
        ("failed_captures", "CUDA graphs that could not be captured", stats.failed_captures),
    ):
        yield CounterMetricFamily(_OWN + name, says, count)
    ends = CounterMetricFamily(_OWN + "sharing_ended", "Prompts not shared to their end, by reason", labels=["reason"])
    for reason, count in stats.sharing_ended.items():
        ends.add_metric([reason], count)
    yield ends


def _vllm(stats: Stats, labels: dict[str, str]) -> Iterator[Metric]:
    """Metrics that vLLM's dashboards use."""
    names, values = list(labels), list(labels.values())
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "As vLLM's", labels=names)
    usage.add_metric(values, _usage(stats))
    yield usage
    for name, count in (
        ("prompt_tokens", stats.prompt_tokens),
        ("generation_tokens", stats.generated_tokens),
        ("prefix_cache_queries", stats.prompt_tokens),
        ("prefix_cache_hits", stats.cached_prompt_tokens),
        ("num_preemptions", stats.preemptions),
    ):
        counter = CounterMetricFamily("vllm:" + name, "As vLLM's", labels=names)
        counter.add_metric(values, count)
        yield counter


class _Load(Collector):
    """Collector of the metrics that every caller may read."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


def _load_of(stats: Stats, prefix: str, labels: dict[str, str]) -> Iterator[Metric]:
    for name, says, value in (
        ("num_requests_running", "Running sequences", stats.num_running),
        ("num_requests_waiting", "Waiting sequences", stats.num_waiting),
    ):
        gauge = GaugeMetricFamily(prefix + name, says, labels=list(labels))
        gauge.add_metric(list(labels.values()), value)
        yield gauge


def _usage(stats: Stats) -> float:
    return (stats.kv_tokens_used - stats.kv_tokens_cached) / max(stats.kv_tokens_total, 1)


class Meter:
    """Measures the latencies of one prompt's outputs, from `begin` in monotonic time."""

    def __init__(self, metrics: Metrics, begin: float) -> None:
        self.begin = begin
        self.tokens = 0
        self._metrics = metrics
        self._last: float | None = None

    def see(self, output: RequestOutput, now: float) -> None:
        """Count an output that came at `now`. Several tokens in one output count as evenly spaced."""
        count = sum(len(delta.token_ids) for delta in output.outputs)
        metrics = self._metrics
        if count and self._last is None:
            metrics.first_token.observe(now - self.begin)
            self._last = now
        elif count and self._last is not None:
            most = max(len(delta.token_ids) for delta in output.outputs)
            metrics.inter_token.observe((now - self._last) / most, most)
            self._last = now
        self.tokens += count
        for delta in output.outputs:
            if delta.finish_reason is not None:
                metrics.finished[delta.finish_reason] += 1
        if output.finished:
            metrics.queued.observe(output.queue_seconds)
            metrics.end_to_end.observe(now - self.begin)
            metrics.prompt_tokens.observe(output.num_prompt_tokens)
            metrics.generation_tokens.observe(self.tokens)
