"""Counts for Prometheus: the state of the engines, what they have done, and how requests ended.

Decides names, meanings and buckets. It reads EngineStats and RequestRecord. The `vllm:` names are aliases with vLLM's
meanings, for the dashboards, routers and autoscalers that know them. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import attrgetter, lt
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from splitfuse.core.replicas.capacity import replicas_needed
from splitfuse.core.request_output import FinishReason
from splitfuse.core.slo.attainable import Attainable
from splitfuse.engine.client import EngineClient, EngineState
from splitfuse.engine.messages import EngineStats
from splitfuse.errors import EngineUnavailableError
from splitfuse.recording.recorder import Recorder
from splitfuse.server.access_log import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of what `Metrics.render` returns."""

RENDER_SECONDS = 0.1
"""Time from one rendering to the next, in seconds."""
COUNT_SECONDS, COUNTING_SHARE = 10.0, 1 / 20
"""Seconds from one count of the replicas that are needed to the next, and the fraction of the time that they may take.
"""

# vLLM's bounds are among these, so that a query for one of its `le` finds it.
_GAPS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_STEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

_BOUNDS: dict[str, tuple[float, ...]] = {
    "step_seconds": _STEP,
    "predicted_step": _STEP,
    "prediction_ratio": (0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.11, 1.25, 1.5, 2.0, 4.0),
    "step_budget": (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0),
    "step_tokens": tuple(float(2**power) for power in range(15)),
    "ttft": (*_FIRST, 80.0, 160.0, 640.0, 2560.0),
    "itl": (0.001, 0.0025, 0.005, *_GAPS),
    "mean_itl": (0.001, 0.0025, 0.005, *_GAPS),
    "queue": (0.001, 0.005, 0.01, 0.05, 0.1, *_WHOLE, 960.0, 1920.0, 7680.0),
    "total": (0.01, 0.05, 0.1, 0.2, *_WHOLE, 960.0, 1920.0, 7680.0),
    "request_prompt": tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5)),
    "request_generated": tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5)),
}


@dataclass(frozen=True)
class Family:
    """Describes one metric: its name, and which number it shows. Labelled by model_name and `labels`."""

    name: str
    """Name, which is rendered with `_total` if it is a counter's."""
    kind: Literal["gauge", "counter", "histogram"]
    source: str
    help: str
    labels: tuple[str, ...] = ()


FAMILIES = (
    Family(
        *("splitfuse:ready", "gauge", "ready"),
        "1 while an engine is ready (at the start, /ready also waits for the others), else 0.",
    ),
    Family(
        *("splitfuse:engine_ready", "gauge", "engine_ready"),
        "1 while an engine is ready, else 0, by its number, its role, and the address of one on another machine.",
        ("engine", "address", "role"),
    ),
    Family("splitfuse:drained_engines", "gauge", "drained", "Engines that take no requests (splitfuse drain)."),
    Family("splitfuse:num_requests_running", "gauge", "running", "Requests that steps compute."),
    Family("splitfuse:num_requests_waiting", "gauge", "waiting", "Requests that wait to be scheduled."),
    Family("splitfuse:outstanding_tokens", "gauge", "outstanding", "Most tokens still to compute for open requests."),
    Family("splitfuse:kv_blocks", "gauge", "blocks", "KV blocks of all engines."),
    Family("splitfuse:kv_blocks_used", "gauge", "used_blocks", "KV blocks held by requests."),
    Family("splitfuse:kv_cache_usage_ratio", "gauge", "kv_usage", "Fraction of KV blocks held by requests, 0 to 1."),
    Family("splitfuse:token_budget", "gauge", "token_budget", "Token budget of a step; the largest of all engines."),
    Family(
        *("splitfuse:slo_lone_prompt_ratio", "gauge", "ttft_share"),
        "Time of a lone prompt of 512 tokens / its TTFT target, by the cost model, as all gauges of slo_.",
    ),
    Family(
        *("splitfuse:slo_lone_decode_ratio", "gauge", "gap_share"),
        "Time between tokens of a lone decode / its ITL or TPOT target.",
    ),
    Family("splitfuse:slo_longest_prompt_tokens", "gauge", "longest_prompt", "Longest prompt in time if it is alone."),
    Family("splitfuse:slo_max_decodes", "gauge", "max_decodes", "Decodes that keep their ITL and TPOT at once."),
    Family(
        *("splitfuse:slo_max_requests_per_second", "gauge", "requests_per_second"),
        "Upper bound of the requests/s of 512 + 64 tokens in time.",
    ),
    Family("splitfuse:slo_estimated", "gauge", "estimated", "1 while these are from an estimate, else 0."),
    Family(
        *("splitfuse:replicas_needed", "gauge", "replicas_needed"),
        "Fewest engines with which 99 % of the requests of each of the last five minutes were in time.",
    ),
    Family("splitfuse:steps", "counter", "num_steps", "Forward steps."),
    Family("splitfuse:computed_tokens", "counter", "num_computed_tokens", "Tokens that steps computed."),
    Family("splitfuse:prompt_tokens", "counter", "num_prompt_tokens", "Prompt tokens of requests with a first token."),
    Family("splitfuse:cached_tokens", "counter", "num_cached_tokens", "Prompt tokens found in the prefix cache."),
    Family("splitfuse:generated_tokens", "counter", "num_generated_tokens", "Generated tokens."),
    Family(
        *("splitfuse:num_speculative_tokens", "gauge", "num_speculative_tokens"),
        "Most tokens drafted for a request in a step; 0 for models with a recurrent state, which cannot be taken back.",
    ),
    Family("splitfuse:draft_tokens", "counter", "num_draft_tokens", "Drafted tokens that steps computed."),
    Family("splitfuse:accepted_tokens", "counter", "num_accepted_tokens", "Drafted tokens that were right."),
    Family("splitfuse:form_draft_tokens", "counter", "num_form_drafts", "Drafted tokens that a grammar forced."),
    Family("splitfuse:form_accepted_tokens", "counter", "num_form_accepted", "Those of them that were right."),
    Family("splitfuse:model_draft_tokens", "counter", "num_model_drafts", "Tokens that the draft model drafted."),
    Family("splitfuse:model_accepted_tokens", "counter", "num_model_accepted", "Those of them that were right."),
    Family("splitfuse:draft_model_seconds", "counter", "draft_model_seconds", "Seconds of the draft model's steps."),
    Family("splitfuse:kv_lent_blocks", "gauge", "num_lent_blocks", "KV blocks held for requests of other engines."),
    Family("splitfuse:kv_tier_blocks", "gauge", "num_tier_blocks", "KV blocks in the memory and the disk tier."),
    Family("splitfuse:kv_tier_saved_blocks", "counter", "num_saved_blocks", "KV blocks written to the tiers."),
    Family("splitfuse:kv_tier_fetched_blocks", "counter", "num_fetched_blocks", "KV blocks found in the tiers."),
    Family(
        *("splitfuse:kv_tier_peer_blocks", "counter", "num_peer_blocks"),
        "KV blocks that came from engines on other machines.",
    ),
    Family("splitfuse:kv_tier_moved_bytes", "counter", "num_moved_bytes", "Bytes of both."),
    Family(
        *("splitfuse:kv_tier_unsaved_blocks", "counter", "num_unsaved_blocks"),
        "KV blocks that were not written, since a tier was full or behind.",
    ),
    Family(
        *("splitfuse:kv_tier_dropped_blocks", "counter", "num_dropped_blocks"),
        "KV blocks in tiers that were not used: their checksum was not theirs, or they were of another model.",
    ),
    Family("splitfuse:preemptions", "counter", "num_preemptions", "Preempted requests: their KV blocks were taken."),
    Family("splitfuse:requests", "counter", "requests", "Answers, by route and HTTP status.", ("route", "status")),
    Family(
        *("splitfuse:resumed_requests", "counter", "resumed"),
        "Choices that went on at another engine, or at theirs after a restart, by the cause.",
        ("cause",),
    ),
    Family("splitfuse:choices", "counter", "choices", "Finished choices, by finish reason.", ("finish_reason",)),
    Family("splitfuse:slo", "counter", "slo", "Requests with an SLO, by whether it was met.", ("met",)),
    Family("splitfuse:errors", "counter", "errors", "Requests that ended with an error, by its kind.", ("kind",)),
    Family("splitfuse:refused", "counter", "refused", "Requests refused before any work, by the reason.", ("kind",)),
    Family(
        "splitfuse:text_process_restarts", "counter", "text_restarts", "Processes for texts ended at a limit or killed."
    ),
    Family("splitfuse:connections", "gauge", "connections", "Open connections, by the front.", ("front",)),
    Family("splitfuse:front_restarts", "counter", "front_restarts", "Fronts that were started again (--fronts)."),
    Family("splitfuse:recording", "gauge", "recording", "1 while a recording is written (--record), else 0."),
    Family("splitfuse:recorded_bytes", "counter", "recorded_bytes", "Bytes of the recording that were written."),
    Family(
        *("splitfuse:recording_dropped_events", "counter", "unrecorded"),
        "Events that are missing in the recording, since it could not be written.",
    ),
    Family("splitfuse:consoles", "gauge", "consoles", "Open consoles (--console)."),
    Family(
        *("splitfuse:console_dropped_frames", "counter", "dropped_frames"),
        "Frames that consoles did not read in time, and did not get.",
    ),
    Family("splitfuse:otel_dropped_spans", "counter", "dropped_spans", "Spans that no OpenTelemetry collector took."),
    Family("splitfuse:step_budget_ratio", "histogram", "step_budget", "Tokens of a step / its token budget."),
    Family("splitfuse:step_tokens", "histogram", "step_tokens", "Tokens of a step."),
    Family("splitfuse:step_seconds", "histogram", "step_seconds", "Duration of a step."),
    Family("splitfuse:predicted_step_seconds", "histogram", "predicted_step", "Predicted duration of a step."),
    Family("splitfuse:step_prediction_ratio", "histogram", "prediction_ratio", "Predicted / measured step duration."),
    Family("splitfuse:queue_seconds", "histogram", "queue", "From a request's arrival to its first step."),
    Family(
        "splitfuse:time_to_first_token_seconds", "histogram", "ttft", "From a request's arrival to its first token."
    ),
    Family("splitfuse:inter_token_latency_seconds", "histogram", "itl", "From a token to the next one of its choice."),
    Family("splitfuse:request_seconds", "histogram", "total", "From a request's arrival to its end."),
    Family("splitfuse:request_prompt_tokens", "histogram", "request_prompt", "Prompt tokens of a request."),
    Family("splitfuse:request_generated_tokens", "histogram", "request_generated", "Generated tokens of a request."),
    Family("vllm:num_requests_running", "gauge", "running", "As splitfuse:num_requests_running."),
    Family("vllm:num_requests_waiting", "gauge", "waiting", "As splitfuse:num_requests_waiting."),
    Family("vllm:kv_cache_usage_perc", "gauge", "kv_usage", "As splitfuse:kv_cache_usage_ratio: 0 to 1."),
    Family("vllm:prefix_cache_queries", "counter", "num_prompt_tokens", "As splitfuse:prompt_tokens."),
    Family("vllm:prefix_cache_hits", "counter", "num_cached_tokens", "As splitfuse:cached_tokens."),
    Family("vllm:prompt_tokens", "counter", "num_prompt_tokens", "As splitfuse:prompt_tokens."),
    Family("vllm:generation_tokens", "counter", "num_generated_tokens", "As splitfuse:generated_tokens."),
    Family("vllm:num_preemptions", "counter", "num_preemptions", "As splitfuse:preemptions."),
    Family("vllm:spec_decode_num_draft_tokens", "counter", "num_draft_tokens", "As splitfuse:draft_tokens."),
    Family("vllm:spec_decode_num_accepted_tokens", "counter", "num_accepted_tokens", "As splitfuse:accepted_tokens."),
    Family("vllm:request_success", "counter", "choices", "As splitfuse:choices.", ("finished_reason",)),
    Family("vllm:iteration_tokens_total", "histogram", "step_tokens", "As splitfuse:step_tokens."),
    Family("vllm:request_queue_time_seconds", "histogram", "queue", "As splitfuse:queue_seconds."),
    Family("vllm:time_to_first_token_seconds", "histogram", "ttft", "As splitfuse:time_to_first_token_seconds."),
    Family("vllm:inter_token_latency_seconds", "histogram", "itl", "As splitfuse:inter_token_latency_seconds."),
    Family("vllm:time_per_output_token_seconds", "histogram", "itl", "Older name of vllm:inter_token_latency_seconds."),
    Family(
        "vllm:request_time_per_output_token_seconds", "histogram", "mean_itl", "Mean inter-token latency of a request."
    ),
    Family("vllm:e2e_request_latency_seconds", "histogram", "total", "As splitfuse:request_seconds."),
    Family("vllm:request_prompt_tokens", "histogram", "request_prompt", "As splitfuse:request_prompt_tokens."),
    Family(
        "vllm:request_generation_tokens", "histogram", "request_generated", "As splitfuse:request_generated_tokens."
    ),
)
"""Metrics of a server, ours first."""

_COUNTERS = tuple(
    {
        family.source: None
        for family in FAMILIES
        if family.kind == "counter" and family.source in EngineStats.__struct_fields__
    }
)
"""Counters of EngineStats that a family shows."""
_read_counters: Callable[[EngineStats], tuple[float, ...]] = attrgetter(*_COUNTERS)


class Metrics(Collector):
    """Counts steps and requests, and reads the engine client when it renders. `model_name` is the label; left out, the
    engine's name of the model, once it is ready.
    """

    def __init__(self, client: EngineClient, *, model_name: str | None = None) -> None:
        self._client = client
        self._model_name = model_name
        self._totals = _Totals()
        self._histograms = {source: _Histogram(bounds) for source, bounds in _BOUNDS.items()}
        self._counts: defaultdict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
        self._counts["choices"] = Counter({(each.value,): 0 for each in FinishReason if each is not FinishReason.MOVED})
        self._counts["slo"] = Counter({("true",): 0, ("false",): 0})
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._rendering: asyncio.Task[bytes] | None = None
        self._rendered_at = -math.inf
        self.replicas_needed: int | None = None
        """Engines that the recent arrivals need, as last counted; None: not counted."""
        self._count_replicas_at = -math.inf
        self.num_text_restarts: Callable[[], int] = lambda: 0
        """Function that returns how many processes for texts were ended."""
        self.connections: Callable[[], Sequence[int]] = lambda: ()
        """Function that returns the number of open connections of each front."""
        self.num_front_restarts: Callable[[], int] = lambda: 0
        """Function that returns how many times a front was started again."""
        self.num_dropped_spans: Callable[[], int] = lambda: 0
        """Function that returns how many spans for OpenTelemetry were dropped."""
        self.recorder: Recorder | None = None
        """Recorder of the engines, if there is one."""
        self.consoles: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Function that returns the number of open consoles, and of frames that were dropped for them."""

    def step_ended(self, stats: EngineStats) -> None:
        """Count a step of an engine, whose counters `client.stats` has already."""
        self._totals.update(self._client.stats)
        self._observe("step_tokens", stats.step_tokens)
        if stats.step_token_budget:
            self._observe("step_budget", stats.step_tokens / stats.step_token_budget)
        self._observe("step_seconds", stats.step_seconds)
        if stats.predicted_step_seconds and stats.step_seconds:
            self._observe("predicted_step", stats.predicted_step_seconds)
            self._observe("prediction_ratio", stats.predicted_step_seconds / stats.step_seconds)

    def request_ended(self, record: RequestRecord) -> None:
        """Count a request that was answered, or has failed. Times and sizes count for those that an engine began."""
        self._count("requests", record.route, str(record.status))
        if record.error is not None:
            self._count("errors", record.error)
        for reason, count in record.finish_reasons.items():
            self._count("choices", reason, by=count)
        if record.slo_met is not None:
            self._count("slo", str(record.slo_met).lower())
        if not record.finish_reasons:
            return
        gaps = record.inter_token_latency_seconds
        self._observe("total", record.total_seconds)
        self._observe("request_prompt", record.prompt_tokens)
        self._observe("request_generated", record.generated_tokens)
        self._observe("queue", record.queue_seconds)
        self._observe("ttft", record.time_to_first_token_seconds)
        self._observe("mean_itl", sum(gaps) / len(gaps) if gaps else None)
        self._histograms["itl"].observe_all(gaps)

    def request_refused(self, kind: str) -> None:
        """Count a request that was refused before any work. `kind` is one of a few words, such as `overloaded`."""
        self._count("refused", kind)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format, read from the client now."""
        return generate_latest(self._registry)

    async def text(self) -> bytes:
        """Return what `render` returns. Calls that come soon after one share the next: connections can send them by the
        hundred, and each takes milliseconds of the event loop.
        """
        if self._rendering is None:
            self._rendering = asyncio.create_task(self._render_soon())
        return await asyncio.shield(self._rendering)

    async def _render_soon(self) -> bytes:
        await asyncio.sleep(self._rendered_at + RENDER_SECONDS - time.monotonic())
        try:
            if time.monotonic() >= self._count_replicas_at:
                await self._count_replicas()
            return self.render()
        finally:
            self._rendered_at, self._rendering = time.monotonic(), None

    async def _count_replicas(self) -> None:
        """Count how many replicas the recent arrivals need, in a thread, and at most for COUNTING_SHARE of the time."""
        began = time.monotonic()
        times = next((each.step_times for each in self._client.stats if each.step_times is not None), None)
        if times is not None:
            arrivals = [arrival for engine in self._client.engines for arrival in engine.arrivals]
            self.replicas_needed = await asyncio.to_thread(replicas_needed, arrivals, times, now=began)
        took = time.monotonic() - began
        self._count_replicas_at = began + max(COUNT_SECONDS, took / COUNTING_SHARE)

    def collect(self) -> Iterator[Metric]:
        """Yield every family with its samples."""
        self._totals.update(self._client.stats)
        model_name, single = self._label(), {**self._totals.sums(), **self._gauges()}
        single["text_restarts"] = self.num_text_restarts()
        single["dropped_spans"] = self.num_dropped_spans()
        single["front_restarts"] = self.num_front_restarts()
        self._counts["connections"] = Counter({(str(index),): count for index, count in enumerate(self.connections())})
        self._counts["engine_ready"] = Counter(
            {
                (str(number), engine.address, engine.role.value): int(engine.state is EngineState.READY)
                for number, engine in enumerate(self._client.engines)
                if engine.state is not EngineState.STOPPED
            }
        )
        self._counts["resumed"] = Counter({(cause,): count for cause, count in self._client.num_resumed.items()})
        recorder = self.recorder
        single["recording"] = float(recorder is not None and not recorder.ended)
        single["recorded_bytes"] = 0 if recorder is None else recorder.num_bytes
        single["unrecorded"] = 0 if recorder is None else recorder.num_dropped
        single["consoles"], single["dropped_frames"] = self.consoles()
        for family in FAMILIES:
            labels = ("model_name", *family.labels)
            if family.kind == "histogram":
                histogram = HistogramMetricFamily(family.name, family.help, labels=labels)
                counted = self._histograms[family.source]
                histogram.add_metric((model_name,), counted.cumulative(), counted.sum)
                yield histogram
            else:
                kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
                metric = kind(family.name, family.help, labels=labels)
                numbers = {(): single[family.source]} if family.source in single else self._counts[family.source]
                for values, number in numbers.items():
                    metric.add_metric((model_name, *values), number)
                yield metric

    def _count(self, source: str, *values: str, by: int = 1) -> None:
        self._counts[source][values] += by

    def _observe(self, source: str, value: float | None) -> None:
        if value is not None:
            self._histograms[source].observe(value)

    def _label(self) -> str:
        if self._model_name is None:
            try:
                self._model_name = self._client.info.model
            except EngineUnavailableError:  # it has not been ready yet
                return ""
        return self._model_name

    def _gauges(self) -> dict[str, float]:
        client, stats = self._client, self._client.stats
        try:
            outstanding, num_speculative = client.outstanding_tokens, client.info.num_speculative_tokens
        except EngineUnavailableError:  # it has not been ready yet
            outstanding = num_speculative = 0
        sizes = [_num_blocks(engine) for engine in client.engines]
        blocks = sum(sizes)
        # An engine that has made no step has not said how many of its blocks are free: all.
        used = sum(size - each.num_available_blocks for size, each in zip(sizes, stats, strict=True) if each.num_steps)
        # Engines on one machine share their tiers.
        tiers = Counter[str]()
        for engine, each in zip(client.engines, stats, strict=True):
            tiers[engine.address] = max(tiers[engine.address], each.num_tier_blocks)
        return {
            "ready": client.state is EngineState.READY,
            "drained": sum(engine.is_drained for engine in client.engines),
            "running": sum(engine.num_running for engine in stats),
            "waiting": sum(engine.num_waiting for engine in stats),
            "outstanding": outstanding,
            "blocks": blocks,
            "used_blocks": used,
            "kv_usage": used / blocks if blocks else 0.0,
            "token_budget": max((engine.token_budget for engine in stats), default=0),
            "num_speculative_tokens": num_speculative,
            "num_lent_blocks": sum(engine.num_lent_blocks for engine in stats),
            "num_tier_blocks": tiers.total(),
            **({} if self.replicas_needed is None else {"replicas_needed": self.replicas_needed}),
            **_slo_gauges([engine.attainable for engine in stats if engine.attainable is not None]),
        }


def _num_blocks(engine: EngineClient) -> int:
    """Return the number of an engine's KV blocks; 0 if it has not been ready yet."""
    try:
        return engine.info.limits.num_blocks
    except EngineUnavailableError:
        return 0


def _slo_gauges(engines: Sequence[Attainable]) -> dict[str, float]:
    """Return what the engines can keep of the SLO, all together; nothing without one."""
    if not engines:
        return {}
    alone = max(engines, key=lambda engine: engine.ttft_share or engine.gap_share or 0.0)  # the slowest
    gauges = {
        "ttft_share": alone.ttft_share,
        "gap_share": alone.gap_share,
        "longest_prompt": alone.longest_prompt,
        "max_decodes": sum(engine.max_decodes for engine in engines),
        "requests_per_second": sum(engine.requests_per_second for engine in engines),
        "estimated": any(engine.estimated for engine in engines),
    }
    return {name: value for name, value in gauges.items() if value is not None}


class _Totals:
    """Sums the counters of several engines so that they never go down: a restarted engine adds to what it had.

    An engine is identified by its position in the list.
    """

    def __init__(self) -> None:
        self._engines: list[EngineStats] = []  # as last seen
        self._before: list[float] = [0] * len(_COUNTERS)  # of those that began again, or are gone

    def update(self, engines: Sequence[EngineStats]) -> None:
        """Take in the newest counters."""
        for old, new in zip_longest(self._engines, engines, fillvalue=EngineStats()):
            if new is not old and any(map(lt, _read_counters(new), _read_counters(old))):
                self._before = _sums([self._before, _read_counters(old)])
        self._engines = list(engines)

    def sums(self) -> dict[str, float]:
        """Return the sums by the names of the counters."""
        return dict(zip(_COUNTERS, _sums([self._before, *map(_read_counters, self._engines)]), strict=True))


def _sums(rows: Sequence[Sequence[float]]) -> list[float]:
    return list(map(sum, zip(*rows, strict=True)))


class _Histogram:
    """Counts more cheaply than the library's histogram, which locks and walks the buckets at each observation."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.sum = 0.0
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Observe values in rising order, many at the cost of a few."""
        start = 0
        for index, bound in enumerate((*self._bounds, math.inf)):
            end = bisect_right(values, bound, start)
            self._counts[index] += end - start
            start = end
        self.sum += sum(values)

    def cumulative(self) -> list[tuple[str, float]]:
        """Return pairs of an upper bound and the observations up to it; the last bound is infinite."""
        total, pairs = 0, []
        for bound, count in zip((*map(repr, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            pairs.append((bound, float(total)))
        return pairs
