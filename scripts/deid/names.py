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

from scripts.deid.spans import Span

# Names that are everyday words too: alone they are not taken for a name.
WORDS = frozenset(
    """add ago autumn alamo said says then therefore however awhile total half devil mandolin alan almond alpha among and angel angels ants april art arts asia august author baby bail baker bank banks barb bass bath
    beach bean bear beard beat bee beer bell bent berry best beta bill bird bishop bite bitten black blessing block blossom blue boss bowler boy
    branch brand brands brass brick bridge bright brook brown buck bud burger burgess burns bush butcher butler cain came can candy canyon captain car
    card carpenter carrier carry carver case cash chance charity cherry chin china chip christian chuck church cinnamon city clay clear cliff close
    cole company comfort constant contractor cook cool courtney cousin cousins crane cross cruise crystal cup curry dale dates dawn day days dean
    dear deep del dell diamond do doc dock doctor dollar don dot drew drum duke earl early earth east eden edge edit elder else eric era eve ever
    fair faith fall falls fancy farmer fast fed fee fern ferry field fields finch fine fish fleet flint floor florence flower flowers foot ford forest
    forget fox france frank freely french fresh friend frost fry fun gale garden gates gene general germany gift glass glasses gold golden good gore
    governor grace grand grant grave graves gray great green grey grill grove guard gum gun gut guy hail hair hall ham hammer hand harbor hard hare
    hart harm harmony harvest haven hay head heart heath hell hence herald herd hill hills holiday holly home honor hood hope host house hung hunt
    hunter hurt ice imo india ion iris israel ivory ivy jack jail jay jet jewel job joke jordan journey joy judge juice june junior junk just justice kale
    keen kenya key kick killer kim kind king kings kiss kit knight lady lake lamb lance lane large law lawyer lead lean leaf lee lemon less liberty
    lie lies light lily line link lion list little loan london long lord lot love loving low loyal luck lucky mad made major male mall man mandarin
    manager manly many march marina marine mark market marks marsh martial martin mason master mat mate mats matt max may mayor mead media melody
    mentor mercy merit merry metro mile miles mill miller milo mine mini minor mint miss mister moon moor more morning moss mount mountain mr mrs ms mule nail
    nash new nice night noble noon north norm not oak oak ocean odd oil olive oral orange orchard order otter owe owner page palm paper paradise paris park
    parker parks parsons part parts pat patience paw pay peace pearl peer penny pepper per perfect pet petri phoenix piano pick pike pine
    pink pitt plank pleasant poe pole pollen polo pond pool poor pope post pound pounds powell power powers precious press price prime prince princess
    prior promise pure quay queen quick quiet rain ram raven ray reader real reason red reed reef rest rice rich ridge ring rings river rivers road
    rob robin robot rock rocket roll room root roots rose rosemary rough round royal ruby rush safari sage sail salami sale sales sally salt sand
    sandy sang sans saint sad say scott sea see seed sell senior sergeant seven shade sharp she shell shepherd sherry shine ship shoe shop short
    silk silver simple sincere sing singer singh sir sister skip sky small smart smith snow soft solar sole son song soon south spark sparks spring
    stack stair stamp star stark start state steel steer still stock stone storey storm story strange stream street strong sue sugar summer sun
    sunday sunny sunshine swan sweet swift sword swords sydney tall tan tank tax tea temple tender terry than thorn tie ties till tin tins tiny toby
    tom tone too tore toy trace trip troy true trust turk turkey turn turner tyre ty unique unknown urban us usa valid van venture versa vic vice
    victor victory vine violet virginia visa wage walk walker wall walls ward warm warmer warner wash water waters watt watts way weaver weeks well wells
    west wheat white wild will wind wine wing winter wise wish wolf wonder wood woods word work world worth yard yoga york you young your zone zion
    account address agent answer assistant author bot caller client customer date description doctor driver email error example from guest host info input
    instruction label member message name note number operator output owner patient phone prompt question re reporter response result role sender signed
    source speaker status step subject summary support system task team title to total type user version warning witness id key value text time cc bcc
    nan mum dad gran grandma grandpa auntie aunty uncle mom hi hello dear thanks regards best sincerely cheers yes no ok please the this that these
    monday tuesday wednesday thursday friday saturday january february july september october november december america europe africa
    canada london ocean mexico berlin kali linux java python ruby pandas django flask jenkins claude alexa siri cortana watson echo ada julia scala swift
    android apple gala kiwi basil ginger saffron colby brie port merlot mandarin honda ford tesla mercedes bentley porsche ferrari chevrolet kia levi dell sony
    dutch german english french spanish italian polish swedish danish turkish irish scottish welsh finn swiss czech norman roman latin""".split()  # noqa: SIM905 - a list of words reads better so
)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_CAPITAL = r"[^\W\d_a-zà-öø-ÿ][\w'’-]*"
# Words that lead to a name in a text whose author does not care for capitals.
_CUE = re.compile(
    r"(?i)\b(?:(?:my|your|his|her|the|full|first|last) name(?:'s| is|:)|my names?|this is|it'?s|i'?m|i am|im|ask(?: for)?|tell|told|call|calls me|from|to|for|with|and|by|met|meet|mr|mrs|ms|miss|mx"
    r"|dr|prof|sir|nurse|doctor|sister|brother|bro|aunt|auntie|aunty|uncle|cousin|mum|mom|dad|nan|gran|grandma|grandpa|son|daughter|husband|wife|partner|friend|mate"
    r"|colleague|boss|manager|neighbour|neighbor|customer|patient|pt|agent|caller|driver|witness|witnesses|signed(?: for)? by|cc|thx|thanks|ty|hi|hey|hello|dear|love|is|old|little|big|did|does|has|@)\b\.?,?\s{1,2}$"
)
# Before the colon of a speaker: a time, quotation marks, list marks, a bracket.
_SPEAKER = re.compile(
    r"(?m)^[\s>*_#-]{0,6}(?:[\[(]?\d[\d:.,/ T-]{2,20}(?:[AaPp][Mm])?[\])]?\s*[-–]?\s*)?[<*_]{0,2}"
    r"(?P<name>@?[^\W\d_][\w.'’-]{1,24}(?: [^\W\d_][\w.'’-]{0,24}){0,3})(?P<role> ?\([\w ]{2,20}\))?[>*_]{0,2}\s?(?::[*_]{0,2}(?=\s|$)|(?<=>)\s)"
)
_LISTED = re.compile(
    rf"(?<![\w,] )(?<![\w-])(?P<last>{_CAPITAL}(?:[ -]{_CAPITAL})?),\s?(?P<first>{_CAPITAL}(?:[ ]{_CAPITAL}|[ ][^\W\d_]\.?(?!\w)){{0,2}})(?=\s*(?:$|[\n;:()/|<—–,.]|\d|-|is\b|was\b|has\b|says?\b))"
)
# Firms named after people: Davis, Reynolds and Williamson; Weeks-Rivas.
_FIRM = re.compile(r"\b(?P<names>[^\W\d_][\w'’]+(?:-[^\W\d_][\w'’]+|(?:, [^\W\d_][\w'’]+){1,3},? (?:and|&) [^\W\d_][\w'’]+| (?:&|and) Sons))\b")
_SLASHED = re.compile(r"\b(?P<name>[A-Z][A-Z'-]{1,24}/[A-Z][A-Z ]{1,30}(?: (?:MRS?|MS|MISS|MSTR|DR|CHD))?)\b")
_PARTICLES = frozenset("van von de der den del della di da do dos das du la le el al bin ibn ben st st. mac ter ten y e af av zu".split())
_NEXT = re.compile(r"(?P<gap>[ \u00a0]|-)(?P<word>[^\W\d_][\w'’-]*)(?P<dot>\.?)")
_PREVIOUS = re.compile(r"(?P<word>[^\W\d_][\w'’-]*)(?P<dot>\.?)(?P<gap>[ \u00a0]|-)$")
_NOT_AFTER = frozenset(
    """monday tuesday wednesday thursday friday saturday sunday january february march april may june july august september october
    november december i the a an in on at and or but to from of is was are has had he she they we you it his her their our my your who that this
    inc ltd llc gmbh plc corp co street st road rd avenue ave lane ln drive dr court ct way square hospital university college school hotel bank clinic
    company group team street park house hall station church mr mrs ms miss dob mrn ssn nhs npi dea vin iban phone tel fax email e-mail id no age address dear hi hello thanks
    regards sincerely best cheers date born please note re cc subject sent ticket order invoice case policy account card not if when what how why where as by with for""".split()  # noqa: SIM905
)


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


def is_full_name(text: str) -> bool:
    """Say whether a text is a name of two to four words, one of which is on the lists."""
    words = _WORD.findall(text)
    return 2 <= len(words) <= 4 and any(word.casefold() in given_names() for word in words)


def find_names(text: str) -> list[Span]:
    """Return names that their place in the text gives away, and given names that nothing else could be."""
    return sorted({*_speakers(text), *_lists(text), *_lone(text)})


def _speakers(text: str) -> Iterator[Span]:
    matches = list(_SPEAKER.finditer(text))
    for match in matches:
        words = re.split(r"[\W\d_]+", match["name"])
        words = [word for word in words if word]
        if words and any(is_name(word) and len(word) >= 3 for word in words) and not any(word.casefold() in _NOT_AFTER for word in words):
            yield Span(*match.span("name"), "PERSON", 0.6)


def _lists(text: str) -> Iterator[Span]:
    for match in _LISTED.finditer(text):
        last, first = _WORD.findall(match["last"]), _WORD.findall(match["first"])
        known = any(word.casefold() in given_names() for word in first)
        if known and not any(word.casefold() in WORDS | _NOT_AFTER for word in [*last, first[0]]):
            yield Span(match.start(), match.end(), "PERSON", 0.6)
    for match in _FIRM.finditer(text):
        words = [word for word in re.split(r"\W+|\band\b", match["names"]) if word and word != "Sons"]
        folded = [word.casefold() for word in words]
        if any(map(is_name, words)) and all(word in _every_name() and len(word) >= 3 for word in folded):
            yield Span(*match.span(), "PERSON", 0.5)
    for match in _SLASHED.finditer(text):
        if any(is_name(word) for word in _WORD.findall(match["name"])):
            yield Span(match.start(), match.end(), "PERSON", 0.6)


def _lone(text: str) -> Iterator[Span]:
    for match in _WORD.finditer(text):
        word = match[0]
        if len(word) < 3 or text[match.start() - 1 : match.start()] in ("_", ".", "/", "\\", "$", "&", "=") and match.start():
            continue
        after = text[match.end() : match.end() + 1]
        if after in ("_", "(", "=", "[") or after.isdigit():
            continue
        folded = word.casefold()
        cued = bool(_CUE.search(text, max(0, match.start() - 24), match.start()))
        if word[0].isupper():
            found = folded in given_names() and (word.isupper() or word[1:].islower()) and (len(word) >= 4 or folded in _english_names())
        else:
            found = word.islower() and folded in (given_names() if cued else _english_names()) and (cued or len(word) >= 4)
        if found:
            yield Span(*match.span(), "PERSON", 0.5)


_LAST_WORD = re.compile(r"\s+([a-zß-öø-ÿ][\w'’-]*)\W*$")
_LEADING = re.compile(r"^(?:(?:and|or|to|of|in|on|at|from|for|with|by|the|a|an|is|was|hi|hello|hey|dear|ask|tell|call|cc|thanks?|thx|from:|to:)\s+)+", re.I)


def trim_names(text: str, spans: Sequence[Span]) -> list[Span]:
    """Take the small words off the ends of names."""
    trimmed = []
    for span in spans:
        if span.entity == "PERSON":
            surface = text[span.start : span.end]
            leading = _LEADING.match(surface)
            start, end = span.start + (leading.end() if leading else 0), span.end
            while text[start : start + 1].isupper() and (last := _LAST_WORD.search(text, start, end)) and not is_name(last[1]):
                end = last.start()
            span = span._replace(start=start, end=end)
        trimmed.append(span)
    return [span for span in trimmed if span.start < span.end]


def extend_names(text: str, spans: Sequence[Span]) -> list[Span]:
    """Let a name that was found in part take in the capitalised words, initials and particles beside it."""
    taken = [(span.start, span.end) for span in spans]
    extended = []
    for span in spans:
        if span.entity == "PERSON" and any(c.isalpha() for c in text[span.start : span.end]):
            span = span._replace(start=_grow_left(text, span, taken), end=_grow_right(text, span, taken))
        extended.append(span)
    return extended


def _grow_right(text: str, span: Span, taken: Sequence[tuple[int, int]]) -> int:
    end, shown, capitals = span.end, span.end, text[span.start : span.end].isupper() and span.end - span.start > 2
    lower = text[span.start : span.end].islower()
    for _ in range(4):
        match = _NEXT.match(text, end)
        if not match:
            break
        word = match["word"]
        folded = word.casefold()
        if any(start <= match.start("word") < stop for start, stop in taken if (start, stop) != (span.start, span.end)):
            break
        if folded in _PARTICLES:
            end = match.end("word")
            continue
        initial = len(word) == 1 and word.isupper() and (match["dot"] or capitals)
        named = word[0].isupper() and folded not in _NOT_AFTER and (capitals or not word.isupper() or initial or len(word) == 1)
        if lower:
            named = word.islower() and folded in family_names()
        if not (initial or named) or (len(word) == 1 and not initial):
            break
        if text[match.end() : match.end() + 1] in ("(", "=", "_"):
            break
        end = shown = match.end() if initial and match["dot"] else match.end("word")
    return shown


def _grow_left(text: str, span: Span, taken: Sequence[tuple[int, int]]) -> int:
    start, shown = span.start, span.start
    lower = text[span.start : span.end].islower()
    for _ in range(3):
        match = _PREVIOUS.search(text, max(0, start - 30), start)
        if not match or lower:
            break
        word = match["word"]
        if any(begin < match.end("word") and match.start("word") < stop for begin, stop in taken):
            break
        folded = word.casefold()
        if folded in _PARTICLES and word.islower():
            start = match.start("word")
            continue
        initial = len(word) == 1 and word.isupper() and bool(match["dot"])
        if not (initial or (word[0].isupper() and is_name(word))):
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
