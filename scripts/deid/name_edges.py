"""Where a name begins and ends: what only leads to it comes off; initials, particles and family names are taken in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TypeAlias

from scripts.deid.languages import function_words, no_name, vocabulary
from scripts.deid.names import (
    BESIDE_NAMES,
    PARTICLES,
    SURE,
    family_names,
    given_names,
    is_name,
    is_part_of_name,
    local_names,
    names_of,
)
from scripts.deid.spans import Span

_WORD = re.compile(r"[^\s,;:]+")
_NEXT = re.compile(r"(?P<gap>[ \u00a0]|-)(?P<word>[^\W\d_][\w'’-]*)(?P<dot>\.?)")
_PREVIOUS = re.compile(r"(?P<word>[^\W\d_][\w'’-]*)(?P<dot>\.?)(?P<gap>[ \u00a0]|-)\Z")
_OP_DEN = re.compile(r"op(?= (?:de[nr]?|het) [^\W\d_a-zß-öø-ÿ])")
# Words that belong to the name they stand before.
_ROLE = re.compile(
    r"(?i:aunt|aunt(?:ie|y)|uncle|grand?dad|grandma|grandpa|granny|nan|nana|nonna|cousin)|RN|LPN|Sgt|Cpl|Lt|Capt|Cllr|Rev|Pastor|Imam|Rabbi|Coach|PC|Nurse|Sister|Brother"
)
_LEFT_CUE = re.compile(r"(?<=\w )(?:to|for|from|with|by|name is|am|pay|called|named) $")
# What German family names end in, and few nouns.
_FAMILY = re.compile(
    r"(?:mann|berg|burg|feldt?|stein|bach|sen|ens|ski|sky|ow|m[ae][iy]e?r|hof+|bauer|müller|huber|schmidt?|beck|brecht|har[dt]t?|ing|inger|einer"
    r"|richs?|wald|thal|ahl|ack|ick|ock|elt|olt|ietz|öhle|ühl|ohr|ers|els|eck|gen|vogel|wirth|kamp|dorff?|baum|horst|mer|ler|bold)\Z"
)
_LOGIN_START = re.compile(r"(?<![\w.@/-])[a-z]{1,20}[._]\Z")
_CAPITALISED = re.compile(r"(?<![\w@.-])[^\W\d_a-zß-öø-ÿ][a-zß-öø-ÿ][\w'’-]*(?![\w@-])")
_LONGEST_JOINT = 16
_CLOSES = re.compile(r"[.!]?\s*(?:\n|\Z)")
_LOGIN_END = re.compile(r"_[a-z0-9]{1,20}(?![\w.(=])")
_TWO = re.compile(r"(?P<first>[^\W\d_]{2,})\s(?:and|und|et|y|e|en|&)\s(?P<second>[^\W\d_]{2,})(?:\s.+)?")
_LAST_WORD = re.compile(r"\s+([a-zß-öø-ÿ][\w'’-]*|\d[\d.,/]*)\W*$")
_LEADING = re.compile(
    r"^(?:(?:and|or|to|of|in|on|at|from|for|with|by|the|a|an|is|was|hi|hello|hey|dear|ask|tell|call|cc|thanks?|thx|from:|to:)\s+)+",
    re.I,
)


@cache
def _leading(language: str) -> re.Pattern[str]:
    """Return what a model takes for the beginning of a name and is a greeting, a day or a relative."""
    if language == "en":
        return _LEADING
    lead = vocabulary(language)
    kinds = "|".join(lead[kind] for kind in ("greeting", "farewell", "days", "and"))
    titles = rf"(?!(?:{lead['title']})[ ])"  # `Fr. Engel` is no Friday
    return re.compile(rf"(?i)(?:{titles}(?:{kinds})\b[,!.]?(?:\s+|$)|(?:{lead['kin']})\s+(?=\w))+")


@cache
def _pattern(language: str, *kinds: str) -> re.Pattern[str]:
    """Return a pattern of the words of some kinds in languages.yaml."""
    return re.compile(rf"(?i)(?:{'|'.join(vocabulary(language)[kind] for kind in kinds)})")


@cache
def _possessive(language: str) -> re.Pattern[str]:
    return re.compile(rf"(?i)\b(?:{vocabulary(language)['my']})\s\Z")


def _is_spoken_of(text: str, word: re.Match[str], language: str) -> bool:
    """Say whether a word is an elder of whom the sentence speaks and who is not addressed: `ihren Onkel Anton`."""
    elder = _pattern(language, "elders").fullmatch(word[0])
    return bool(elder and _possessive(language).search(text, max(0, word.start() - 10), word.start()))


def trim_names(text: str, spans: Sequence[Span], language: str = "en") -> list[Span]:
    """Take off the ends of names what is no part of them."""
    if language != "en":
        spans = [part for span in spans for part in _between_days(text, span, language)]
        spans = [_without_words(text, span, language) for span in spans]
    spans = [part for span in spans for part in _couple(text, span)]
    spans = [_without_small_ends(text, span, language) if span.entity == "PERSON" else span for span in spans]
    return [span for span in spans if span.start < span.end]


def _without_small_ends(text: str, span: Span, language: str) -> Span:
    """Take off a greeting before a name, and the words in small letters after it."""
    leading = _leading(language).match(text, span.start, span.end)
    start, end = leading.end() if leading else span.start, span.end
    cased = text[start : start + 1].isupper() or (language != "en" and not text[start:end].islower())
    while cased and (last := _LAST_WORD.search(text, start, end)) and not _ends_a_name(last[1], language):
        end = last.start()
    if language != "en" and text[start:end].islower() and is_name(text[start:end].split()[0]):
        while (last := _LAST_WORD.search(text, start, end)) and (last[1] in PARTICLES or not is_part_of_name(last[1])):
            end = last.start()  # `jonas mandou`
    return span._replace(start=start, end=end)


def _ends_a_name(word: str, language: str) -> bool:
    """Say whether a word in small letters may end a name that has capitals."""
    if language == "en":
        return is_name(word)
    small = word in PARTICLES or word in function_words(language) or len(word) < 5
    return language != "de" and word in family_names() and not small


def _without_words(text: str, span: Span, language: str) -> Span:
    """Take off the ends of a name or place what heads a form and, of a name, what leads to it in its sentence."""
    if span.entity not in ("PERSON", "LOCATION", "ORGANIZATION", "STREET_ADDRESS"):
        return span
    words = _without_heads([*_WORD.finditer(text, span.start, span.end)], language)
    if span.entity == "PERSON":
        shouted = text[span.start : span.end].isupper()
        words = _without_phrase(words, language)
        words = _without_small_words(text, words, language)
        words = _without_function_words(words, span.score, language)
        if len(words) > 1 and _is_spoken_of(text, words[0], language):
            words = words[1:]
        if len(words) > 1 and shouted:
            words = words[: _length_of_name([word[0] for word in words], language)]
        words = _without_office(words, language)
    elif span.entity != "STREET_ADDRESS":
        while words and words[0][0] not in PARTICLES and words[0][0] in function_words(language):
            words = words[1:]
    if not words:
        return span._replace(end=span.start)
    return span._replace(start=words[0].start(), end=words[-1].end())


Words: TypeAlias = Sequence[re.Match[str]]


def _without_heads(words: Words, language: str) -> Words:
    """Take off both ends what heads a form: `Rechnungsnummer`, `Betreff`."""
    heads = no_name(language)
    inner = [n for n, word in enumerate(words) if not heads.fullmatch(word[0]) or is_part_of_name(word[0])]
    return words[inner[0] : inner[-1] + 1] if inner else ()


def _without_phrase(words: Words, language: str) -> Words:
    """Take off the phrase that leads to a given name or a title: `Anruf von Hr. Kuhn`."""
    title = _pattern(language, "title", "elders")
    if not words or not words[0][0].istitle() or title.fullmatch(words[0][0]):
        return words
    for n in range(len(words) - 1, 1, -1):
        begins = words[n][0].casefold() in given_names() or title.fullmatch(words[n][0])
        if begins and words[n - 1][0] in PARTICLES and not any(is_name(word[0]) for word in words[: n - 1]):
            return words[n:]
    return words


def _without_small_words(text: str, words: Words, language: str) -> Words:
    """Take off the small words before the first capital; a title and the particles right before it belong to the name."""
    first = next((index for index, word in enumerate(words) if word[0][0].isupper()), None)
    if first is None:
        return (
            words if any(word[0] not in PARTICLES and word[0] not in function_words(language) for word in words) else ()
        )
    particles = 0
    while particles < first and words[first - particles - 1][0] in PARTICLES:
        particles += 1
    kept = first - particles
    length = _length_of_title(words[:kept], language)
    if kept and not length and words[first][0].casefold() in given_names():
        kept, length = first, _length_of_title(words[:first], language)  # `inloggen van Marloes`
    while length and not _is_spoken_of(text, words[kept - length], language):
        kept -= length  # `signor Everardo Lotti`, but `suo zio Everardo`
        length = _length_of_title(words[:kept], language)
    return words[kept:] if words[0][0].islower() and words[0][0].isalpha() else words


def _without_function_words(words: Words, score: float, language: str) -> Words:
    """Take off capitalised function words and relatives before a name: `Sie Henning`, `Kunde Plog`; alone they are none."""
    while words and (score < SURE or len(words) > 1) and words[0][0].istitle() and _is_common(words[0][0], language):
        if words[0].string[words[0].end() :][:1] == ",":  # `Neveu, Claire`
            break
        words = words[1:]
    return words


def _is_common(word: str, language: str) -> bool:
    """Say whether a word of a sentence or a form is no part of a name that it stands before."""
    if _pattern(language, "title", "elders").fullmatch(word) or word.casefold() in PARTICLES:
        return False
    if no_name(language).fullmatch(word) or _pattern(language, "kin", "people").fullmatch(word):
        return True
    return word.casefold() in function_words(language) and word.casefold() not in names_of(language)


def _without_office(words: Words, language: str) -> Words:
    """Take off where a German works after a title and a family name: `Herr Plog von der Hausverwaltung`."""
    if language != "de" or len(words) < 4 or not _pattern("de", "title").fullmatch(words[0][0]):
        return words
    family = words[1][0].casefold() not in given_names()
    office = words[2][0] in PARTICLES and not is_part_of_name(words[-1][0])
    return words[:2] if family and office else words


def _length_of_title(words: Words, language: str) -> int:
    """Return how many words at the end are a title: `la familia`, `signor`."""
    title = _pattern(language, "title", "elders")
    return next((n for n in (2, 1) if title.fullmatch(" ".join(word[0] for word in words[-n:])) and len(words) >= n), 0)


def _length_of_name(words: Sequence[str], language: str) -> int:
    """Return how many words are of a name in capitals, after which others may follow: `FRAU EVA LINDNER KOMMT`.

    A given name that no listed name follows is taken to have a family name.
    """
    first = next((n for n, word in enumerate(words) if not _pattern(language, "title", "elders").fullmatch(word)), 0)
    listed = [n for n, word in enumerate(words) if n >= first and is_name(word)]
    if not listed:
        return max(first + 1, min(len(words), 2))
    alone = listed == [first] and words[first].casefold() in given_names()
    return listed[-1] + 1 + alone


def _between_days(text: str, span: Span, language: str) -> Iterator[Span]:
    """Cut a name before each day of the week in it: `Montag Gesine, Dienstag Falk`."""
    start = span.start
    if span.entity == "PERSON":
        for day in re.finditer(rf"(?i),\s(?={vocabulary(language)['days']}\b)", text[span.start : span.end]):
            yield span._replace(start=start, end=span.start + day.start())
            start = span.start + day.end()
    yield span._replace(start=start)


def _couple(text: str, span: Span) -> Iterator[Span]:
    """Part the two of `Anna and Peter Schmidt`, so that each of them is one person."""
    pair = _TWO.fullmatch(text, span.start, span.end) if span.entity == "PERSON" else None
    if pair and pair["first"].casefold() in given_names() and pair["second"].casefold() in given_names():
        yield span._replace(end=pair.end("first"))
        yield span._replace(start=pair.start("second"))
    else:
        yield span


def extend_names(text: str, spans: Sequence[Span], language: str = "en") -> list[Span]:
    """Let a name that was found in part take in the capitalised words, initials and particles beside it."""
    taken = [(span.start, span.end, span.entity) for span in spans]
    extended = []
    for span in spans:
        if span.entity == "PERSON" and any(c.isalpha() for c in text[span.start : span.end]):
            span = span._replace(
                start=_grow_left(text, span, taken, language), end=_grow_right(text, span, taken, language)
            )
            span = _whole_login(text, span)
        extended.append(span)
    return extended


def names_in_row(text: str, spans: Sequence[Span], language: str) -> list[Span]:
    """Return who stands in a row with people who were found: `Finja, Ole und Mika`, `dein Torben und deine Levke`."""
    found: list[Span] = []
    people = {(span.start, span.end) for span in spans if span.entity == "PERSON"}
    taken = [(span.start, span.end) for span in spans]
    for _ in range(3 if people and language != "en" else 0):
        starts, ends = {start for start, _ in people}, {end for _, end in people}
        fresh = [
            word.span()
            for word in _CAPITALISED.finditer(text)
            if _stands_in_row(text, word, starts, ends, language)
            and not any(start < word.end() and word.start() < end for start, end in taken)
        ]
        if not fresh:
            break
        people, taken = {*people, *fresh}, [*taken, *fresh]
        found += [Span(start, end, "PERSON", 0.6) for start, end in fresh]
    return found


def _stands_in_row(text: str, word: re.Match[str], starts: set[int], ends: set[int], language: str) -> bool:
    """Say whether a capitalised word stands between two people, or beside one and is a name or joined by `and`."""
    joints = _row(language).finditer(text, max(0, word.start() - _LONGEST_JOINT), word.start())
    before = next((joint for joint in joints if joint.end() == word.start() and joint.start() in ends), None)
    after = _row(language).match(text, word.end())
    after = after if after and after.end() in starts else None
    if not (before or after) or _is_common(word[0], language) or _pattern(language, "title", "days").fullmatch(word[0]):
        return False
    if before and after:
        return True
    folded = word[0].casefold()
    joined = language != "de" and any(joint["and"] for joint in (before, after) if joint)
    closing = before and before["my"] and _CLOSES.match(text, word.end())
    return bool(is_name(folded) or folded in local_names(language) or joined or closing) and folded not in BESIDE_NAMES


@cache
def _row(language: str) -> re.Pattern[str]:
    """Return what stands between the names of a row."""
    lead = vocabulary(language)
    return re.compile(rf"(?i)(?:,\s|(?P<and>,?\s(?:{lead['and']})\s))(?:(?P<my>{lead['my']})\s|[oa]\s)?")


def _whole_login(text: str, span: Span) -> Span:
    """Let a name within h.okafor or okafor_h take in the rest of the word."""
    start, end = span.start, span.end
    if before := _LOGIN_START.search(text, max(0, start - 30), start):
        start = before.start()
    if after := _LOGIN_END.match(text, end):
        end = after.end()
    return span._replace(start=start, end=end)


def _grow_right(text: str, span: Span, taken: Sequence[tuple[int, int, str]], language: str) -> int:
    end, shown, capitals = span.end, span.end, text[span.start : span.end].isupper() and span.end - span.start > 2
    lower = text[span.start : span.end].islower()
    for _ in range(4):
        match = _NEXT.match(text, end)
        if not match:
            break
        word = match["word"]
        folded = word.casefold()
        others = [other for other in taken if other[0] <= match.start("word") < other[1] and other[:2] != span[:2]]
        if others:  # of `Heidi van der Vlist` a model may take the end for a firm or a place
            return others[0][1] if end > shown and others[0][2] in ("ORGANIZATION", "LOCATION") else shown
        if folded in PARTICLES or _OP_DEN.match(text, match.start("word")):
            end = match.end("word")
            continue
        initial = len(word) == 1 and word.isupper() and (match["dot"] or capitals)
        between = text[shown:end].strip()
        noble = between == "von" or (language == "de" and not between and _FAMILY.search(word) is not None)
        named = (
            word[0].isupper()
            and folded not in BESIDE_NAMES
            and (
                language == "en" or (language != "de" and not capitals) or is_name(word) or noble
            )  # German nouns have capitals
            and (language == "en" or not no_name(language).fullmatch(word))
            and (capitals or not word.isupper() or initial or len(word) == 1)
        )
        if lower:
            named = word.islower() and folded in family_names()
            initial = len(word) == 1 and not re.match(r"\s?\w", text[match.end() : match.end() + 2])
        if not (initial or named) or (len(word) == 1 and not initial):
            break
        if text[match.end() : match.end() + 1] in ("(", "=", "_"):
            break
        end = shown = match.end() if initial and match["dot"] else match.end("word")
    return shown


def _grow_left(text: str, span: Span, taken: Sequence[tuple[int, int, str]], language: str) -> int:
    start, shown = span.start, span.start
    lower = text[span.start : span.end].islower()
    for _ in range(3):
        match = _PREVIOUS.search(text, max(0, start - 30), start)
        if not match or lower:
            break
        word = match["word"]
        if any(begin < match.end("word") and match.start("word") < stop for begin, stop, _ in taken):
            break
        folded = word.casefold()
        if folded in PARTICLES and word.islower():
            start = match.start("word")
            continue
        initial = len(word) == 1 and word.isupper() and bool(match["dot"])
        if language != "en" and _leading(language).fullmatch(word + " "):
            break
        if language != "en" and _is_common(word, language):
            break
        if _ROLE.fullmatch(word) and not start < span.start:
            return match.start("word")
        led = (
            word.istitle()
            and folded not in BESIDE_NAMES
            and _LEFT_CUE.search(text, max(0, match.start() - 12), match.start())
        )
        if not (initial or (word[0].isupper() and (is_name(word) or led))):
            break
        start = shown = match.start("word")
    return shown
