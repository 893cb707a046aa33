"""Find personal data in texts: Presidio with a local spaCy model, our own recognizers, and Rampart where installed.

Nothing here reaches for a network, and every doubt is an exception: what cannot be read must not count as clean.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scripts.common.schema import Deid
from scripts.deid import hipaa
from scripts.deid.countries import find_country_numbers
from scripts.deid.doubts import Doubts, impersonal, named_by_context
from scripts.deid.labels import find_cells
from scripts.deid.languages import months_of
from scripts.deid.name_edges import extend_names, names_in_row, trim_names
from scripts.deid.names import find_names, titled
from scripts.deid.rampart import Rampart, is_spent
from scripts.deid.secret_values import find_secrets, is_placeholder
from scripts.deid.spans import Span, cut, normalise, to_original
from scripts.deid.words import words

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine

NER_ENTITIES = frozenset({"PERSON", "LOCATION", "ORGANIZATION", "NRP", "DATE_TIME"})
# No recognizer of these finds anything in a text without a digit, so such a text is spared them.
DIGIT_ENTITIES = frozenset({
    "AGE", "CREDIT_CARD", "DEVICE_ID", "IBAN_CODE", "ID_NUMBER", "IP_ADDRESS", "MEDICAL_LICENSE", "PHONE_NUMBER",
    "STREET_ADDRESS", "UK_NHS", "US_ITIN", "US_MBI", "US_NPI", "US_PASSPORT", "US_SSN", "VEHICLE_ID", "ZIP_CODE",
})  # fmt: skip
# Known by their format; a model of names would read them piece by piece, ten tokens and more each.
SURE_ENTITIES = frozenset({"SECRET", "CREDIT_CARD", "IBAN_CODE", "CRYPTO", "UUID", "VEHICLE_ID"})
_DATE_LIKE = re.compile(
    r"\d\s?/\s?\d|\d-\d{1,2}-\d|\d\.\s?\d{1,2}\.\s?\d|(?i:\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b)"
    r"|(?i:\b(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\.?\s+\d|\d(?:st|nd|rd|th)?[\s/-]+(?:of\s+)?"
    r"(?:jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec))|\bMay \d{1,2}\b"
)
_PART_OF_DATE = re.compile(
    r"(?i)\d[\d:./T+-]*(?:st|nd|rd|th|s|[ap]m|Z)?\b|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b"
    r"|\b(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)(?:uary|ruary|ch|il|ust|ember|ober)?\b"
)
_NEXT_SENTENCE = re.compile(r"(?<=\d [A-Z][a-z][a-z])\.\s(?=\d{1,3}\b)|(?<=\d [A-Z][a-z]{3})\.\s(?=\d{1,3}\b)")
# Every key with a format of its own holds one of these, so that most texts are spared some fifty patterns.
_KEY_LIKE = re.compile(r"[\w+/=.-]{14}|://|-----BEGIN |;\s?(?:[Pp]wd|[Pp]assword)=|Private-Lines")
_YEAR = re.compile(r"(?:18|19|20)\d\d")
_HEADING = re.compile(r":\s")
_WINDOW, _OVERLAP = 20_000, 400


@dataclass
class Detector:
    """All recognizers of one configuration, loaded once per process."""

    settings: Deid
    language: str
    entities: tuple[str, ...]
    thresholds: dict[str, float]
    analyzer: AnalyzerEngine
    rampart: Rampart | None
    user_entities: frozenset[str] = frozenset()
    others: dict[str, Detector] = field(default_factory=dict)  # by language
    usual: str = ""  # language of most records of the file, for those too short to tell

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
        engine = self.analyzer.nlp_engine
        by_name = "PERSON" in self.entities
        any_date = self.settings.profile in ("strict", hipaa.PROFILE)
        stamps = any_date or "DATE_TIME" in self.settings.operators  # one operator for all dates keeps their order
        unknown = [number for number, text in enumerate(texts) if not is_spent(text)]
        with _doubts_raise(), engine.nlp[self.language].memory_zone():
            artifacts = self._artifacts([titled(text) for text in texts] if by_name else texts, frozenset(unknown))
            first = [self._by_pattern(text, known) for text, known in zip(texts, artifacts, strict=True)]
            learnt: list[list[Span]] = [[] for _ in texts]
            if self.rampart:
                sure = [[span for span in first[n] if self._is_sure(texts[n], span)] for n in unknown]
                read = self.rampart.detect([texts[n] for n in unknown], sure, self.language)
                for number, found in zip(unknown, read, strict=True):
                    learnt[number] = found
            for text, spans, more in zip(texts, first, learnt, strict=True):
                spans = spans + more
                if by_name:
                    spans += find_names(text, self.language)
                spans += find_cells(text, self.entities)
                spans += find_country_numbers(text, self.settings.countries)
                doubts = Doubts(text, self.language, any_date=any_date, stamps=stamps)
                spans = trim_names(text, cut(text, spans), self.language)
                spans = trim_dates(text, spans) if self.language == "en" else spans
                spans = [named_by_context(text, span) for span in spans]
                believed = [span for span in spans if self._counts(text, span) and not doubts.reject(span)]
                believed = extend_names(text, believed, self.language)
                if row := names_in_row(text, believed, self.language):
                    believed = extend_names(text, [*believed, *row], self.language)
                yield impersonal(text, believed) if self.settings.profile == "default" else believed

    def _by_pattern(self, text: str, artifacts: Any) -> list[Span]:
        """Return what Presidio, spaCy and the rules for secrets find."""
        entities = [*self.entities]
        if not re.search(r"\d", text):
            entities = [name for name in entities if name not in DIGIT_ENTITIES - self.user_entities]
        if "SECRET" in entities and "SECRET" not in self.user_entities and not _KEY_LIKE.search(text):
            entities = [name for name in entities if name != "SECRET"]
        results = self.analyzer.analyze(text, self.language, entities=entities, nlp_artifacts=artifacts)
        return [Span(r.start, r.end, r.entity_type, r.score) for r in results] + find_secrets(text)

    def _is_sure(self, text: str, span: Span) -> bool:
        """Say whether a finding begins where it seems to and will count, so that no model of names need read it."""
        before = text[max(0, span.start - 1) : span.start]
        return span.entity in SURE_ENTITIES and not re.match(r"[\w'’.+%&-]", before) and self._counts(text, span)

    def _artifacts(self, texts: Sequence[str], unknown: frozenset[int]) -> list[Any]:
        """Return spaCy's reading of each text; what is spent is only cut into words."""
        engine, language = self.analyzer.nlp_engine, self.language
        models = [name for name in engine.nlp[language].pipe_names if name in ("tok2vec", "ner", "transformer")]
        read: list[Any] = [None] * len(texts)
        for numbers, disabled in (
            ([n for n in range(len(texts)) if n in unknown], []),
            ([n for n in range(len(texts)) if n not in unknown], models),
        ):
            with engine.nlp[language].select_pipes(disable=disabled):
                batches = engine.process_batch([texts[n] for n in numbers], language=language, batch_size=256)
                for number, (_, artifacts) in zip(numbers, batches, strict=True):
                    read[number] = artifacts
        return read

    def _counts(self, text: str, span: Span) -> bool:
        if span.entity not in self.entities:
            return False
        if span.score < self.thresholds.get(span.entity, self.thresholds["default"]):
            return False
        if span.entity == "SECRET" and is_placeholder(text[span.start : span.end]):
            return False
        if span.entity in NER_ENTITIES and text[span.start : span.end].strip(" ()[]:.,\"'").casefold() in words(
            "labels"
        ):
            return False
        if span.entity == "ORGANIZATION" and _HEADING.match(text, span.end) and text[: span.start][-1:] in ("", "\n"):
            return False
        # spaCy calls "45 minutes", "2023" and "next week" dates; only strict treats those as personal.
        if span.entity == "DATE_TIME" and self.settings.profile != "strict":
            surface = text[span.start : span.end]
            if self.settings.profile == hipaa.PROFILE and _YEAR.fullmatch(surface):
                return hipaa.is_of_birth(text, span)
            return bool(_DATE_LIKE.search(surface) or months_of(self.language).search(surface))
        return True


def trim_dates(text: str, spans: Sequence[Span]) -> list[Span]:
    """Take off the ends of dates what belongs to the sentence: `Minutes 4 May`, `6 Oct. 12 students`."""
    trimmed = []
    for span in spans:
        parts = [*_PART_OF_DATE.finditer(text, span.start, span.end)] if span.entity == "DATE_TIME" else []
        if parts:
            end = _NEXT_SENTENCE.search(text, parts[0].end(), parts[-1].end())
            span = span._replace(start=parts[0].start(), end=end.start() if end else parts[-1].end())
        trimmed.append(span)
    return trimmed


class RecognizerError(RuntimeError):
    """A recognizer gave up on a text, so the text cannot count as searched."""


class WatchedPattern:
    """A compiled pattern that refuses to be skipped: Presidio logs a pattern that runs out of time and continues without it."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def finditer(self, text: str, timeout: float | None = None) -> Iterator[Any]:
        """Yield the matches. Raises: RecognizerError when the time is over."""
        try:
            yield from self.compiled.finditer(text, timeout=timeout)
        except TimeoutError:
            raise RecognizerError("a pattern ran out of time") from None


class _Doubts(logging.Handler):
    """Count what Presidio warns of while it searches: each warning is a text that it may not have searched whole."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


@contextmanager
def _doubts_raise() -> Iterator[None]:
    log, handler = logging.getLogger("presidio-analyzer"), _Doubts()
    propagate, log.propagate = log.propagate, False  # its records may quote the text
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
    if handler.count:
        raise RecognizerError("a recognizer warned")


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
