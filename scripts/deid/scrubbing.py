"""Scrub whole records: which fields are read, how findings spread within a record, and when a record is held back.

A record is searched again with its findings replaced by tags until nothing new turns up. So scrubbing twice gives what
scrubbing once gives, and the last search is the proof that the recognizers find nothing any more.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from scripts.common.schema import Deid
from scripts.dataset.columns import ALIASES, FIELDS, REASONING_KEYS, SPEAKERS, TOOL_SPEAKERS
from scripts.dataset.files import BadRow
from scripts.deid import hipaa
from scripts.deid.detection import NER_ENTITIES, Detector
from scripts.deid.doubts import countries
from scripts.deid.labels import entity_of_label
from scripts.deid.languages import READABLE, foreign_words, language_of, majority
from scripts.deid.names import PARTICLES, WORDS, is_full_name
from scripts.deid.recognizers import reader_of
from scripts.deid.replacement import Replacer
from scripts.deid.spans import TAG, Span, cut, merge_addresses, tidy

# Prose needs no label; every other field is read as "name of the field: value", which distinguishes an SSN from a number.
PROSE_FIELDS = frozenset({*FIELDS, *sum(ALIASES.values(), ()), *REASONING_KEYS, "content", "value", "text"})
_ROLES = frozenset({*SPEAKERS, *TOOL_SPEAKERS})
# Of what is found in a field that is never replaced, these hold the record back. A code of digits or a date may be an id.
UNMISTAKABLE = frozenset({
    "EMAIL_ADDRESS", "SECRET", "US_SSN", "US_ITIN", "US_MBI", "IBAN_CODE", "CREDIT_CARD", "PHONE_NUMBER", "UK_NHS", "CRYPTO",
    "STREET_ADDRESS", "CUSTOM",
})  # fmt: skip
_NAME_TOKEN = re.compile(r"[^\W\d_][\w'’-]*[^\W_]")
_BLOB = re.compile(r"data:[\w/+.-]+;base64,|(?<![\w+/])(?=[\w+/]*\d)(?=[\w+/]*[a-z])(?=[\w+/]*[A-Z])[\w+/]{400,}={0,2}")
MAX_ROUNDS = 8
FIELD_NAME = "the name of a field"
MAX_CHARACTERS = 1_000_000


@dataclass
class Leaf:
    """One scalar of a record and what was found in it."""

    path: tuple[str | int, ...]
    text: str
    label: str
    whole: str | None
    kept: str = ""  # what it is when it is never replaced, so that a finding holds the record back
    spans: list[Span] = field(default_factory=list)

    @cached_property
    def folded(self) -> str:
        """Return the text in small letters."""
        return self.text.casefold()

    def view(self) -> tuple[str, list[tuple[int, int, int]]]:
        """Return the text as it is searched next, and (start there, start here, length) of its untouched pieces."""
        parts, pieces, position, length = [self.label], [], 0, len(self.label)
        for span in [*self.spans, Span(len(self.text), len(self.text), "", 0)]:
            piece = self.text[position : span.start]
            pieces.append((length, position, len(piece)))
            tag = f"<{span.entity}>" if span.entity else ""
            parts += [piece, tag]
            length += len(piece) + len(tag)
            position = span.end
        return "".join(parts), pieces

    def add(self, found: Sequence[Span]) -> bool:
        """Take in spans of this text; return whether they cover more than before."""
        before = [span[:3] for span in self.spans]
        tags = [(match.start(), match.end()) for match in TAG.finditer(self.text)]
        fresh = tidy(self.text, found, sorted([*tags, *((span.start, span.end) for span in self.spans)]))
        self.spans = cut(self.text, merge_addresses(self.text, sorted([*self.spans, *fresh])))
        return [span[:3] for span in self.spans] != before


@dataclass
class Outcome:
    """A scrubbed row, or the reason why it is held back."""

    source: str
    row: Any = None
    reason: str = ""
    found: list[tuple[str, str, float]] = field(default_factory=list)  # field, entity, score
    spans_of_text: list[Span] = field(default_factory=list)  # of a row that holds nothing but `text`
    characters: int = 0


class HeldBackError(Exception):
    """A record cannot be vouched for; the reason holds no text of it."""


def scrub_chunk(chunk: Sequence[tuple[int, str, Any]], detector: Detector, replacer: Replacer) -> list[Outcome]:
    """Scrub rows given as (number, file:line, row); every row comes back, scrubbed or held back."""
    outcomes = [Outcome(source) for _, source, _ in chunk]
    leaves: dict[int, list[Leaf]] = {}
    for index, (_, _, row) in enumerate(chunk):
        try:
            leaves[index] = read_leaves(row, detector)
        except HeldBackError as error:
            outcomes[index].reason = str(error)
    for language, indices in by_language(leaves, detector).items():
        reader = reader_of(language, detector)
        part = {index: leaves[index] for index in indices}
        failed = search_until_stable(part, reader) if reader else dict.fromkeys(part, unread(language, detector))
        for index, reason in failed.items():
            outcomes[index].reason = reason
            del leaves[index]
    for index, found in leaves.items():
        number, _, row = chunk[index]
        try:
            _finish(number, outcomes[index], row, found, detector, replacer)
        except Exception as error:  # a row that failed in any way must not pass
            outcomes[index].reason = str(error) if isinstance(error, HeldBackError) else _named(error)
    return outcomes


def by_language(records: dict[int, list[Leaf]], detector: Detector) -> dict[str, list[int]]:
    """Group records by the language they are written in."""
    groups: dict[str, list[int]] = {}
    for index, leaves in records.items():
        language = detector.language
        if detector.settings.detect_language and detector.settings.profile != "secrets-only":
            text = "\n".join(leaf.text for leaf in leaves if not leaf.kept)
            language = language_of(text, detector.usual or detector.language)
        groups.setdefault(language, []).append(index)
    return groups


def usual_language(rows: Iterable[Any], settings: Deid) -> str:
    """Return the language of most of the first 1,000 rows of a file."""
    texts = (
        "\n".join(str(value) for _, value in _scalars(row, (), settings))
        for row in itertools.islice(rows, 1000)
        if not isinstance(row, BadRow)
    )
    return majority(texts, settings.language)


def unread(language: str, detector: Detector) -> str:
    """Say why a record in another language is held back."""
    if language in READABLE:
        return f"written in another language ({language}), which needs Rampart"
    return f"written in another language ({language}); deid.language is {detector.language}"


def read_leaves(row: Any, detector: Detector) -> list[Leaf]:
    """List the scalars of a row that are to be searched.

    Raises: HeldBackError for content that cannot be searched.
    """
    if isinstance(row, BadRow):
        raise HeldBackError(f"unreadable: {row.field}")
    settings = detector.settings
    if missing := missing_fields(row, settings.fields or ()):
        raise HeldBackError(f"the field {missing[0]} is missing")
    leaves = [Leaf(path, str(path[-1]), "", None, kept=FIELD_NAME) for path in _odd_keys(row, ())]
    leaves += [
        Leaf(path, text, "", None, kept=f"the safe field {path[-1]}") for path, text in _safe_texts(row, (), settings)
    ]
    for path, value in _scalars(row, (), settings):
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        text = _as_text(value)
        if text is None:
            raise HeldBackError(f"a value of type {type(value).__name__} cannot be searched")
        if len(text) > MAX_CHARACTERS:
            raise HeldBackError(f"a text of more than {MAX_CHARACTERS:,} characters")
        if _BLOB.search(text):
            raise HeldBackError("binary content (base64), which may be an image or a fingerprint")
        declared = declared_entity(path, settings)
        whole = declared if declared not in (None, "text") else entity_of_label(name, detector.entities)
        whole = None if declared == "text" else whole
        if isinstance(value, str) or whole or len(text) >= 5:
            prose = re.sub(r"[\s-]+", "_", name.strip().casefold()) in PROSE_FIELDS
            label = "" if prose or declared or not name else f"{name.replace('_', ' ')}: "
            leaves.append(Leaf(path, text, label, whole))
    return leaves


def _scalars(value: Any, path: tuple[str | int, ...], settings: Deid) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if settings.fields is not None or not _is_safe((*path, key), settings):
                yield from _scalars(inner, (*path, key), settings)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _scalars(inner, (*path, index), settings)
    elif path and path[-1] == "from" and isinstance(value, str) and value.casefold() in _ROLES:
        return  # who speaks, as in `role`
    elif value is not None and not isinstance(value, bool):
        dotted = ".".join(part for part in path if isinstance(part, str))
        if settings.fields is None or any(dotted == f or dotted.startswith(f + ".") for f in settings.fields):
            yield path, value


def declared_entity(path: tuple[str | int, ...], settings: Deid) -> str | None:
    """Return what deid.columns says of a value: by its own name or dotted path, or by the nearest field that it lies in."""
    names = [part for part in path if isinstance(part, str)]
    for end in range(len(names), 0, -1):
        for start in range(end):
            if declared := settings.columns.get(".".join(names[start:end])):
                return declared
    return None


def _is_safe(path: tuple[str | int, ...], settings: Deid) -> bool:
    """Say whether a field keeps its value: deid.safe_fields names it, and deid.columns says nothing of it."""
    return path[-1] in settings.safe_fields and declared_entity(path, settings) is None


def _safe_texts(value: Any, path: tuple[str | int, ...], settings: Deid) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """List the texts below the safe fields, which are read but never changed; a number there is a code."""
    if settings.fields is not None:
        return
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, str):
                whole = (*path, key)
                if any(_is_safe(whole[:end], settings) for end in range(1, len(whole) + 1)):
                    yield (*(part for part in path if isinstance(part, str)), key), inner
            else:
                yield from _safe_texts(inner, (*path, key), settings)


def _odd_keys(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """List the keys that are not plain names of fields: a person may be hidden in them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z_.-]*\d{0,3}", key):
                yield (*path, key)
            yield from _odd_keys(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _odd_keys(inner, (*path, index))


def missing_fields(row: Any, fields: Sequence[str]) -> list[str]:
    """Return those of the dotted paths that a row does not have."""

    def has(value: Any, parts: list[str]) -> bool:
        if isinstance(value, list):
            return any(has(inner, parts) for inner in value)
        return not parts or (isinstance(value, dict) and parts[0] in value and has(value[parts[0]], parts[1:]))

    return [path for path in fields if not has(row, path.split("."))]


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return format(value, ".0f") if value.is_integer() else repr(value)
    return None


def search_until_stable(records: dict[int, list[Leaf]], detector: Detector) -> dict[int, str]:
    """Fill in the spans of every leaf; return the records that could not be searched, with the reason."""
    failed: dict[int, str] = {}
    for leaf in (leaf for leaves in records.values() for leaf in leaves):
        if leaf.whole and any(character.isalnum() for character in TAG.sub("", leaf.text)):
            leaf.add([Span(0, len(leaf.text), leaf.whole, 1.0)])
    pending = {index: list(leaves) for index, leaves in records.items()}
    for _ in range(MAX_ROUNDS):
        views = {id(leaf): leaf.view() for leaves in pending.values() for leaf in leaves}
        found: dict[str, list[Span]] = {}
        try:
            texts = list(dict.fromkeys(text for text, _ in views.values()))
            found = dict(zip(texts, detector.detect(texts), strict=True))
        except Exception:  # find out which records it is; the others continue
            for index, leaves in pending.items():
                try:
                    texts = [views[id(leaf)][0] for leaf in leaves]
                    found.update(zip(texts, detector.detect(texts), strict=True))
                except Exception as error:
                    failed[index] = _named(error)
        again: dict[int, list[Leaf]] = {}
        for index, leaves in pending.items():
            if index not in failed:
                changed = {id(leaf) for leaf in leaves if leaf.add(_to_leaf(found, *views[id(leaf)]))}
                changed |= spread(records[index], detector)
                if changed:
                    again[index] = [leaf for leaf in records[index] if id(leaf) in changed]
        pending = again
        if not pending:
            return failed
    return {**failed, **dict.fromkeys(pending, "the search did not come to an end")}


def _to_leaf(found: dict[str, list[Span]], text: str, pieces: Sequence[tuple[int, int, int]]) -> list[Span]:
    """Bring findings in a view back to the offsets of the leaf; what lies in a tag or label falls away."""
    spans = []
    for span in found[text]:
        for start, origin, length in pieces:
            low, high = max(span.start, start), min(span.end, start + length)
            if low < high:
                spans.append(span._replace(start=low - start + origin, end=high - start + origin))
    return spans


def spread(leaves: Sequence[Leaf], detector: Detector) -> set[int]:
    """Cover every further mention, in any field, of the names and numbers found in a record."""
    tokens: dict[str, str] = {}
    values: dict[str, str] = {}
    allowed = {word.casefold() for word in detector.settings.allow_list}
    for leaf in leaves:
        for span in leaf.spans if not leaf.kept else ():
            surface = leaf.text[span.start : span.end]
            if span.entity == "PERSON":
                tokens |= {name: "PERSON" for name in [*name_tokens(surface), *logins(surface)]}
                if len(surface.split()) > 1 or (len(surface) >= 4 and not surface.isalpha()):
                    values[surface.casefold()] = "PERSON"
            elif span.entity in ("ORGANIZATION", "LOCATION"):
                if len(surface) >= 4 and surface[0].isupper() and surface.casefold() not in WORDS:
                    values.setdefault(surface.casefold(), span.entity)
            elif span.entity not in NER_ENTITIES and _is_distinctive(surface):
                values[surface.casefold()] = span.entity
    forms = {form: entity for form, entity in {**values, **tokens}.items() if form not in allowed}
    forms = {form: entity for form, entity in forms.items() if _stands_open(form, leaves)}
    changed: set[int] = set()
    if not forms:
        return changed
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    pattern = re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, longest_first))})(?![^\W_])", re.IGNORECASE)
    for leaf in leaves:
        hits = [
            Span(m.start(), m.end(), forms.get(m[0].casefold(), "PERSON"), 0.6) for m in pattern.finditer(leaf.text)
        ]
        if hits and leaf.add(hits):
            changed.add(id(leaf))
    return changed


def _stands_open(form: str, leaves: Sequence[Leaf]) -> bool:
    """Say whether a text may hold a form outside its findings; that spares most records a pattern of their own."""
    return any(
        leaf.folded.count(form) > sum(leaf.text[span.start : span.end].casefold().count(form) for span in leaf.spans)
        for leaf in leaves
    )


def name_tokens(surface: str) -> set[str]:
    """Return the words of a name, in small letters, that are names wherever they stand."""
    first, *others = _NAME_TOKEN.findall(surface.replace("_", " ")) or [""]
    words = {word.casefold() for word in (first, *(word for word in others if word not in PARTICLES))}
    return {word for word in words if len(word) >= 3 and word not in WORDS}


def logins(surface: str) -> set[str]:
    """Return the user names that systems make of a full name: ldavid, davidl, l.david, lucia.david."""
    words = [word.casefold() for word in _NAME_TOKEN.findall(surface)]
    if len(words) < 2 or len(words[-1]) < 3:
        return set()
    first, last = words[0], words[-1]
    return {
        first[0] + last,
        last + first[0],
        first + last[0],
        *(a + b + c for b in "._-" for a, c in ((first, last), (last, first), (first[0], last))),
    }


def _is_distinctive(surface: str) -> bool:
    """Say whether a finding is a number or an address, the same everywhere, and not a word such as a street's name."""
    return len(surface) >= 5 and not all(character.isalpha() or character.isspace() for character in surface)


def _finish(
    number: int, outcome: Outcome, row: Any, leaves: Sequence[Leaf], detector: Detector, replacer: Replacer
) -> None:
    """Replace what was found, and check that no original value is left anywhere in the row."""
    leaves, kept = [leaf for leaf in leaves if not leaf.kept], [leaf for leaf in leaves if leaf.kept]
    _check_kept(kept, leaves, detector)
    if detector.settings.detect_language and detector.settings.profile != "secrets-only":
        _check_scripts(leaves, detector.language)
    if detector.settings.profile == hipaa.PROFILE:
        for leaf in leaves:
            leaf.spans = leaf.spans if leaf.whole else hipaa.within_limits(leaf.text, leaf.spans, countries())
    scrubbed = copy.deepcopy(row)
    replaced = replacer.replace(number, [(leaf.text, leaf.spans) for leaf in leaves], detector.language)
    surfaces: set[str] = set()
    for leaf, text in zip(leaves, replaced, strict=True):
        if leaf.spans:
            _put(scrubbed, leaf.path, text)
        for span in leaf.spans:
            if span.entity not in NER_ENTITIES and replacer.removes(span.entity):
                surfaces.add(leaf.text[span.start : span.end])
    plain = json.dumps(scrubbed, ensure_ascii=False, default=str)
    plain.encode()  # half a surrogate pair cannot be written
    for surface in surfaces:
        inside = re.escape(json.dumps(surface, ensure_ascii=False)[1:-1])
        if _is_distinctive(surface) and re.search(rf"(?<!\w){inside}(?!\w)", TAG.sub("", plain)):
            raise HeldBackError("a value that was replaced stands in a field or key that is not scrubbed")
    outcome.row = scrubbed
    outcome.found = [(_dotted(leaf.path), span.entity, span.score) for leaf in leaves for span in leaf.spans]
    outcome.characters = sum(len(leaf.text) for leaf in leaves)
    if row.keys() == {"text"}:
        outcome.spans_of_text = leaves[0].spans if leaves else []


def _check_kept(kept: Sequence[Leaf], leaves: Sequence[Leaf], detector: Detector) -> None:
    """Hold a record back whose field names or safe fields hold what cannot be an id or a label."""
    people = {
        name
        for leaf in leaves
        for span in leaf.spans
        if span.entity == "PERSON"
        for name in name_tokens(leaf.text[span.start : span.end])
    }
    for leaf in kept:
        for span in leaf.spans:
            surface = leaf.text[span.start : span.end]
            if span.entity == "PERSON":
                hit = is_full_name(surface) or bool(name_tokens(surface) & people)
            else:
                hit = span.entity in UNMISTAKABLE | detector.user_entities and not surface.isdigit()
            if hit and leaf.kept == FIELD_NAME:
                raise HeldBackError(f"{FIELD_NAME} holds personal data ({span.entity}); rename it")
            if hit:
                raise HeldBackError(f"{leaf.kept} holds {span.entity}; taken out of deid.safe_fields, it is scrubbed")


def _check_scripts(leaves: Sequence[Leaf], language: str) -> None:
    """Hold a record back that has words left in a script that no recognizer reads."""
    for leaf in leaves:
        left = leaf.view()[0] if leaf.spans else leaf.text
        if foreign_words(left, language):
            raise HeldBackError(f"holds words in a script that {language} does not use")


def _put(row: Any, path: tuple[str | int, ...], text: str) -> None:
    for part in path[:-1]:
        row = row[part]
    number = isinstance(row[path[-1]], int) and re.fullmatch(r"-?[1-9]\d*", text)
    row[path[-1]] = int(text) if number else text


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(part for part in path if isinstance(part, str))


def _named(error: Exception) -> str:
    return f"{type(error).__name__} while scrubbing"
