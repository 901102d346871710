"""`/metrics`: Prometheus metrics under `radixgen:` and, if requested, under vLLM's names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from radixgen.core import FinishReason, RequestOutput, Stats

COMPAT = ("vllm",)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_TOKENS = tuple(float(2**exponent) for exponent in range(21))


class Metrics:
    """Metrics of the server's requests. They have no prefix until they are exposed."""

    def __init__(self, model: str, compat: str | None = None) -> None:
        """compat: an element of `COMPAT`, whose metric names are added."""
        self._model = model
        self._compat = compat
        self._process = ProcessCollector(registry=None)
        self._requests = CollectorRegistry()
        histogram = partial(Histogram, registry=self._requests)
        seconds, tokens = partial(histogram, buckets=_LONG), partial(histogram, buckets=_TOKENS)
        self.first_token = seconds("time_to_first_token_seconds", "Time to the first token")
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Time between two tokens of one request", buckets=_SHORT
        )
        self.end_to_end = seconds("e2e_request_latency_seconds", "Time to the end of a request")
        self.queued = seconds("request_queue_time_seconds", "Time to the admission of a request")
        self.prompt_tokens = tokens("request_prompt_tokens", "Prompt tokens per prompt")
        self.generation_tokens = tokens("request_generation_tokens", "Output tokens per prompt, of all choices")
        self.finished = Counter("request_success", "Finished sequences", ["finished_reason"], registry=self._requests)
        for reason in get_args(FinishReason):
            self.finished.labels(reason)
        self.errors = Counter("http_errors", "Error responses by status", ["status"], registry=None)
        self.open_requests = Gauge("http_open_requests", "Requests being answered", registry=None)

    def expose(self, stats: Stats | None, *, everything: bool) -> bytes:
        """Metrics in Prometheus's text format.

        stats: those of the engine; None if there are none yet.
        everything: whether to include more than the load. Other metrics could reveal other callers' requests.
        """
        return generate_latest(_Scrape(self._families(stats, everything)))

    def _families(self, stats: Stats | None, everything: bool) -> Iterator[Metric]:
        shared: list[Metric] = []
        own = [*self.open_requests.collect()]
        vllm: list[Metric] = []
        if stats is not None:
            shared += _load(stats)
        if everything:
            yield from self._process.collect()
            shared += self._requests.collect()
            own += self.errors.collect()
        if everything and stats is not None:
            own += _of_engine(stats)
            vllm += _vllm(stats)
        yield from _named("radixgen:", {}, own + shared)
        if self._compat:
            yield from _named("vllm:", {"model_name": self._model}, shared + vllm)


@dataclass(frozen=True)
class _Scrape(Collector):
    """Metrics as `generate_latest` takes them."""

    families: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def _named(prefix: str, labels: dict[str, str], families: Iterable[Metric]) -> Iterator[Metric]:
    """Copies of metrics with a prefix and more labels, without the times at which they were created."""
    for family in families:
        named = Metric(prefix + family.name, family.documentation, family.type)
        for sample in family.samples:
            if sample.name != f"{family.name}_created":
                named.add_sample(prefix + sample.name, labels | sample.labels, sample.value)
        yield named


def _load(stats: Stats) -> Iterator[Metric]:
    """Metrics of the engine that every caller may read."""
    yield GaugeMetricFamily("num_requests_running", "Running sequences", stats.num_running)
    yield GaugeMetricFamily("num_requests_waiting", "Waiting sequences", stats.num_waiting)


def _of_engine(stats: Stats) -> Iterator[Metric]:
    """Metrics of the engine. Counters start at zero with the engine."""
    for name, says, value in (
        ("waiting_tokens", "Prompt tokens of waiting requests", stats.num_waiting_tokens),
        ("kv_cache_usage_perc", "Fraction of slots that can't be evicted, from 0 to 1", _usage(stats)),
        ("kv_tokens", "Slots of the KV pool", stats.kv_tokens_total),
        ("kv_tokens_used", "Slots with computed KV", stats.kv_tokens_used),
        ("kv_tokens_cached", "Slots with computed KV that could be evicted", stats.kv_tokens_cached),
        ("kv_tokens_pinned", "Slots on the paths of pins", stats.kv_tokens_pinned),
        ("kv_bytes_used", "Bytes of computed KV in the pool", stats.kv_tokens_used * stats.kv_bytes_per_token),
        ("host_kv_tokens", "Slots of KV in host memory", stats.kv_tokens_host_total),
        ("host_kv_tokens_used", "Slots in host memory with KV", stats.kv_tokens_host_used),
        ("host_kv_bytes_used", "Bytes of KV in host memory", stats.kv_tokens_host_used * stats.kv_bytes_per_token),
        ("disk_kv_bytes_max", "Maximum bytes of KV on disk", stats.kv_bytes_disk_total),
        ("disk_kv_bytes", "Bytes of KV on disk", stats.kv_bytes_disk_used),
        ("disk_kv_tokens", "Tokens with KV on disk", stats.kv_tokens_disk),
        ("pins", "Pinned prefixes", stats.num_pins),
        ("tree_nodes", "Nodes of the radix tree", stats.num_nodes),
        ("shared_tokens", "Slots saved by sharing among running sequences", stats.shared_tokens),
    ):
        yield GaugeMetricFamily(name, says, value)
    for name, says, count in (
        ("steps", "Steps", stats.steps),
        ("prompt_tokens", "Prompt tokens of admitted requests", stats.prompt_tokens),
        ("cached_prompt_tokens", "Cached prompt tokens of admitted requests", stats.cached_prompt_tokens),
        ("computed_prompt_tokens", "Rows computed for prompts", stats.computed_prompt_tokens),
        ("moved_prompt_tokens", "Prompt tokens copied from runs that are no prefix", stats.moved_prompt_tokens),
        ("generation_tokens", "Output tokens", stats.generated_tokens),
        ("computed_rows", "Rows computed by the model", stats.computed_rows),
        ("wasted_rows", "Rows computed ahead but not used", stats.wasted_rows),
        ("saved_prompt_rows", "Prompt tokens not computed because they were shared or cached", stats.rows_saved),
        ("kv_bytes_read", "KV bytes read by attention", stats.kv_bytes_read),
        ("kv_bytes_unshared", "KV bytes that attention would have read without sharing", stats.kv_bytes_unshared),
        ("kv_bytes_saved", "KV bytes not read because of sharing", stats.kv_bytes_saved),
        ("evicted_tokens", "Evicted tokens", stats.evicted_tokens),
        ("host_saved_tokens", "Tokens copied to host memory", stats.host_saved_tokens),
        ("host_fetched_tokens", "Tokens fetched from host memory", stats.host_fetched_tokens),
        ("host_recomputed_tokens", "Tokens in host memory that were computed again", stats.host_recomputed_tokens),
        ("host_evicted_tokens", "Tokens evicted from host memory", stats.host_evicted_tokens),
        ("host_fetch_seconds", "Duration of fetches from host memory", stats.host_fetch_seconds),
        (
            "host_hidden_seconds",
            "Fetches and reads while something else ran",
            stats.host_hidden_seconds,
        ),
        ("host_waited_seconds", "Time in which nothing could run but fetches", stats.host_waited_seconds),
        ("disk_written_tokens", "Tokens written to disk", stats.disk_written_tokens),
        ("disk_read_tokens", "Tokens read from disk", stats.disk_read_tokens),
        ("disk_evicted_tokens", "Tokens evicted from disk", stats.disk_evicted_tokens),
        ("disk_skipped_tokens", "Tokens that the disk was too slow for or refused", stats.disk_skipped_tokens),
        ("disk_failed_files", "KV files that were damaged or unreadable", stats.disk_failed_files),
        ("disk_read_seconds", "Duration of reads from disk", stats.disk_read_seconds),
        ("num_preemptions", "Preempted sequences", stats.preemptions),
        ("cache_hints_accepted", "Cache hints accepted", stats.hints_accepted),
        ("cache_hints_clipped", "Cache hints clipped to a bound", stats.hints_clipped),
        ("cache_hints_refused", "Cache hints refused", stats.hints_refused),
        ("failed_captures", "CUDA graphs that could not be captured", stats.failed_captures),
    ):
        yield CounterMetricFamily(name, says, count)
    ends = CounterMetricFamily("sharing_ended", "Prompts not shared to their end, by reason", labels=["reason"])
    for reason, count in stats.sharing_ended.items():
        ends.add_metric([reason], count)
    yield ends


def _vllm(stats: Stats) -> Iterator[Metric]:
    """Metrics that vLLM's dashboards use."""
    yield GaugeMetricFamily("kv_cache_usage_perc", "As vLLM's", _usage(stats))
    for name, count in (
        ("prompt_tokens", stats.prompt_tokens),
        ("generation_tokens", stats.generated_tokens),
        ("prefix_cache_queries", stats.prompt_tokens),
        ("prefix_cache_hits", stats.cached_prompt_tokens),
        ("num_preemptions", stats.preemptions),
    ):
        yield CounterMetricFamily(name, "As vLLM's", count)


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
            for _ in range(most):
                metrics.inter_token.observe((now - self._last) / most)
            self._last = now
        self.tokens += count
        for delta in output.outputs:
            if delta.finish_reason is not None:
                metrics.finished.labels(delta.finish_reason).inc()
        if output.finished:
            metrics.queued.observe(output.queue_seconds)
            metrics.end_to_end.observe(now - self.begin)
            metrics.prompt_tokens.observe(output.num_prompt_tokens)
            metrics.generation_tokens.observe(self.tokens)
