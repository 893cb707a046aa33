"""Names where a language model misses them: speakers, lists, lower case, and capitals.

What counts as a name comes from Faker's lists of some 90 countries; what is a word as well is left out.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from scripts.deid.languages import function_words, leads_to_name, vocabulary
from scripts.deid.spans import Span
from scripts.deid.words import words

SURE = 0.98  # Rampart is seldom this sure of what is no name

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
PARTICLES = words("particles")
BESIDE_NAMES = words("beside_names")


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
    return len(word) == 1 or word.casefold() in _every_name() or word.casefold() in PARTICLES


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
            and not any(word.casefold() in BESIDE_NAMES or word.casefold() in own for word in words)
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
    words_too = (WORDS, BESIDE_NAMES, own, everyday_names(language))
    for match in _LISTED.finditer(text):
        last, first = _WORD.findall(match["last"]), _WORD.findall(match["first"])
        known = any(word.casefold() in given_names() for word in first)
        if known and not any(word.casefold() in listed for word in [*last, first[0]] for listed in words_too):
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
def local_names(language: str) -> frozenset[str]:
    """Return the given names of the countries of a language that are no words of it."""
    return names_of(language) - everyday_names(language) - function_words(language)


@cache
def names_of(language: str) -> frozenset[str]:
    """Return the given names of the countries of a language."""
    return _listed("first_names", f"{language}_") | {*vocabulary(language)["given"].split("|")}


@cache
def everyday_names(language: str) -> frozenset[str]:
    """Return the names that are words of a language as well."""
    return frozenset(vocabulary(language)["everyday"].split("|"))


# Within a Dutch sentence only a family name begins with a capital Van or De.
_TUSSENVOEGSEL = re.compile(
    r"(?<=[a-zß-öø-ÿ,;] )(?P<name>(?:Van(?: den?| der| 't)?|De|Den|Ter|Ten|Vander|Op de[n]?) [A-Z][\w'’-]+(?:-[A-Z][\w'’]+)?)"
)


def _abroad(text: str, language: str) -> Iterator[Span]:
    """Yield given names in other languages: after a greeting or a title, capitalised within a sentence (but in German), or
    where the author writes no capitals.
    """
    led, local, own = leads_to_name(language), local_names(language), function_words(language)

    def within(match: re.Match[str], marks: str = ",;:") -> bool:
        """Say whether a capitalised word does not begin its sentence."""
        before = text[max(0, match.start() - 3) : match.start()]
        return match[0].istitle() and language != "de" and re.search(rf"[^\W_][{marks}]? $", before) is not None

    def local_name(match: re.Match[str]) -> bool:
        """Say whether a word is a name of the language's countries: anywhere in German, else where a sentence begins."""
        after = text[match.end() : match.end() + 2]
        begins = language == "de" or after.strip().islower() or after[:1] in (",", ":")
        return match[0].istitle() and match[0].casefold() in local and begins

    capitals = re.search(r"(?<!\w)[^\W\d_a-zß-öø-ÿ][a-zß-öø-ÿ]", text)
    if language == "nl":
        yield from (Span(*match.span("name"), "PERSON", 0.6) for match in _TUSSENVOEGSEL.finditer(text))
    for match in _WORD.finditer(text):
        word, folded = match[0], match[0].casefold()
        if len(word) < 3 or (folded not in given_names() and folded not in names_of(language)):
            continue
        if folded in own:  # `aan Wil`, but `Wil je`
            if folded in names_of(language) and within(match, ",;"):
                yield Span(*match.span(), "PERSON", 0.6)
            continue
        cased = word.istitle() or not capitals
        led_to = cased and led.search(text, max(0, match.start() - 24), match.start())
        if within(match) or local_name(match) or led_to or (not capitals and word in local):
            yield Span(*match.span(), "PERSON", 0.6)
    for pair in _PAIR.finditer(text) if language != "de" else ():
        both = [pair["first"].casefold(), pair["last"].casefold()]
        if within(pair) and any(map(is_name, both)) and not any(w in own or w in BESIDE_NAMES for w in both):
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


def titled(text: str) -> str:
    """Write runs of capitals as names are written elsewhere, so that a model trained on prose can read them; offsets stay."""

    def lowered(match: re.Match[str]) -> str:
        new = "".join(word if len(word) < 2 else word[0] + word[1:].lower() for word in re.split(r"(\W+)", match[0]))
        return new if len(new) == len(match[0]) else match[0]

    return _CAPITALS.sub(lowered, text)


_CAPITALS = re.compile(r"(?<![\w-])[^\W\d_a-z][^\W\d_a-z'’-]+(?:[ ,]{1,3}(?:[^\W\d_a-z][^\W\d_a-z'’-]*))+(?![\w-])")
