"""What the server counts, in the words and units of vLLM's metrics so that dashboards carry over."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.errors import ServingError
from serve.jobs import Job

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Metrics:
    """The counters of one server. Labels take few fixed values; no text, key or address of a client is among them."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter("serve_http_requests", "HTTP requests.", ["route", "status"], registry=r)
        self.rejected = Counter("serve_requests_rejected", "Requests refused before the engine.", ["code"], registry=r)
        self.log_errors = Counter("serve_log_errors", "Log lines or votes that could not be written.", registry=r)
        self.lag = Histogram(
            "serve_event_loop_lag_seconds", "Delay of the event loop's own timer.", buckets=TOKEN_SECONDS, registry=r
        )
        self.running = Gauge("serve_num_requests_running", "Requests in the batch.", registry=r)
        self.waiting = Gauge("serve_num_requests_waiting", "Requests that wait for a slot.", registry=r)
        self.cached = Gauge("serve_kv_cache_usage_perc", "Used part of the key-value cache, 0 to 1.", registry=r)
        self.prompt_tokens = Counter("serve_prompt_tokens", "Prompt tokens read.", ["model"], registry=r)
        self.generated = Counter("serve_generation_tokens", "Tokens generated.", ["model"], registry=r)
        self.success = Counter("serve_request_success", "Requests that ended well.", ["finish_reason"], registry=r)
        self.errors = Counter("serve_request_errors", "Requests that the engine gave up.", ["code"], registry=r)
        self.steps = Histogram("serve_engine_step_seconds", "One engine step.", buckets=TOKEN_SECONDS, registry=r)
        self.first = Histogram(
            "serve_time_to_first_token_seconds", "From arrival to the first token.", buckets=SECONDS, registry=r
        )
        self.queued = Histogram(
            "serve_request_queue_time_seconds", "From arrival to a slot.", buckets=SECONDS, registry=r
        )
        self.between = Histogram(
            "serve_inter_token_latency_seconds", "Between two tokens of a request.", buckets=TOKEN_SECONDS, registry=r
        )
        self.whole = Histogram(
            "serve_e2e_request_latency_seconds", "From arrival to the last token.", buckets=SECONDS, registry=r
        )

    def step(self, seconds: float, *, running: int, waiting: int, cached: float) -> None:
        """Note one step of the engine and what it left behind."""
        self.steps.observe(seconds)
        self.running.set(running)
        self.waiting.set(waiting)
        self.cached.set(cached)

    def inter_token(self, seconds: float) -> None:
        """Note the pause between two tokens of one request."""
        self.between.observe(seconds)

    def ended(self, job: Job, error: ServingError | None) -> None:
        """Note the end of a job."""
        if error:
            self.errors.labels(error.code).inc()
        else:
            self.success.labels(job.finish_reason).inc()
        self.prompt_tokens.labels(job.model).inc(len(job.ids) - job.scored if job.scheduled else 0)
        self.generated.labels(job.model).inc(len(job.out))
        if job.scheduled:
            self.queued.observe(job.scheduled - job.arrival)
        if job.first_token:
            self.first.observe(job.first_token - job.arrival)
            self.whole.observe(job.last_token - job.arrival)

    def text(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
