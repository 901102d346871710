"""`/metrics`: the usual figures under `radixgen:`, what sharing saves, and on request vLLM's names for the same."""

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
    """Counts by upper bound. All of it is read and written by the event loop."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        found, count = [], 0
        for bound, own in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            count += own
            found.append((bound, float(count)))
        return found


class Metrics(Collector):
    """What the server saw of its requests, and the engine's own `Stats` as of the last time they were had."""

    def __init__(self, model: str, compat: str | None = None) -> None:
        """compat: of `COMPAT`, whose names are added."""
        self.first_token = Histogram(_LONG)
        self.inter_token = Histogram(_SHORT)
        self.end_to_end = Histogram(_LONG)
        self.queued = Histogram(_LONG)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.refused: dict[int, int] = {}
        """Responses by status, from 400 up"""
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
        """The text that Prometheus reads.

        stats: the engine's; None where there are none yet.
        everything: else the load alone, as counts of cached tokens and latencies would tell one caller what others ask.
        """
        self.stats = stats
        return generate_latest(self._registry if everything else self._load)

    def collect_load(self) -> Iterator[Metric]:
        """The load, which callers may read."""
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
            ("time_to_first_token_seconds", "From a request to its first token", self.first_token),
            ("inter_token_latency_seconds", "Between two tokens of one request", self.inter_token),
            ("e2e_request_latency_seconds", "From a request to its end", self.end_to_end),
            ("request_queue_time_seconds", "From a request to its admission", self.queued),
            ("request_prompt_tokens", "Tokens of a prompt", self.prompt_tokens),
            ("request_generation_tokens", "Tokens of all choices of a prompt", self.generation_tokens),
        ):
            family = HistogramMetricFamily(prefix + name, says, labels=list(labels))
            family.add_metric(list(labels.values()), histogram.buckets(), sum_value=histogram.total)
            yield family
        ended = CounterMetricFamily(
            prefix + "request_success", "Sequences that ended", labels=[*labels, "finished_reason"]
        )
        for reason, count in self.finished.items():
            ended.add_metric([*labels.values(), reason], count)
        yield ended
        if prefix == _OWN:
            refused = CounterMetricFamily(prefix + "http_errors", "Responses by status", labels=["status"])
            for status, count in sorted(self.refused.items()):
                refused.add_metric([str(status)], count)
            yield refused


def _of_engine(stats: Stats) -> Iterator[Metric]:
    """The engine's own figures. Counters begin with the engine."""
    for name, says, value in (
        ("waiting_tokens", "Prompt tokens of the requests that wait", stats.num_waiting_tokens),
        ("kv_cache_usage_perc", "Slots that can't be evicted, of all, from 0 to 1", _usage(stats)),
        ("kv_tokens", "Slots of the KV pool", stats.kv_tokens_total),
        ("kv_tokens_used", "Slots that hold computed KV", stats.kv_tokens_used),
        ("kv_tokens_cached", "Of those, slots that could be evicted", stats.kv_tokens_cached),
        ("kv_tokens_pinned", "Slots on the paths of pins", stats.kv_tokens_pinned),
        ("pins", "Pinned prefixes", stats.num_pins),
        ("tree_nodes", "Nodes of the radix tree", stats.num_nodes),
        ("shared_tokens", "Tokens that all who run hold, less those that are stored for them", stats.shared_tokens),
    ):
        yield GaugeMetricFamily(_OWN + name, says, value)
    for name, says, count in (
        ("steps", "Steps", stats.steps),
        ("prompt_tokens", "Prompt tokens of admitted requests", stats.prompt_tokens),
        ("cached_prompt_tokens", "Of those, tokens that were cached", stats.cached_prompt_tokens),
        ("computed_prompt_tokens", "Rows computed for prompts", stats.computed_prompt_tokens),
        ("generation_tokens", "Tokens generated", stats.generated_tokens),
        ("computed_rows", "Rows that went through the model", stats.computed_rows),
        ("wasted_rows", "Rows computed ahead that nobody needed", stats.wasted_rows),
        ("saved_prompt_rows", "Prompt tokens that were not computed, as they were shared or cached", stats.rows_saved),
        ("kv_bytes_read", "KV bytes that attention read", stats.kv_bytes_read),
        ("kv_bytes_unshared", "KV bytes that it would have read of unshared paths", stats.kv_bytes_unshared),
        ("kv_bytes_saved", "The difference of the two", stats.kv_bytes_saved),
        ("evicted_tokens", "Tokens evicted", stats.evicted_tokens),
        ("num_preemptions", "Sequences put back into the queue", stats.preemptions),
        ("failed_captures", "CUDA graphs that could not be captured", stats.failed_captures),
    ):
        yield CounterMetricFamily(_OWN + name, says, count)
    ends = CounterMetricFamily(_OWN + "sharing_ended", "Prompts not shared to their end, by reason", labels=["reason"])
    for reason, count in stats.sharing_ended.items():
        ends.add_metric([reason], count)
    yield ends


def _vllm(stats: Stats, labels: dict[str, str]) -> Iterator[Metric]:
    """What vLLM's dashboards ask for."""
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
    """The metrics that callers may read."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


def _load_of(stats: Stats, prefix: str, labels: dict[str, str]) -> Iterator[Metric]:
    for name, says, value in (
        ("num_requests_running", "Sequences that run", stats.num_running),
        ("num_requests_waiting", "Sequences that wait", stats.num_waiting),
    ):
        gauge = GaugeMetricFamily(prefix + name, says, labels=list(labels))
        gauge.add_metric(list(labels.values()), value)
        yield gauge


def _usage(stats: Stats) -> float:
    return (stats.kv_tokens_used - stats.kv_tokens_cached) / max(stats.kv_tokens_total, 1)


class Meter:
    """Times one prompt's outputs, from `begin`, on the monotonic clock."""

    def __init__(self, metrics: Metrics, begin: float) -> None:
        self.begin = begin
        self.tokens = 0
        self._metrics = metrics
        self._last: float | None = None

    def see(self, output: RequestOutput, now: float) -> None:
        """What came at `now`. Several tokens that came at once came evenly since the last."""
        count = sum(len(one.token_ids) for one in output.outputs)
        metrics = self._metrics
        if count and self._last is None:
            metrics.first_token.observe(now - self.begin)
            self._last = now
        elif count and self._last is not None:
            most = max(len(one.token_ids) for one in output.outputs)
            metrics.inter_token.observe((now - self._last) / most, most)
            self._last = now
        self.tokens += count
        for one in output.outputs:
            if one.finish_reason is not None:
                metrics.finished[one.finish_reason] += 1
        if output.finished:
            metrics.queued.observe(output.queue_seconds)
            metrics.end_to_end.observe(now - self.begin)
            metrics.prompt_tokens.observe(output.num_prompt_tokens)
            metrics.generation_tokens.observe(self.tokens)
