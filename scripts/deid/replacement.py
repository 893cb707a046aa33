"""Put something in the place of personal data: the same value gets the same replacement throughout its record."""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.common.errors import UserError
from scripts.common.schema import Deid
from scripts.deid.dates import coarse_age, coarse_date, read_date, shift_date
from scripts.deid.spans import Span

if TYPE_CHECKING:
    from faker import Faker

KEY_VARIABLE = "DEID_KEY_FILE"
KEYED = ("hash", "encrypt")
FOR_ENTITIES = {"shift": ["DATE_TIME"], "generalise": ["DATE_TIME", "AGE"]}
_NUMBERS = frozenset({"US_SSN", "CREDIT_CARD", "IBAN_CODE", "ID_NUMBER", "UK_NHS", "US_NPI", "US_ITIN", "US_MBI"})
_ENCRYPTED = re.compile(r"<[A-Z_]+:([\w-]{20,}={0,2})>")
# Whose names, towns and firms take the place of those of a record in this language.
LOCALES = {"de": "de_DE", "fr": "fr_FR", "es": "es_ES", "it": "it_IT", "pt": "pt_PT", "nl": "nl_NL"}


class Replacer:
    """The operators of one configuration."""

    def __init__(self, settings: Deid, seed: int, key: bytes | None) -> None:
        from presidio_anonymizer import AnonymizerEngine

        self.settings, self.seed, self.key = settings, seed, key
        self.operators: dict[str, Callable[[str, str, str], str]] = {
            "mask": lambda entity, value, identity: re.sub(r"\w", "*", value),
            "redact": lambda entity, value, identity: "",
            "keep": lambda entity, value, identity: value,
            "tag": lambda entity, value, identity: f"<{entity}>",
            "hash": lambda entity, value, identity: f"<{entity}:{self._digest(entity, identity).hex()[:16]}>",
            "encrypt": lambda entity, value, identity: f"<{entity}:{self._encrypt(entity, value)}>",
        }
        self._fakers: dict[str, Faker] = {}
        self.engine = AnonymizerEngine()  # type: ignore[no-untyped-call]

    def operator_of(self, entity: str) -> str:
        """Return the name of the operator for an entity."""
        return self.settings.operators.get(entity, self.settings.operator)

    def removes(self, entity: str) -> bool:
        """Say whether the original may not stand in the output."""
        return self.operator_of(entity) != "keep"

    def replace(self, number: int, texts: Sequence[tuple[str, Sequence[Span]]], language: str = "en") -> list[str]:
        """Replace the spans of all texts of one record; `number` is the record's number in the file.

        Surrogates are of the record's language; those that hold for a whole file, of the file's.
        """
        if self.settings.consistency == "file":
            language = self.settings.language
        found = [(span.entity, text[span.start : span.end]) for text, spans in texts for span in spans]
        identities = identify(found)
        places: dict[str, list[str]] = {}
        for entity, value in found:
            known = places.setdefault(entity, [])
            if identities[entity, value] not in known:
                known.append(identities[entity, value])
        originals = {fold(value) for _, value in found}
        families = families_of(identities)
        chosen: dict[tuple[str, str], str] = {}
        for entity, value in found:
            if (entity, value) in chosen:
                continue
            identity = identities[entity, value]
            operator = self.operator_of(entity)
            if operator == "tag-index":
                new = f"<{entity}_{places[entity].index(identity) + 1}>"
            elif operator == "shift":
                new = shift_date(value, self._days(number)) or f"<{entity}>"
            elif operator == "generalise":
                new = coarse_age(value) if entity == "AGE" else coarse_date(value) or f"<{entity}>"
            elif operator == "surrogate":
                ordinal = places[entity].index(identity)
                new = self._surrogate(number, entity, value, identity, ordinal, originals, families, language)
            else:
                new = self.operators[operator](entity, value, identity)
            chosen[entity, value] = new
        return [self._put_in_place(text, spans, chosen) for text, spans in texts]

    def _put_in_place(self, text: str, spans: Sequence[Span], chosen: dict[tuple[str, str], str]) -> str:
        from presidio_anonymizer.entities import OperatorConfig, RecognizerResult

        operators = {
            entity: OperatorConfig("custom", {"lambda": lambda value, entity=entity: chosen[entity, value]})
            for entity in {span.entity for span in spans}
        }
        results = [RecognizerResult(span.entity, span.start, span.end, 1.0) for span in spans]
        return self.engine.anonymize(text, results, operators, merge_entities_with_spaces=False).text if spans else text

    def _digest(self, entity: str, identity: str) -> bytes:
        assert self.key is not None
        return hmac.digest(self.key, f"{entity}\n{identity}".encode(), "sha256")

    def _days(self, number: int) -> int:
        """Draw by how many days the dates of a record move, a month to a year back; the same for a whole file with its key."""
        if self.settings.consistency == "file":
            return -30 - int.from_bytes(self._digest("DATE_TIME", "shift")[:8], "big") % 336
        origin = f"{self.seed}\n{number}\nshift".encode()
        return -30 - int.from_bytes(hashlib.sha256(origin).digest()[:8], "big") % 336

    def _encrypt(self, entity: str, value: str) -> str:
        return base64.urlsafe_b64encode(_cipher(self.key).encrypt(value.encode(), [entity.encode()])).decode()

    def _surrogate(
        self, number: int, entity: str, value: str, identity: str, ordinal: int, originals: set[str], families: Sequence[str],
        language: str,
    ) -> str:  # fmt: skip
        """Invent a value of the same kind, seeded by its position in the file or, for one value per file, by the key."""
        fake = self._faker(language)
        seed = self._seed(number, entity, identity, ordinal)
        family = family_of(identity, families) if entity == "PERSON" else None
        of_family = self._seed(number, "FAMILY", family, families.index(family)) if family else seed
        last = ""
        for attempt in range(100):
            if not last or set(fold(last).split()) & originals:
                fake.seed_instance(of_family + attempt)
                last = str(fake.last_name())
            fake.seed_instance(seed + attempt)
            # The whole identity is drawn first, so that "Maria" becomes the first name of what "Maria Diaz" became.
            new = _invent(fake, entity, value, identity, last, family, random.Random(seed + attempt))
            if not {fold(new), *fold(new).split()} & originals:
                return new
        raise ValueError("no surrogate found that differs from every original")

    def _seed(self, number: int, entity: str, identity: str, ordinal: int) -> int:
        if self.settings.consistency == "file":
            return int.from_bytes(self._digest(entity, identity)[:8], "big")
        # the position, not the value: a code must not be derived from the person
        origin = f"{self.seed}\n{number}\n{entity}\n{ordinal}".encode()
        return int.from_bytes(hashlib.sha256(origin).digest()[:8], "big")

    def _faker(self, language: str) -> Faker:
        import faker

        if language not in self._fakers:
            self._fakers[language] = faker.Faker(LOCALES.get(language, "en_US"))
        return self._fakers[language]


def fold(value: str) -> str:
    """Write a value so that mentions that differ only in case and spacing are equal."""
    return " ".join(value.casefold().split())


def identify(found: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Say who or what each mention is: a part of exactly one longer name of the record is that person, and a number, a date
    or `Last, First` is the same in every form.
    """
    plain = {(entity, value): _same_form(entity, value) for entity, value in found}
    names = {identity for (entity, _), identity in plain.items() if entity == "PERSON"}
    identities = {}
    for (entity, value), form in plain.items():
        identity = form
        if entity == "PERSON":
            parts = set(_words(identity))
            longer = [name for name in names if parts < set(_words(name))]
            # Several longer forms of one name count once: only the longest ones can differ.
            longest = [name for name in longer if not any(set(_words(name)) < set(_words(other)) for other in longer)]
            if len(longest) == 1:
                identity = longest[0]
        identities[entity, value] = identity
    return identities


def _same_form(entity: str, value: str) -> str:
    """Write a value as all its forms are written: (415) 555-2671 as 415.555.2671, Smith, John as John Smith."""
    folded = fold(value)
    if entity == "PERSON" and (listed := re.fullmatch(r"([^,]+), ?([^,]+)", folded)):
        return f"{listed[2]} {listed[1]}"
    if entity == "PHONE_NUMBER" and len(digits := re.sub(r"\D", "", value)) >= 7 and not re.search(r"x|ext", folded):
        return digits[-10:]
    if entity in _NUMBERS:
        return re.sub(r"[\W_]", "", folded)
    return (read_date(value) or folded) if entity == "DATE_TIME" else folded


def _words(name: str) -> list[str]:
    return re.findall(r"\w+", name)


def families_of(identities: Mapping[tuple[str, str], str]) -> list[str]:
    """List the family names of a record's people in the order in which they appear; Anna and Peter Schmidt share one."""
    names = [_words(identity) for (entity, _), identity in identities.items() if entity == "PERSON"]
    return list(dict.fromkeys(words[-1] for words in names if len(words) > 1))


def family_of(identity: str, families: Sequence[str]) -> str | None:
    """Return the family name in a name: its last word, also where that stands alone."""
    words = _words(identity)
    return words[-1] if words and words[-1] in families else None


def _invent(
    fake: Faker, entity: str, value: str, identity: str, last: str, family: str | None, rng: random.Random
) -> str:
    if entity == "PERSON":
        words, whole = _words(fold(value)), _words(identity)
        first = _first_name(fake, whole)
        if len(words) > 1 and "," in value:
            return f"{last}, {first}"
        if len(words) > 1:
            return f"{first} {last}"
        return last if words and words[-1] == family else first
    made: dict[str, Callable[[], str]] = {
        "EMAIL_ADDRESS": fake.safe_email, "LOCATION": fake.city, "ORGANIZATION": fake.company, "URL": lambda: f"https://{fake.domain_word()}.example",
        "STREET_ADDRESS": lambda: f"{fake.street_address()}, {fake.city()}", "IP_ADDRESS": lambda: f"203.0.113.{rng.randrange(1, 255)}",
        "CREDIT_CARD": fake.credit_card_number, "IBAN_CODE": fake.iban, "HANDLE": lambda: f"@{fake.user_name()}",
        "US_SSN": lambda: f"9{rng.randrange(100):02}-{rng.randrange(10, 50)}-{rng.randrange(1000, 10000)}",
        "DATE_TIME": lambda: _date(rng), "MAC_ADDRESS": fake.mac_address, "UUID": lambda: str(fake.uuid4()),
    }  # fmt: skip
    if fake.locales == ["en_US"]:  # the only plan of numbers with a range for invented ones that we know
        made["PHONE_NUMBER"] = lambda: f"({rng.randrange(201, 990)}) 555-01{rng.randrange(100):02}"
    if entity in made and not value.isdigit():
        return str(made[entity]())
    if entity == "AGE":
        return re.sub(r"\d+", lambda _: str(rng.randrange(18, 90)), value)
    return "".join(_same_kind(character, rng, first=not index) for index, character in enumerate(value))


def _first_name(fake: Faker, name: Sequence[str]) -> str:
    """Draw a first name of the gender that the name has on Faker's lists of the language, or on the American ones."""
    given = name[0].capitalize() if name else ""
    for locale in (*fake.locales, "en_US"):
        provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
        female, male = given in provider.first_names_female, given in provider.first_names_male
        if female != male:
            return str(fake.first_name_female() if female else fake.first_name_male())
    return str(fake.first_name())


def _date(rng: random.Random) -> str:
    """Draw a date between fixed bounds; Faker's own end today, so the same seed would give another one tomorrow."""
    return date.fromordinal(rng.randrange(date(1950, 1, 1).toordinal(), date(2025, 1, 1).toordinal())).isoformat()


def _same_kind(character: str, rng: random.Random, *, first: bool) -> str:
    """Draw a digit for a digit and a letter for a letter; the first digit is not a zero, so that numbers keep their length."""
    if character.isdigit():
        return str(rng.randrange(1 if first else 0, 10))
    if character.isalpha():
        letter = rng.choice("abcdefghjkmnpqrstuvwxyz")
        return letter.upper() if character.isupper() else letter
    return character


def check_operators(settings: Deid) -> bytes | None:
    """Refuse combinations that would not do what they promise, and read the key where one is needed."""
    used = {settings.operator, *settings.operators.values()}
    for entity, operator in [("every entity", settings.operator), *settings.operators.items()]:
        if entity not in FOR_ENTITIES.get(operator, [entity]):
            raise UserError(
                f"deid.operator{'' if entity == 'every entity' else f's.{entity}'}: found {operator} for {entity}; it is for "
                f"{' and '.join(FOR_ENTITIES[operator])} alone, as in deid.operators: {{DATE_TIME: {operator}}}."
            )
    if settings.consistency == "file" and "tag-index" in used:
        raise UserError("deid.consistency: found file, but tag-index counts within a record. Use hash or surrogate.")
    derived = sorted(used & set(KEYED)) + (
        ["surrogate with consistency file"] if settings.consistency == "file" else []
    )
    derived += ["shift"] if "shift" in used else []
    if settings.profile == "hipaa-safe-harbor" and derived:
        raise UserError(
            f"deid.operator: found {', '.join(derived)}, but Safe Harbor forbids codes derived from the person "
            "(45 CFR 164.514(c)) and shifted dates. Use tag, tag-index, mask, redact, generalise or surrogate within a record."
        )
    if not used & set(KEYED) and not (settings.consistency == "file" and used & {"surrogate", "shift"}):
        return None
    return read_key()


def read_key() -> bytes:
    """Read the secret key from the file that DEID_KEY_FILE names."""
    name = os.environ.get(KEY_VARIABLE)
    make = "python -c \"import secrets; open('deid.key', 'wb').write(secrets.token_bytes(32))\""
    how = f"{make}; " + ('$env:DEID_KEY_FILE="deid.key"' if os.name == "nt" else "export DEID_KEY_FILE=deid.key")
    if not name:
        raise UserError(
            f"{KEY_VARIABLE} is not set; hash, encrypt and file-wide surrogates need a key. For a new one: {how}"
        )
    try:
        key = Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"{KEY_VARIABLE}: cannot read {name}: {error.strerror}. For a new one: {how}") from None
    if len(key) < 32:
        raise UserError(f"{KEY_VARIABLE}: {name} holds {len(key)} bytes, wanted at least 32. For a new one: {how}")
    return key


def _cipher(key: bytes | None) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV

    assert key is not None
    return AESSIV(hashlib.sha512(b"encrypt" + key).digest())


def decrypt(text: str, key: bytes) -> str:
    """Put the originals back into a text whose values were replaced by `encrypt`.

    Raises: UserError when the key is not the one that encrypted, or a value was changed.
    """
    from cryptography.exceptions import InvalidTag

    def original(match: re.Match[str]) -> str:
        entity = match[0][1:].partition(":")[0]
        try:
            return str(_cipher(key).decrypt(base64.urlsafe_b64decode(match[1]), [entity.encode()]).decode())
        except (InvalidTag, ValueError):
            raise UserError(f"cannot decrypt a value of {entity}: wrong key, or the value was changed.") from None

    return _ENCRYPTED.sub(original, text)
