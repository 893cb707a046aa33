"""Names where a language model misses them: speakers, lists, lower case, capitals, and names that were found in part.

What counts as a name comes from Faker's lists of some 90 countries; what is a word as well is left out.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from scripts.deid.languages import function_words, leads_to_name, no_name, vocabulary
from scripts.deid.spans import Span
from scripts.deid.words import words

WORDS = words("everyday")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_CAPITAL = r"[^\W\d_a-zà-öø-ÿ][\w'’-]*"
# Words that lead to a name in a text whose author does not care for capitals; those of INTRODUCTION lead to little else.
TITLE = re.compile(r"(?i)(?:mr|mrs|ms|miss|mx|dr|prof|sir|nurse|doctor)\b")
_INTRODUCED = (
    r"(?:my|your|his|her|the|full|first|last) name(?:'s| is|:)|my names?|ask(?: for)?|tell|told|calls? me|met|mr|mrs|ms|miss|mx|dr|prof|sir|nurse|doctor|sister|brother|bro|aunt|auntie|aunty"
    r"|uncle|cousin|mum|mom|dad|nan|gran|grandma|grandpa|son|daughter|husband|wife|friend|mate|colleague|boss|neighbour|neighbor|patient|witness|agent|signed(?: for)? by|cc|hi|hiya|hey|hello|yo|oi|dear|love|coach|rip"
)
_LED_TO = r"this is|it'?s|i'?m|i am|im|call|from|to|for|with|and|by|meet|partner|manager|customer|pt|caller|driver|witnesses|thx|thanks|ty|is|old|little|big|did|does|has|@"
INTRODUCTION = re.compile(rf"(?i)\b(?:{_INTRODUCED})\b\.?,?\s{{1,2}}$")
CUE = re.compile(rf"(?i)\b(?:{_INTRODUCED}|{_LED_TO})\b\.?,?\s{{1,2}}$")
# Before the colon of a speaker: a time, quotation marks, list marks, a bracket.
_SPEAKER = re.compile(
    r"(?m)^[\s>*_#-]{0,6}(?:[\[(]?\d[\d:.,/ T-]{2,20}(?:[AaPp][Mm])?[\])]?\s*[-–]?\s*)?[<*_]{0,2}"
    r"(?P<name>@?[^\W\d_][\w.'’-]{1,24}(?: [^\W\d_][\w.'’-]{0,24}){0,3})(?P<role> ?\([\w ]{2,20}\))?[>*_]{0,2}\s?(?::[*_]{0,2}(?=\s|$)|(?<=>)\s)"
)
_NICK = re.compile(r"(?m)^(?:\[?\d\d?:\d\d(?::\d\d)?\]?\s)?<[@+ ]?(?P<name>[^\W\d][\w.|`-]{1,24})>\s(?=\S)")
_LISTED = re.compile(
    rf"(?<![\w,] )(?<![\w-])(?P<last>{_CAPITAL}(?:[ -]{_CAPITAL})?),\s?(?P<first>{_CAPITAL}(?:[ ]{_CAPITAL}|[ ][^\W\d_]\.?(?!\w)){{0,2}})(?=\s*(?:$|[\n;:()/|<—–,.]|\d|-|is\b|was\b|has\b|says?\b))"
)
# Firms named after people: Davis, Reynolds and Williamson; Weeks-Rivas.
_FIRM = re.compile(
    r"\b(?P<names>[^\W\d_][\w'’]+(?:-[^\W\d_][\w'’]+|(?:, [^\W\d_][\w'’]+){1,3},? (?:and|&) [^\W\d_][\w'’]+| (?:&|and) Sons))\b"
)
_INITIALS = re.compile(r"\b(?:[A-Z]\.[ -]?){1,3}(?P<last>[^\W\d_a-zß-öø-ÿ][\w'’-]{2,})\b")
_PAIR = re.compile(r"\b(?P<first>[^\W\d_a-zß-öø-ÿ][^\W\d_A-Z]+) (?P<last>[^\W\d_a-zß-öø-ÿ][^\W\d_A-Z]+)\b")
_SLASHED = re.compile(r"\b(?P<name>[A-Z][A-Z'-]{1,24}/[A-Z][A-Z ]{1,30}(?: (?:MRS?|MS|MISS|MSTR|DR|CHD))?)\b")
_PARTICLES = words("particles")
_OP_DEN = re.compile(r"op(?= de[nr]? [^\W\d_a-zß-öø-ÿ])")
_NEXT = re.compile(r"(?P<gap>[ \u00a0]|-)(?P<word>[^\W\d_][\w'’-]*)(?P<dot>\.?)")
_PREVIOUS = re.compile(r"(?P<word>[^\W\d_][\w'’-]*)(?P<dot>\.?)(?P<gap>[ \u00a0]|-)$")
# Words that belong to the name they stand before.
_ROLE = re.compile(
    r"(?i:aunt|aunt(?:ie|y)|uncle|grand?dad|grandma|grandpa|granny|nan|nana|nonna|cousin)|RN|LPN|Sgt|Cpl|Lt|Capt|Cllr|Rev|Pastor|Imam|Rabbi|Coach|PC|Nurse|Sister|Brother"
)
_LEFT_CUE = re.compile(r"(?<=\w )(?:to|for|from|with|by|name is|am|pay|called|named) $")
_NOT_AFTER = words("beside_names")


@cache
def given_names() -> frozenset[str]:
    """Return given names in small letters, without those that are everyday words."""
    return _listed("first_names") - WORDS


@cache
def family_names() -> frozenset[str]:
    """Return family names in small letters, without those that are everyday words."""
    return _listed("last_names") - WORDS


@cache
def _english_names() -> frozenset[str]:
    return frozenset(name for name in _listed("first_names", "en_") - WORDS if len(name) >= 3)


@cache
def _every_name() -> frozenset[str]:
    return _listed("first_names") | _listed("last_names")


def _listed(kind: str, locale: str = "") -> frozenset[str]:
    import faker.providers.person as package

    names: set[str] = set()
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith(locale):
            provider: Any = importlib.import_module(f"{package.__name__}.{module.name}").Provider
            for ending in ("", "_male", "_female", "_nonbinary"):
                found = getattr(provider, kind + ending, ())
                if not isinstance(found, property):
                    names.update(name.casefold() for name in found if isinstance(name, str) and len(name) > 1)
    return frozenset(names)


def is_name(word: str) -> bool:
    """Say whether a word alone is a given or family name and nothing else."""
    folded = word.casefold()
    return folded in given_names() or folded in family_names()


def is_part_of_name(word: str) -> bool:
    """Say whether a word may stand within a name, even if it is an everyday word, a particle or an initial."""
    return len(word) == 1 or word.casefold() in _every_name() or word.casefold() in _PARTICLES


def is_full_name(text: str) -> bool:
    """Say whether a text is a name of two to four words, one of which is on the lists."""
    words = _WORD.findall(text)
    return 2 <= len(words) <= 4 and any(word.casefold() in given_names() for word in words)


def find_names(text: str, language: str = "en") -> list[Span]:
    """Return names that their place in the text gives away and, in English, given names that nothing else could be."""
    alone = {*_lone(text), *_short(text)} if language == "en" else {*_abroad(text, language)}
    return sorted({*_speakers(text, language), *_nicks(text), *_lists(text, language), *alone})


def _speakers(text: str, language: str) -> Iterator[Span]:
    matches = list(_SPEAKER.finditer(text))
    own = function_words(language) if language != "en" else frozenset()
    for match in matches:
        words = re.split(r"[\W\d_]+", match["name"])
        words = [word for word in words if word]
        if (
            words
            and any(is_name(word) and len(word) >= 3 for word in words)
            and (match["name"][-1].isdigit() or not match["name"].islower() or all(map(is_part_of_name, words)))
            and not any(word.casefold() in _NOT_AFTER | own for word in words)
        ):
            yield Span(*match.span("name"), "PERSON", 0.6)


def _nicks(text: str) -> Iterator[Span]:
    """Yield who writes in a chat that shows each writer as <nick>, be it a name or not."""
    matches = list(_NICK.finditer(text))
    if len(matches) > 1 and "</" not in text:
        for match in matches:
            yield Span(*match.span("name"), "PERSON", 0.7)


def _lists(text: str, language: str) -> Iterator[Span]:
    own = function_words(language) if language != "en" else frozenset()
    for match in _LISTED.finditer(text):
        last, first = _WORD.findall(match["last"]), _WORD.findall(match["first"])
        known = any(word.casefold() in given_names() for word in first)
        if known and not any(word.casefold() in WORDS | _NOT_AFTER | own for word in [*last, first[0]]):
            yield Span(match.start(), match.end(), "PERSON", 0.6)
    for match in _FIRM.finditer(text):
        words = [word for word in re.split(r"\W+|\band\b", match["names"]) if word and word != "Sons"]
        folded = [word.casefold() for word in words]
        if any(map(is_name, words)) and all(word in _every_name() and len(word) >= 3 for word in folded):
            yield Span(*match.span(), "PERSON", 0.5)
    for match in _INITIALS.finditer(text):
        if is_name(match["last"]):
            yield Span(*match.span(), "PERSON", 0.6)
    for match in _SLASHED.finditer(text):
        if any(is_name(word) for word in _WORD.findall(match["name"])):
            yield Span(match.start(), match.end(), "PERSON", 0.6)


def _lone(text: str) -> Iterator[Span]:
    for match in _WORD.finditer(text):
        word = match[0]
        if len(word) < 3 or (
            text[match.start() - 1 : match.start()] in ("_", ".", "/", "\\", "$", "&", "=") and match.start()
        ):
            continue
        after = text[match.end() : match.end() + 1]
        if after in ("_", "(", "=", "[") or after.isdigit():
            continue
        folded = word.casefold()
        cued = bool(CUE.search(text, max(0, match.start() - 24), match.start()))
        if word[0].isupper():
            found = (
                folded in given_names()
                and (word.isupper() or word[1:].islower())
                and (len(word) >= 4 or folded in _english_names())
            )
        else:
            found = (
                word.islower() and folded in (given_names() if cued else _english_names()) and (cued or len(word) >= 4)
            )
        if found:
            yield Span(*match.span(), "PERSON", 0.5)


@cache
def _local_names(language: str) -> frozenset[str]:
    """Return the given names of the countries of a language that are no words of it."""
    return _listed("first_names", f"{language}_") - set(vocabulary(language)["everyday"].split("|")) - WORDS


# Within a Dutch sentence only a family name begins with a capital Van or De.
_TUSSENVOEGSEL = re.compile(
    r"(?<=[a-zß-öø-ÿ,;] )(?P<name>(?:Van(?: den?| der| 't)?|De|Den|Ter|Ten|Vander|Op de[n]?) [A-Z][\w'’-]+(?:-[A-Z][\w'’]+)?)"
)


def _abroad(text: str, language: str) -> Iterator[Span]:
    """Yield given names in other languages: after a greeting or a title, capitalised within a sentence (but in German), or
    where the author writes no capitals.
    """
    led, local, own = leads_to_name(language), _local_names(language), function_words(language)

    def within(match: re.Match[str]) -> bool:
        """Say whether a capitalised word does not begin its sentence."""
        before = text[max(0, match.start() - 3) : match.start()]
        return match[0].istitle() and language != "de" and re.search(r"[^\W_][,;:]? $", before) is not None

    capitals = re.search(r"(?<!\w)[^\W\d_a-zß-öø-ÿ][a-zß-öø-ÿ]", text)
    if language == "nl":
        yield from (Span(*match.span("name"), "PERSON", 0.6) for match in _TUSSENVOEGSEL.finditer(text))
    for match in _WORD.finditer(text):
        word = match[0]
        if len(word) < 3 or word.casefold() not in given_names() or word.casefold() in own:
            continue
        cased = word.istitle() or not capitals
        first = (
            language == "nl"
            and word.istitle()
            and word.casefold() in local
            and len(word) >= 4
            and text[match.end() :][:2].strip().islower()
        )
        found = within(match) or first or (cased and led.search(text, max(0, match.start() - 24), match.start()))
        if found or (not capitals and word in local and len(word) >= 4):
            yield Span(*match.span(), "PERSON", 0.6)
    for pair in _PAIR.finditer(text) if language != "de" else ():
        both = [pair["first"].casefold(), pair["last"].casefold()]
        if within(pair) and any(map(is_name, both)) and not any(w in own or w in _NOT_AFTER for w in both):
            yield Span(*pair.span(), "PERSON", 0.6)


# Names of two or three letters are too common to count by themselves: Li, Bo, Kim, Raj. What stands around them decides.
_SHORT = re.compile(r"(?<![\w@./'’-])(?P<name>[^\W\d_]{2,3})(?![\w@/(=-]|['’](?!s\b)|\.\w)")
_SHORT_BEFORE = re.compile(
    r"(?i)(?:\b(?:assigned to|assignee|owner|contact|reviewed[ -]by|signed[ -]off[ -]by|author|attendees|employee|attn|from|to|cc|name|agent|nurse)\s?:\s?"
    r"|\b(?:thanks|thank you|thx|cheers|best|regards|wishes|love|yours|sincerely|ta),?\s?\n+|\b(?:contact|employee|colleague|tenant|student|page|ping)\s)$"
)
_SHORT_AFTER = re.compile(
    r"(?:['’]s)?\s(?:said|says|asked|asks|called|rang|rings|phoned|told|tells|wrote|writes|sent|sends|signed|signs|replied|emailed|texted|confirmed|agreed|reported|booked|paid|covers?|took|from (?:accounts|finance|sales|hr))\b"
)
_SHORT_DOES = re.compile(
    r"\s(?:is|was|will|has|had|said|says|isn't|won't|can't|can|could|wants|needs|thinks|knows|just)\b"
)


def _short(text: str) -> Iterator[Span]:
    speakers = {match.span("name") for match in _SPEAKER.finditer(text)}
    several = len(speakers) > 1
    for match in _SHORT.finditer(text):
        word, before = match["name"], max(0, match.start() - 24)
        if word.casefold() not in _every_name() or not (word.islower() or word.istitle()):
            continue
        led = INTRODUCTION.search(text, before, match.start())
        if word.islower():
            found = bool(led and word not in WORDS) or (several and match.span() in speakers)
            found = found or (word in _english_names() and _SHORT_DOES.match(text, match.end()) is not None)
        else:
            found = bool(
                led
                or _SHORT_BEFORE.search(text, before, match.start())
                or _SHORT_AFTER.match(text, match.end())
                or (several and match.span() in speakers)
                or (
                    word.casefold() in given_names()
                    and len(word) == 3
                    and text[before : match.start()][-2:-1].islower()
                )
            )
        if found and word.casefold() not in words("beside_names"):
            yield Span(*match.span(), "PERSON", 0.55)


_LOGIN_START = re.compile(r"(?<![\w.@/-])[a-z]{1,20}[._]$")
_LOGIN_END = re.compile(r"_[a-z0-9]{1,20}(?![\w.(=])")
_TWO = re.compile(r"(?P<first>[^\W\d_]{2,})\s(?:and|und|et|y|e|en|&)\s(?P<second>[^\W\d_]{2,})(?:\s.+)?")
_LAST_WORD = re.compile(r"\s+([a-zß-öø-ÿ][\w'’-]*|\d[\d.,/]*)\W*$")
_LEADING = re.compile(
    r"^(?:(?:and|or|to|of|in|on|at|from|for|with|by|the|a|an|is|was|hi|hello|hey|dear|ask|tell|call|cc|thanks?|thx|from:|to:)\s+)+",
    re.I,
)


@cache
def _leading(language: str) -> re.Pattern[str]:
    """Return what a model takes for the beginning of a name and is a greeting."""
    if language == "en":
        return _LEADING
    lead = vocabulary(language)
    kinds = "|".join(lead[kind] for kind in ("greeting", "farewell", "days", "and"))
    return re.compile(rf"(?i)(?:(?:{kinds})\b[,!.]?(?:\s+|$)|(?:{lead['kin']})\s+(?=\w))+")


@cache
def _relative(language: str) -> re.Pattern[str]:
    """Return relatives and others whose name may follow; the word is no part of it."""
    return re.compile(rf"(?i)(?:{vocabulary(language)['kin']})")


_KIN = re.compile(
    r"(?i)(?:oma|opa|tante|onkel|oom|oncle|tonton|mamie|papi|t[ií][ao]|abuel[ao]|zi[ao]|nonn[ao]|av[óô])\s"
)
_POSSESSIVE = re.compile(
    r"(?i)\b(?:(?:[mds]ein|ihr|unser|euer|eur)(?:e[mnrs]?)?|[mts](?:on|a|es)|[nv]otre|mi|tu|su|nuestr[ao]|[mts](?:io|uo|ia|ua)|[nv]ostr[ao]"
    r"|[mts]eu|minha|noss[ao]|mijn|jouw|je|zijn|haar|hun|onze|ons)\s$"
)


def _is_kin(text: str, start: int) -> bool:
    """Say whether a relative stands here whom the sentence speaks of and does not address: `ihren Onkel Anton`."""
    return bool(_KIN.match(text, start)) and bool(_POSSESSIVE.search(text, max(0, start - 10), start))


@cache
def _title(language: str) -> re.Pattern[str]:
    """Return the titles that belong to the name they stand before."""
    return re.compile(rf"(?i)(?:{vocabulary(language)['title']})")


def trim_names(text: str, spans: Sequence[Span], language: str = "en") -> list[Span]:
    """Take the small words off the ends of names."""
    trimmed = []
    if language != "en":
        spans = [part for span in spans for part in _between_days(text, span, language)]
        spans = [_without_words(text, span, language) for span in spans]
    spans = [part for span in spans for part in _couple(text, span)]
    for span in spans:
        if span.entity == "PERSON":
            surface = text[span.start : span.end]
            leading = _leading(language).match(surface)
            start, end = span.start + (leading.end() if leading else 0), span.end
            while (
                text[start : start + 1].isupper()
                and (last := _LAST_WORD.search(text, start, end))
                and not is_name(last[1])
            ):
                end = last.start()
            if language != "en" and text[start:end].islower() and is_name(text[start:end].split()[0]):
                while (last := _LAST_WORD.search(text, start, end)) and not is_part_of_name(last[1]):
                    end = last.start()  # `jonas mandou`
            span = span._replace(start=start, end=end)
        trimmed.append(span)
    return [span for span in trimmed if span.start < span.end]


def _without_words(text: str, span: Span, language: str) -> Span:
    """Take off the ends of a name or place what heads a form, and before a capital the small words of the sentence."""
    if span.entity not in ("PERSON", "LOCATION", "ORGANIZATION", "STREET_ADDRESS"):
        return span
    words = list(re.finditer(r"[^\s,;:]+", text[span.start : span.end]))
    heads = no_name(language)
    while words and heads.fullmatch(words[0][0]) and not is_part_of_name(words[0][0]):
        words.pop(0)
    while words and heads.fullmatch(words[-1][0]) and not is_part_of_name(words[-1][0]):
        words.pop()
    if span.entity == "PERSON" and any(word[0][0].isupper() for word in words):
        particles = 0  # those right before the capital belong to the name
        first = next(index for index, word in enumerate(words) if word[0][0].isupper())
        while particles < first and words[first - particles - 1][0] in _PARTICLES:
            particles += 1
        kept, title = first - particles, _title(language)
        length = _length_of_title(words[:kept], title)
        if kept and not length and words[first][0].casefold() in given_names():
            kept, length = first, _length_of_title(words[:first], title)  # `inloggen van Marloes`
        while length and not _is_kin(text, span.start + words[kept - length].start()):
            kept -= length  # `signor Everardo Lotti`, but `suo zio Everardo`
            length = _length_of_title(words[:kept], title)
        if kept and words[0][0].islower() and words[0][0].isalpha():
            words = words[kept:]
    elif span.entity == "PERSON" and words and all(word[0] in _PARTICLES for word in words):
        words = []
    if len(words) > 1 and _is_kin(text, span.start + words[0].start()):
        words.pop(0)
    if span.entity == "PERSON" and len(words) > 1 and text[span.start : span.end].isupper():
        words = words[: _length_of_name([word[0] for word in words], language)]
    if not words:
        return span._replace(end=span.start)
    return span._replace(start=span.start + words[0].start(), end=span.start + words[-1].end())


def _length_of_title(words: Sequence[re.Match[str]], title: re.Pattern[str]) -> int:
    """Return how many words at the end are a title: `la familia`, `signor`."""
    return next((n for n in (2, 1) if title.fullmatch(" ".join(word[0] for word in words[-n:])) and len(words) >= n), 0)


def _length_of_name(words: Sequence[str], language: str) -> int:
    """Return how many words are of a name in capitals, after which others may follow: `FRAU EVA LINDNER KOMMT`.

    A given name that no listed name follows is taken to have a family name.
    """
    first = next((n for n, word in enumerate(words) if not _title(language).fullmatch(word)), 0)
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
        if folded in _PARTICLES or _OP_DEN.match(text, match.start("word")):
            end = match.end("word")
            continue
        initial = len(word) == 1 and word.isupper() and (match["dot"] or capitals)
        noble = text[shown:end].strip() == "von"
        named = (
            word[0].isupper()
            and folded not in _NOT_AFTER
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
        if folded in _PARTICLES and word.islower():
            start = match.start("word")
            continue
        initial = len(word) == 1 and word.isupper() and bool(match["dot"])
        if language != "en" and _leading(language).fullmatch(word + " "):
            break
        if language != "en" and (no_name(language).fullmatch(word) or _relative(language).fullmatch(word)):
            break
        if _ROLE.fullmatch(word) and not start < span.start:
            return match.start("word")
        led = (
            word.istitle()
            and folded not in _NOT_AFTER
            and _LEFT_CUE.search(text, max(0, match.start() - 12), match.start())
        )
        if not (initial or (word[0].isupper() and (is_name(word) or led))):
            break
        start = shown = match.start("word")
    return shown


def titled(text: str) -> str:
    """Write runs of capitals as names are written elsewhere, so that a model trained on prose can read them; offsets stay."""

    def lowered(match: re.Match[str]) -> str:
        new = "".join(word if len(word) < 2 else word[0] + word[1:].lower() for word in re.split(r"(\W+)", match[0]))
        return new if len(new) == len(match[0]) else match[0]

    return _CAPITALS.sub(lowered, text)


_CAPITALS = re.compile(r"(?<![\w-])[^\W\d_a-z][^\W\d_a-z'’-]+(?:[ ,]{1,3}(?:[^\W\d_a-z][^\W\d_a-z'’-]*))+(?![\w-])")
