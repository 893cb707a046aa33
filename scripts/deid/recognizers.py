"""Load every recognizer of a configuration, from this machine only, and prove that each one answers."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scripts.common.artifacts import sha256_file
from scripts.common.errors import UserError
from scripts.common.schema import Deid
from scripts.deid.detection import NER_ENTITIES, Detector, WatchedPattern
from scripts.deid.languages import READABLE, recognizers
from scripts.deid.rampart import ATTRIBUTION, RAMPART_LABELS, Rampart, load_rampart
from scripts.deid.words import WORD_LISTS

if TYPE_CHECKING:
    from spacy.language import Language

OWN_RECOGNIZERS = Path(__file__).with_name("recognizers.yaml")
SPACY_LABELS = {
    "PERSON": "PERSON", "PER": "PERSON", "NORP": "NRP", "FAC": "LOCATION", "LOC": "LOCATION", "GPE": "LOCATION",
    "ORG": "ORGANIZATION", "DATE": "DATE_TIME", "TIME": "DATE_TIME",
}  # fmt: skip
SPACY_IGNORED = (
    "CARDINAL", "EVENT", "LANGUAGE", "LAW", "MONEY", "ORDINAL", "PERCENT", "PRODUCT", "QUANTITY", "WORK_OF_ART", "MISC",
)  # fmt: skip
# Presidio's own recognizers in use. UsLicense and UsBank are left out: they take any short or long number for an
# identifier; ours wants a label beside it. Url and Iban are replaced by ours as well: Iban's patterns slow down with the square
# of the length, and pass over a pattern that runs out of time.
PRESIDIO_RECOGNIZERS = (
    "CreditCardRecognizer", "CryptoRecognizer", "DateRecognizer", "EmailRecognizer", "IpRecognizer",
    "MacAddressRecognizer", "MedicalLicenseRecognizer", "NhsRecognizer", "UsItinRecognizer",
    "UsMbiRecognizer", "UsNpiRecognizer", "UsPassportRecognizer", "UsSsnRecognizer", "UuidRecognizer",
)  # fmt: skip
PHONE_REGIONS = (
    "US", "GB", "AU", "DE", "FR", "IT", "ES", "NL", "SE", "PL", "IN", "BR", "IL",
)  # fmt: skip
# Lowest scores that count. Below them Presidio guesses: any nine digits are an SSN at 0.05, any word a passport at 0.1.
THRESHOLDS = {"default": 0.4, "DATE_TIME": 0.5}
FOREIGN_THRESHOLDS = {**THRESHOLDS, "PERSON": 0.55, "LOCATION": 0.6}
STRICT_THRESHOLDS = {"default": 0.3}
_PHONE_LIKE = re.compile(r"(?<!\d)\d(?:[\s().x/+-]{0,3}\d){6,14}(?!\d)")
DEFAULT_MODEL = Deid().spacy_model
MODEL_HINT = (
    "Install it with `pip install -r requirements.extra.txt`, or set deid.spacy_model to one that is installed."
)


def load_detector(settings: Deid) -> Detector:
    """Load every recognizer of a configuration and prove with known values that each one answers.

    Raises: UserError for a missing or wrong model, an unknown entity, or recognizers that cannot be read.
    """
    os.environ.setdefault("REGEX_TIMEOUT_SECONDS", "20")
    with _without_torch():
        return _load_detector(settings, settings.language)


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


def reader_of(language: str, detector: Detector) -> Detector | None:
    """Return the detector for records in another language: Rampart and the patterns; None where Rampart cannot read it."""
    if language == detector.language:
        return detector
    if detector.rampart is None or language not in READABLE:
        return None
    if language not in detector.others:
        with _without_torch():
            detector.others[language] = _load_detector(detector.settings, language, detector.rampart)
    return detector.others[language]


def _load_detector(settings: Deid, language: str, rampart: Rampart | None = None) -> Detector:
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
    registry = RecognizerRegistry(supported_languages=[language])
    for name in PRESIDIO_RECOGNIZERS:
        registry.add_recognizer(getattr(predefined_recognizers, name)(supported_language=language))

    class QuickPhoneRecognizer(PhoneRecognizer):  # type: ignore[misc]
        """Spare texts without 7 to 15 digits in a row the search over all regions, a third of the time."""

        def analyze(self, text: str, *arguments: Any, **keywords: Any) -> Any:
            return super().analyze(text, *arguments, **keywords) if _PHONE_LIKE.search(text) else []

    registry.add_recognizer(
        QuickPhoneRecognizer(supported_regions=PHONE_REGIONS, leniency=1, supported_language=language)
    )
    add_pattern_recognizers(registry, OWN_RECOGNIZERS, language)
    for entry in recognizers(language):
        registry.add_pattern_recognizer_from_dict(entry)
    user_entities = (
        add_pattern_recognizers(registry, Path(settings.recognizers), language) if settings.recognizers else frozenset()
    )
    if settings.deny_list:
        registry.add_pattern_recognizer_from_dict(
            {
                "name": "deny list",
                "supported_entity": "CUSTOM",
                "deny_list": settings.deny_list,
                "supported_language": language,
            }
        )
    registry.add_pattern_recognizer_from_dict(
        {"name": "countries", "supported_entity": "LOCATION", "deny_list": _countries(), "deny_list_score": 0.6,
         "supported_language": language}
    )  # fmt: skip
    for recognizer in registry.recognizers:
        _watch_patterns(recognizer)
    rampart = rampart or load_rampart(settings)
    engine = _spacy_engine(settings, language, by_rampart=rampart is not None and language in READABLE)
    registry.add_nlp_recognizer(engine)
    analyzer = AnalyzerEngine(
        registry=registry, nlp_engine=engine, supported_languages=[language],
        context_aware_enhancer=LemmaContextAwareEnhancer(context_matching_mode="whole_word"),
    )  # fmt: skip
    known = sorted({*analyzer.get_supported_entities(language), *(RAMPART_LABELS.values() if rampart else ())})
    entities = settings.entities if settings.entities is not None else _profile_entities(settings, known)
    for key, names in (
        ("entities", entities), ("thresholds", [name for name in settings.thresholds if name != "default"]),
        ("operators", settings.operators), ("columns", [name for name in settings.columns.values() if name != "text"]),
    ):  # fmt: skip
        for name in names:
            if name not in known:
                raise UserError(f"deid.{key}: found {name}, wanted entities out of: {', '.join(known)}.")
    usual = (
        STRICT_THRESHOLDS if settings.profile == "strict" else THRESHOLDS if language == "en" else FOREIGN_THRESHOLDS
    )
    thresholds = {**usual, **settings.thresholds}
    detector = Detector(settings, language, tuple(sorted(entities)), thresholds, analyzer, rampart, user_entities)
    _check_canaries(detector)
    return detector


def _watch_patterns(recognizer: Any) -> None:
    """Compile the patterns as the recognizer would, and make one that runs out of time an error."""
    import regex

    for pattern in getattr(recognizer, "patterns", ()):
        pattern.compiled_with_flags = recognizer.global_regex_flags
        pattern.compiled_regex = WatchedPattern(regex.compile(pattern.regex, flags=recognizer.global_regex_flags))


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
    import regex  # what Presidio compiles patterns with; it knows more than `re`

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["recognizers"]
        entries = list(entries)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"deid.recognizers: {path}: {type(error).__name__}; wanted a YAML file with a list under `recognizers`."
        ) from None
    for number, entry in enumerate(entries, 1):
        try:
            entry = {**entry, "supported_language": language}
            examples = []
            if "patterns" in entry:
                for pattern in entry["patterns"]:
                    regex.compile(pattern["regex"])
                examples = [pattern.get("example") for pattern in entry["patterns"]]
                entry["patterns"] = [{k: v for k, v in p.items() if k != "example"} for p in entry["patterns"]]
            registry.add_pattern_recognizer_from_dict(entry)
        except Exception as error:  # Presidio and regex raise a dozen kinds for a malformed entry
            raise UserError(
                f"deid.recognizers: {path}: recognizer {number}: {type(error).__name__}: {error}. "
                "Wanted name, supported_entity and patterns with name, regex and score, or a deny_list."
            ) from None
        _check_examples(registry.recognizers[-1], examples, path)
    return frozenset(entry["supported_entity"] for entry in entries)


def _check_examples(recognizer: Any, examples: Sequence[str | None], path: Path) -> None:
    """Refuse to run when a pattern does not find its own example: it would find nothing else either.

    Raises: UserError naming the pattern.
    """
    from presidio_analyzer import PatternRecognizer

    for pattern, example in zip(recognizer.patterns, examples, strict=False):
        entity = recognizer.supported_entities[0]
        if example and not PatternRecognizer(entity, patterns=[pattern]).analyze(example, [entity]):
            raise UserError(
                f"self-test: {path}: {recognizer.name}: the pattern `{pattern.name}` does not find its own example, "
                "so nothing was scrubbed. Correct the pattern or its example."
            )


def _spacy_engine(settings: Deid, language: str, *, by_rampart: bool) -> Any:
    """Load the spaCy model from this machine and keep of it what finds names; Rampart alone reads the languages without one."""
    import spacy
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    from thinc.api import NumpyOps, set_current_ops

    set_current_ops(NumpyOps(use_blis=False))  # numpy's BLAS is up to twice as fast as spaCy's own on these shapes

    name = settings.spacy_model
    alone = language != settings.language or (by_rampart and name == DEFAULT_MODEL and language != "en")
    if settings.profile == "secrets-only" or alone:
        try:
            nlp = spacy.blank(language)
        except ImportError:
            raise UserError(f"deid.language: found {language}, wanted the code of a language spaCy knows.") from None
    else:
        nlp = _load_model(name, language)
    _add_lower_lemmas(nlp)
    engine = SpacyNlpEngine(
        models=[{"lang_code": language, "model_name": name}],
        ner_model_configuration=NerModelConfiguration(
            model_to_presidio_entity_mapping=SPACY_LABELS,
            labels_to_ignore=list(SPACY_IGNORED),
            low_score_entity_names=[],
        ),
    )
    engine.nlp = {language: nlp}
    return engine


def _load_model(name: str, language: str) -> Language:
    import spacy

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\[W095\]")  # a 3.7 model runs under spaCy 3.8
            # The tagger, parser and lemmatizer cost more than half of the time and change no finding.
            nlp = spacy.load(name, exclude=["tagger", "parser", "senter", "attribute_ruler", "lemmatizer"])
    except OSError:
        raise UserError(f"deid.spacy_model: found no installed spaCy model {name}. {MODEL_HINT}") from None
    if nlp.lang != language:
        raise UserError(
            f"deid.language: found {language}, but deid.spacy_model {name} reads {nlp.lang}. Name a spaCy model of that "
            f"language in deid.spacy_model; Rampart, which `make setup` installs, reads {', '.join(READABLE)} without one."
        )
    if "ner" not in nlp.pipe_names:
        raise UserError(f"deid.spacy_model: {name} has no named entity recognizer. {MODEL_HINT}")
    if "Tok2VecListener" not in json.dumps(nlp.config["components"]["ner"]) and "tok2vec" in nlp.pipe_names:
        nlp.remove_pipe("tok2vec")
    return nlp


def _add_lower_lemmas(nlp: Language) -> None:
    """Give Presidio's context search lower-case words in place of lemmas, which would need the tagger."""
    from spacy.language import Language

    if not Language.has_factory("lower_lemmas"):

        @Language.component("lower_lemmas")  # type: ignore[untyped-decorator]
        def lower_lemmas(doc: Any) -> Any:
            return doc.from_array(["LEMMA"], doc.to_array(["LOWER"])) if len(doc) else doc

    nlp.add_pipe("lower_lemmas")


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
    "ORGANIZATION": "Maria Gonzalez works for Microsoft Corporation.",
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
    if detector.language != "en":  # names and places of an English sentence prove nothing there
        texts = {name: text for name, text in texts.items() if name not in NER_ENTITIES}
    allowed = detector.settings.allow_list
    found = detector.detect(list(texts.values())) if texts else []
    missed = [name for name, spans in zip(texts, found, strict=True) if not any(s.entity == name for s in spans)]
    missed = [name for name in missed if not any(word.casefold() in CANARIES[name].casefold() for word in allowed)]
    raised = [name for name in missed if name in detector.settings.thresholds]
    if missed:
        hint = f" Lower deid.thresholds for {', '.join(raised)}." if raised else ""
        raise UserError(
            f"self-test: the known example of {', '.join(missed)} was not found, so nothing was scrubbed.{hint}"
        )
    if detector.rampart and not detector.rampart.detect(["My name is Maria Gonzalez."])[0]:
        raise UserError("self-test: Rampart does not find a known name. Install it again, or set deid.rampart to off.")


def describe(detector: Detector) -> dict[str, Any]:
    """Return what the report says about the recognizers: names, versions and hashes."""
    from importlib.metadata import version

    settings = detector.settings
    nlp = detector.analyzer.nlp_engine.nlp[detector.language]
    packages = ("presidio-analyzer", "spacy", "phonenumbers", "tldextract", "regex")
    return {
        "packages": {name: version(name) for name in packages},
        "spacy_model": {"name": settings.spacy_model, "version": nlp.meta.get("version"), "sha256": _model_hash(nlp)},
        "rampart": {
            "used": detector.rampart is not None,
            "model_sha256": sha256_file(detector.rampart.file) if detector.rampart else None,
            "attribution": ATTRIBUTION if detector.rampart else None,
        },
        "recognizers": {
            "own_sha256": sha256_file(OWN_RECOGNIZERS),
            "words_sha256": sha256_file(WORD_LISTS),
            "user_sha256": sha256_file(Path(settings.recognizers)) if settings.recognizers else None,
            "names": sorted(r.name for r in detector.analyzer.get_recognizers(detector.language)),
        },
        "entities": list(detector.entities),
        "thresholds": detector.thresholds,
    }


def _model_hash(nlp: Language) -> str | None:
    """Hash the weights that find names; a blank pipeline has none."""
    folder = nlp.path
    weights = folder / "ner" / "model" if folder else None
    return sha256_file(weights) if weights and weights.is_file() else None
