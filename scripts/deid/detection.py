"""Find personal data in texts: Presidio with a local spaCy model, our own recognizers, and Rampart where installed.

Nothing here reaches for a network, and every doubt is an exception: what cannot be read must not count as clean.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.common.schema import Deid
from scripts.deid.rampart import Rampart
from scripts.deid.secret_values import find_secrets, is_placeholder
from scripts.deid.spans import Span, normalise, to_original

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine

NER_ENTITIES = frozenset({"PERSON", "LOCATION", "ORGANIZATION", "NRP", "DATE_TIME"})
# No recognizer of these finds anything in a text without a digit, so such a text is spared them.
DIGIT_ENTITIES = frozenset({
    "AGE", "CREDIT_CARD", "DEVICE_ID", "IBAN_CODE", "ID_NUMBER", "IP_ADDRESS", "MEDICAL_LICENSE", "PHONE_NUMBER",
    "STREET_ADDRESS", "UK_NHS", "US_ITIN", "US_MBI", "US_NPI", "US_PASSPORT", "US_SSN", "VEHICLE_ID", "ZIP_CODE",
})  # fmt: skip
# Words that the language model takes for organisations and people, and that never are.
NO_NAMES = frozenset(
    """API ATM CSV DOB FAQ HTML HTTP ID IBAN IP JSON MRN PDF PIN SQL SSN URL VAT VIN XML ZIP C Java JavaScript Python
    Dear Hello Hi Regards Sir Madam""".split()  # noqa: SIM905 - a list of words reads better so
)
_DATE_LIKE = re.compile(
    r"\d\s?[/.]\s?\d|\d-\d{1,2}-\d|(?i:\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b)"
    r"|(?i:\b(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\.?\s+\d|\d(?:st|nd|rd|th)?\s+(?:of\s+)?"
    r"(?:jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec))"
)
_HEADING = re.compile(r":\s")
_WINDOW, _OVERLAP = 20_000, 400


@dataclass
class Detector:
    """All recognizers of one configuration, loaded once per process."""

    settings: Deid
    entities: tuple[str, ...]
    thresholds: dict[str, float]
    analyzer: AnalyzerEngine
    rampart: Rampart | None
    user_entities: frozenset[str] = frozenset()

    def detect(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the raw findings of each text, in its own offsets; they may overlap.

        Raises: RecognizerError when a recognizer skipped anything.
        """
        found: list[list[Span]] = [[] for _ in texts]
        cleaned = [normalise(text) for text in texts]
        windows = [
            (number, start, text[start:end])
            for number, (text, _) in enumerate(cleaned)
            for start, end in _windows(text)
        ]
        allowed = {word.casefold() for word in self.settings.allow_list}
        for (number, start, window), spans in zip(windows, self._analyse([w for _, _, w in windows]), strict=True):
            offsets = cleaned[number][1]
            for span in spans:
                if window[span.start : span.end].casefold() not in allowed:
                    moved = span._replace(start=span.start + start, end=span.end + start)
                    found[number].append(to_original(moved, offsets))
        return found

    def _analyse(self, texts: Sequence[str]) -> Iterator[list[Span]]:
        rampart = self.rampart.detect(texts) if self.rampart else [[] for _ in texts]
        engine = self.analyzer.nlp_engine
        wordy = [name for name in self.entities if name not in DIGIT_ENTITIES - self.user_entities]
        with _timeouts_raise(), engine.nlp[self.settings.language].memory_zone():
            batches = engine.process_batch(texts, language=self.settings.language, batch_size=256)
            for (text, artifacts), more in zip(batches, rampart, strict=True):
                entities = [*self.entities] if re.search(r"\d", text) else wordy
                results = self.analyzer.analyze(
                    text, self.settings.language, entities=entities, nlp_artifacts=artifacts
                )
                spans = [Span(r.start, r.end, r.entity_type, r.score) for r in results] + more + find_secrets(text)
                yield [span for span in spans if self._counts(text, span)]

    def _counts(self, text: str, span: Span) -> bool:
        if span.entity not in self.entities:
            return False
        if span.score < self.thresholds.get(span.entity, self.thresholds["default"]):
            return False
        if span.entity == "SECRET" and is_placeholder(text[span.start : span.end]):
            return False
        if span.entity in NER_ENTITIES and text[span.start : span.end].strip(" ()[]:.,") in NO_NAMES:
            return False
        if span.entity == "ORGANIZATION" and _HEADING.match(text, span.end) and text[: span.start][-1:] in ("", "\n"):
            return False
        # spaCy calls "45 minutes", "2023" and "next week" dates; only strict treats those as personal.
        if span.entity == "DATE_TIME" and self.settings.profile != "strict":
            return bool(_DATE_LIKE.search(text[span.start : span.end]))
        return True


class RecognizerError(RuntimeError):
    """A recognizer gave up on a text, so the text cannot count as searched."""


class _TimeoutHandler(logging.Handler):
    """Presidio logs a warning and skips the pattern when a regular expression takes too long; remember that it did."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.hit = False

    def emit(self, record: logging.LogRecord) -> None:
        # Failing closed hangs on these words of Presidio's: if it used others, a text that was only searched in part would
        # count as clean. A test with a slow pattern notices (tests/deid/test_deid_presidio.py).
        self.hit = self.hit or "timed out" in record.getMessage()


@contextmanager
def _timeouts_raise() -> Iterator[None]:
    log, handler = logging.getLogger("presidio-analyzer"), _TimeoutHandler()
    propagate, log.propagate = log.propagate, False  # its records may quote the text
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
    if handler.hit:
        raise RecognizerError("a pattern timed out")


def _windows(text: str) -> Iterator[tuple[int, int]]:
    """Cut an over-long text into overlapping windows at white space, since memory grows with the length."""
    start = 0
    while len(text) - start > _WINDOW:
        end = start + _WINDOW
        cut = max(text.rfind("\n", start + _WINDOW // 2, end), text.rfind(" ", start + _WINDOW // 2, end))
        end = cut if cut > 0 else end
        yield start, end
        start = max(text.rfind(" ", start, end - _OVERLAP), end - 2 * _OVERLAP)
    yield start, len(text)
