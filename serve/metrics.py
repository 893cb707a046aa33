"""What the server counts, in the words and units of vLLM's metrics so that dashboards carry over."""

from __future__ import annotations

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from serve.errors import ServingError
from serve.jobs import Job

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Why a request was refused, in few words that never grow in number; what is not here is `invalid`.
REASONS = {
    "queue_full": "queue_full", "queue_timeout": "queue_timeout", "draining": "draining",
    "invalid_api_key": "unauthorized", "not_local": "unauthorized",
    "context_length_exceeded": "too_long", "body_too_large": "too_long", "headers_too_large": "too_long",
}  # fmt: skip


class Metrics:
    """The counters of one server. Labels take few fixed values; no text, key or address of a client is among them."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.requests = Counter("serve_http_requests", "HTTP requests.", ["route", "status"], registry=r)
        self.rejected = Counter("serve_requests_rejected", "Requests refused before the engine.", ["code"], registry=r)
        self.disconnects = Counter(
            "serve_client_disconnects", "Requests whose client went away before its answer.", registry=r
        )
        self.log_errors = Counter("serve_log_errors", "Log lines or votes that could not be written.", registry=r)
        self.lag = Histogram(
            "serve_event_loop_lag_seconds", "Delay of the event loop's own timer.", buckets=TOKEN_SECONDS, registry=r
        )
        self.ready = Gauge("serve_ready", "1 while a new request would be taken.", registry=r)
        self.draining = Gauge("serve_draining", "1 while the server ends.", registry=r)
        self.engine_up = Gauge("serve_engine_up", "1 while the engine's thread is alive.", registry=r)
        self.restarts = Counter(
            "serve_engine_restarts",
            "Always 0: with its engine the whole process ends, to be started again.",
            registry=r,
        )
        self.build = Info("serve_build", "Versions of what serves.", registry=r)
        self.int8_agreement = Gauge(
            "serve_int8_agreement",
            "With serve.weights: int8, the part of a few answers' tokens that stay the likeliest; otherwise 0.",
            registry=r,
        )
        self.int8_kl = Gauge(
            "serve_int8_kl_nats",
            "With serve.weights: int8, the KL per token to the full weights, at start.",
            registry=r,
        )
        self.lora = Gauge(
            "serve_lora_info", "1 for each adapter that is served.", ["model", "rank", "parent", "sha256"], registry=r
        )
        self.running = Gauge("serve_num_requests_running", "Requests in the batch.", registry=r)
        self.rows = Gauge("serve_batch_rows", "Rows of the last decoding step.", registry=r)
        self.waiting = Gauge("serve_num_requests_waiting", "Requests that wait for a slot.", registry=r)
        self.cached = Gauge("serve_kv_cache_usage_perc", "Used part of the key-value cache, 0 to 1.", registry=r)
        self.prefix_queries = Counter(
            "serve_prefix_cache_queries", "Prompt tokens that were looked for among what was read before.", registry=r
        )
        self.prefix_hits = Counter("serve_prefix_cache_hits", "Prompt tokens that did not have to be read.", registry=r)
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
        self.prefill = Histogram(
            "serve_request_prefill_time_seconds", "From a slot to the first token.", buckets=SECONDS, registry=r
        )
        self.decode = Histogram(
            "serve_request_decode_time_seconds", "From the first token to the last.", buckets=SECONDS, registry=r
        )
        self.between = Histogram(
            "serve_inter_token_latency_seconds", "Between two tokens of a request.", buckets=TOKEN_SECONDS, registry=r
        )
        self.whole = Histogram(
            "serve_e2e_request_latency_seconds", "From arrival to the last token.", buckets=SECONDS, registry=r
        )
        self.prompt_lengths = Histogram(
            "serve_request_prompt_tokens", "Prompt tokens of a request.", buckets=TOKENS, registry=r
        )
        self.answer_lengths = Histogram(
            "serve_request_generation_tokens", "Tokens generated for a request.", buckets=TOKENS, registry=r
        )
        self.limits = Histogram(
            "serve_request_params_max_tokens", "The most tokens a request may get.", buckets=TOKENS, registry=r
        )

    def refused(self, error: ServingError) -> None:
        """Note a refusal; that a client has gone is none."""
        if error.status != 499:
            self.rejected.labels(REASONS.get(error.code, "too_long" if "too_large" in error.code else "invalid")).inc()

    def step(self, seconds: float, *, rows: int, running: int, waiting: int, cached: float) -> None:
        """Note one step of the engine and what it left behind."""
        self.steps.observe(seconds)
        self.rows.set(rows)
        self.running.set(running)
        self.waiting.set(waiting)
        self.cached.set(cached)

    def prefix(self, tokens: int, known: int) -> None:
        """Note how much of a prompt was known already."""
        self.prefix_queries.inc(tokens)
        self.prefix_hits.inc(known)

    def inter_token(self, seconds: float) -> None:
        """Note the pause between two tokens of one request."""
        self.between.observe(seconds)

    def ended(self, job: Job, error: ServingError | None) -> None:
        """Note the end of a job."""
        if not error:
            self.success.labels(job.finish_reason).inc()
        elif error.code == "queue_timeout":  # it never ran
            self.refused(error)
        else:
            self.errors.labels(error.code).inc()
        self.generated.labels(job.model).inc(len(job.out))
        if job.scheduled:
            self.prompt_tokens.labels(job.model).inc(len(job.ids))
            self.queued.observe(job.scheduled - job.arrival)
            self.prompt_lengths.observe(len(job.ids))
            self.answer_lengths.observe(len(job.out))
            self.limits.observe(job.max_new_tokens)
        if job.first_token:
            self.first.observe(job.first_token - job.arrival)
            self.prefill.observe(job.first_token - job.scheduled)
            self.decode.observe(job.last_token - job.first_token)
            self.whole.observe(job.last_token - job.arrival)

    def forget(self, model: str) -> None:
        """Drop the series of a model that is served no more, so that names that come and go do not pile up."""
        for counter in (self.prompt_tokens, self.generated):
            with suppress(KeyError):
                counter.remove(model)

    def text(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
