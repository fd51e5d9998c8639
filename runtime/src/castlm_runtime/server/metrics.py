"""What a server has done and is doing, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from castlm_runtime.engine import Answer, Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counts the responses, answers, tokens and seconds of one engine. Safe among threads."""

    def __init__(self, engine: Engine):
        self._registry = to = CollectorRegistry()
        self._responses = Counter("castlm_http_responses", "HTTP responses", ["status"], registry=to)
        self._answers = Counter(
            "castlm_answers", "Texts that were asked for, by how they ended", ["reason"], registry=to
        )
        self._read = Counter("castlm_prompt_tokens", "Tokens of prompts", registry=to)
        self._new = Counter("castlm_generated_tokens", "Tokens of answers", registry=to)
        help_first, help_whole = "From a request to its first text", "From a request to the end of its text"
        self._first = Histogram("castlm_first_text_seconds", help_first, registry=to, buckets=_SECONDS)
        self._whole = Histogram("castlm_answer_seconds", help_whole, registry=to, buckets=_SECONDS)
        cache = {"kind": engine.batch.cache.kind, "tokens": str(engine.num_cache_tokens)}
        Info("castlm_cache", "The cache of keys and values", registry=to).info(cache)
        gauges = {
            "castlm_requests_waiting": ("Texts that wait for their turn", lambda: engine.num_waiting),
            "castlm_requests_running": ("Texts that are being read or decoded", lambda: engine.num_running),
            "castlm_cache_used_share": ("Share of the cache that running texts use", lambda: engine.cache_used),
            "castlm_cache_hit_tokens": (
                "Tokens of prompts that were in the cache",
                lambda: engine.batch.blocks.num_hits,
            ),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=to).set_function(value)

    def responded(self, status: int) -> None:
        """An HTTP response begins."""
        self._responses.labels(status=str(status)).inc()

    def heard_first(self, seconds: float) -> None:
        """The first text of an answer comes."""
        self._first.observe(seconds)

    def ended(self, answer: Answer, seconds: float) -> None:
        """An answer has ended."""
        self._answers.labels(reason=answer.reason).inc()
        self._read.inc(answer.num_prompt)
        self._new.inc(len(answer.tokens))
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
