"""Time the de-identification stage beside plain Presidio, in alternating rounds of one run.

Plain Presidio is its BatchAnalyzerEngine with the same spaCy model, its own defaults and batches of 64: it finds, and replaces
nothing. The stage does all that it does to a file: it reads every field, finds, searches again, replaces and checks.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from scripts.common.schema import Deid

PLAIN, WITHOUT, WITH = "plain Presidio", "without Rampart", "with Rampart"
BATCH = 64

_read: Callable[[Sequence[str]], int]


def compare(texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return the median characters per second of each, and the stage's ratios to plain Presidio within each round.

    Each has a process of its own with one thread; they take turns, so a machine whose speed drifts slows all alike.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context, size = multiprocessing.get_context("spawn"), sum(map(len, texts))
    names = (PLAIN, WITHOUT, WITH)
    pools = {name: ProcessPoolExecutor(1, context, _load, (name,)) for name in names}
    try:
        for pool in pools.values():  # loads, and warms up
            pool.submit(_seconds, texts[:BATCH]).result()
        taken = [{name: pools[name].submit(_seconds, texts).result() for name in names} for _ in range(rounds)]
    finally:
        for pool in pools.values():
            pool.shutdown()
    return {
        "machine": machine(),
        "records": len(texts),
        "characters": size,
        "rounds": rounds,
        "characters_per_second": {
            name: round(statistics.median(size / turn[name] for turn in taken)) for name in names
        },
        "ratio": {
            name: round(statistics.median(turn[PLAIN] / turn[name] for turn in taken), 3) for name in (WITHOUT, WITH)
        },
        "ratios": {name: [round(turn[PLAIN] / turn[name], 3) for turn in taken] for name in (WITHOUT, WITH)},
    }


def machine() -> str:
    """Name the processor; each of the compared gets one core of it."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":", 1)[1].strip() for line in facts.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _load(name: str) -> None:
    global _read
    _read = _plain() if name == PLAIN else _stage(Deid(rampart="on" if name == WITH else "off"))


def _plain() -> Callable[[Sequence[str]], int]:
    import tldextract
    from presidio_analyzer import AnalyzerEngine, BatchAnalyzerEngine
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)  # no network
    engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": Deid().spacy_model}])
    engine.load()
    batches = BatchAnalyzerEngine(AnalyzerEngine(nlp_engine=engine))
    return lambda texts: len(batches.analyze_iterator(list(texts), "en", batch_size=BATCH))


def _stage(settings: Deid) -> Callable[[Sequence[str]], int]:
    from scripts.deid.recognizers import load_detector
    from scripts.deid.replacement import Replacer
    from scripts.deid.scrubbing import scrub_chunk
    from scripts.deid.workers import chunks

    detector, replacer = load_detector(settings), Replacer(settings, 0, None)
    detector.usual = "en"

    def read(texts: Sequence[str]) -> int:
        rows = ((f"texts:{number}", {"text": text}) for number, text in enumerate(texts, 1))
        return sum(len(scrub_chunk(chunk, detector, replacer)) for chunk in chunks(rows))

    return read


def _seconds(texts: Sequence[str]) -> float:
    started = time.perf_counter()
    read = _read(texts)
    seconds = time.perf_counter() - started
    assert read == len(texts)
    return seconds
