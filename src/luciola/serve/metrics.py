"""What /metrics tells Prometheus: vLLM's names behind the prefix `luciola:`, so that its dashboards port by search and
replace."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from luciola.engine.engine import Engine
from luciola.engine.sequence import Completion

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84)
STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = tuple(float(2**i) for i in range(18))


class Metrics:
    """Counts and times of requests, and the engine's own counts at the moment of asking."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCounts(engine, name))
        self._name = name
        self._finished = self._counter("request_success", "completions that have ended", "finished_reason")
        self._failed = self._counter("request_failure", "requests that were answered with an error", "code")
        self._reasoning = self._counter("reasoning_tokens", "generated tokens that were thinking").labels(name)
        self._first = self._histogram("time_to_first_token_seconds", "from the request to its first token", SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "between two tokens of a completion", STEPS)
        self._whole = self._histogram("e2e_request_latency_seconds", "from the request to its end", SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "from its first token to its end", SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "from being ready to being begun", SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "from being begun to its first token", SECONDS)
        self._inference = self._histogram("request_inference_time_seconds", "from being begun to its end", SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "tokens of a prompt", TOKENS)
        self._generated = self._histogram("request_generation_tokens", "tokens of a completion", TOKENS)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def failed(self, status: int) -> None:
        """A request was answered with this error."""
        self._failed.labels(self._name, str(status)).inc()

    def left(self, count: int) -> None:
        """So many completions were given up: nobody waits for them any more, or their time is over."""
        self._finished.labels(self._name, "abort").inc(count)

    def watch(self, prompt_tokens: int) -> Watch:
        """A request for completions of one prompt begins."""
        self._prompt.observe(prompt_tokens)
        return Watch(self)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"luciola:{name}", what, ("model_name", *labels), registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        whole = Histogram(f"luciola:{name}", what, ("model_name",), registry=self._registry, buckets=buckets)
        return whole.labels(self._name)


class Watch:
    """The times of one prompt's completions."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}  # of each completion, when its last tokens came
        self._first: dict[int, float] = {}

    def tokens(self, index: int, count: int, completion: Completion | None) -> None:
        """Completion `index` got so many tokens, and has ended if it is given."""
        metrics, now = self._metrics, time.perf_counter()
        if count and index not in self._first:
            self._first[index] = now
            metrics._first.observe(now - self._began)
            self._gaps(0.0, count - 1)
        elif count:
            self._gaps((now - self._last[index]) / count, count)
        self._last[index] = now
        if completion is not None:
            first, begun = self._first.get(index, now), completion.begun
            metrics._whole.observe(now - self._began)
            metrics._decode.observe(now - first)
            if begun:
                metrics._queue.observe(begun - completion.arrived)
                metrics._prefill.observe(first - begun)
                metrics._inference.observe(now - begun)
            metrics._generated.observe(len(completion.token_ids))
            metrics._reasoning.inc(completion.thinking_tokens)
            metrics._finished.labels(metrics._name, completion.finish_reason).inc()

    def _gaps(self, seconds: float, count: int) -> None:
        """Tokens that came together, as drafts do, share the time since those before."""
        for _ in range(count):
            self._metrics._between.observe(seconds)


class _EngineCounts:
    """The engine's counts, read when Prometheus asks."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name

    def collect(self) -> Iterator[Metric]:
        engine, stats = self._engine, self._engine.stats
        blocks = engine.blocks_used + engine.blocks_free
        gauges = {
            "num_requests_running": ("completions that are being written", stats["running"]),
            "num_requests_waiting": ("completions that wait for their turn", stats["waiting"]),
            "kv_cache_usage_perc": ("share of the cache that is in use; 1 is all of it", engine.blocks_used / blocks),
            "latent_cache_bytes_per_token": ("bytes that a token takes in the cache", engine.cache_bytes_per_token),
        }
        counters = {
            "prompt_tokens": ("tokens of prompts that were read", stats["prompt_tokens"] + stats["cached_tokens"]),
            "generation_tokens": ("tokens that were generated", stats["generated_tokens"]),
            "prefix_cache_queries": ("tokens looked for", stats["prompt_tokens"] + stats["cached_tokens"]),
            "prefix_cache_hits": ("tokens that the cache had", stats["cached_tokens"]),
            "num_preemptions": ("completions that had to make room and begin again", stats["preemptions"]),
            "spec_decode_num_drafts": ("guesses of tokens ahead", stats["drafts"]),
            "spec_decode_num_draft_tokens": ("tokens guessed ahead", stats["drafted"]),
            "spec_decode_num_accepted_tokens": ("guessed tokens that were right", stats["accepted"]),
            "iterations": ("steps of the engine", stats["steps"]),
        }
        for key, (what, value) in gauges.items():
            gauge = GaugeMetricFamily(f"luciola:{key}", what, labels=("model_name",))
            gauge.add_metric((self._name,), value)
            yield gauge
        for key, (what, value) in counters.items():
            counter = CounterMetricFamily(f"luciola:{key}", what, labels=("model_name",))
            counter.add_metric((self._name,), value)
            yield counter
        steps = HistogramMetricFamily("luciola:iteration_tokens_total", "tokens of a step", labels=("model_name",))
        bounds = [2**i - 1 for i in range(len(TOKENS))]
        steps.add_metric((self._name,), _cumulative(bounds, engine.step_sizes), stats["read_tokens"])
        yield steps
        what = "tokens by the expert that they were given to, whose number is the bound of its bucket"
        load = HistogramMetricFamily("luciola:expert_load", what, labels=("model_name", "layer"))
        for layer, counts in engine.expert_load.items():
            numbers = sum(expert * count for expert, count in enumerate(counts))
            load.add_metric((self._name, str(layer)), _cumulative(range(len(counts)), counts), numbers)
        yield load
        info = InfoMetricFamily("luciola:cache_config", "the cache", labels=("model_name",))
        tokens = str(engine.max_cached_tokens)
        info.add_metric((self._name,), {"num_gpu_blocks": str(blocks), "cached_tokens": tokens})
        yield info


def _cumulative(bounds: Iterable[int], counts: Sequence[int]) -> list[tuple[str, float]]:
    """A histogram's buckets, each with all that are smaller; what lies beyond the bounds comes last."""
    sums = list(accumulate(counts))
    return [*((str(float(bound)), float(sums[i])) for i, bound in enumerate(bounds)), ("+Inf", float(sums[-1]))]
