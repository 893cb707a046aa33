"""Spans of personal data in a text: what they are, and how overlapping and ragged findings become clean ones."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple
from urllib.parse import unquote


class Span(NamedTuple):
    """One finding; `end` is exclusive, offsets count characters of the original text."""

    start: int
    end: int
    entity: str
    score: float


# Where findings overlap, the entity that stands first here names the whole.
PRIORITY = (
    "SECRET", "EMAIL_ADDRESS", "CREDIT_CARD", "IBAN_CODE", "US_SSN", "CRYPTO", "IP_ADDRESS", "MAC_ADDRESS", "UUID", "US_ITIN",
    "US_MBI", "US_NPI", "UK_NHS", "MEDICAL_LICENSE", "US_PASSPORT", "VEHICLE_ID", "DEVICE_ID", "ID_NUMBER", "PHONE_NUMBER",
    "URL", "STREET_ADDRESS", "HANDLE", "ZIP_CODE", "PERSON", "DATE_TIME", "AGE", "LOCATION", "ORGANIZATION", "NRP",
)  # fmt: skip
_RANK = {entity: rank for rank, entity in enumerate(PRIORITY)}

# <PERSON>, <PERSON_2>, <PERSON:1f2e…> are our own replacements: never touched again. Only names of entities count, so
# that nothing can hide in a user's <DIV_1>.
TAG = re.compile(rf"<(?:{'|'.join(PRIORITY)}|CUSTOM)(?:_\d{{1,6}}|:[0-9a-f]{{16}}|:[\w-]{{20,}}={{0,2}})?>")

_SPECIAL = str.maketrans(dict.fromkeys("‐‑‒–−﹣－", "-") | dict.fromkeys("‘’‛´", "'") | dict.fromkeys("“”„", '"'))
_INVISIBLE = frozenset("\u00ad\u034f\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff")
_DISGUISED = re.compile(
    r"(?P<entity>&(?:[A-Za-z]{2,8}|#\d{2,6}|#x[0-9A-Fa-f]{2,5});)|(?<=[\w=/&?+.:-])(?P<percent>(?:%[0-9A-Fa-f]{2})+)"
    r"|(?P<query>(?<=[?&=])[^\W\d_][^\s\d&#?\"'<>=+%/]*(?:\+(?:[^\W\d_][^\s\d&#?\"'<>=+%/]*|\d+))+(?![\w+/=%]))|(?P<marked>[^\W\d_][\u0300-\u036f]+)"
    r"|(?P<spaced>(?<!\S)[^\W\d_](?: [^\W\d_](?![^\s.,;:!?])){2,}(?: {2,4}[^\W\d_](?: [^\W\d_](?![^\s.,;:!?])){2,})*)"
)
# What a finding never crosses: the end of a line, a cell, a tag, a quotation of JSON, and LaTeX's breaks.
_ELEMENTS = (
    "a|abbr|article|aside|b|blockquote|body|br|button|caption|center|code|dd|details|div|dl|dt|em|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|label"
    "|legend|li|link|main|mark|meta|nav|ol|optgroup|option|p|pre|q|s|samp|script|section|select|small|span|strong|style|sub|summary|sup|svg|table|tbody|td"
    "|textarea|tfoot|th|thead|title|tr|tt|u|ul|var|video"
)
_BREAK = re.compile(
    rf"[\r\n\t|\u2028\u2029\x85\v\f]+|</[A-Za-z][\w:-]{{0,30}}>|<(?:{_ELEMENTS})(?:\s[^<>\n]{{0,300}})?/?>|<[A-Za-z][\w:-]{{0,30}}(?:\s[^<>\n]{{0,300}}=[^<>\n]{{0,300}}|/)>"
    r"|<[A-Za-z][\w:-]{0,30}>(?=[^<>\n]*</)|\\\\|\\[rnt](?![a-z])|\\[a-z]{2,}"
)
_NAME_BREAK = re.compile(_BREAK.pattern + r'|[{}\[\]=\u2022]|"[^\w\s]|(?<=\S)","|,(?=\S)|(?P<maybe>;)(?=\S)|&(?=\w+=)')
_ENTITY = re.compile(r"&#?\w{2,8}$")
_LIST_MARK = re.compile(r"[\s*•·#>+–—-]+(?=\w)")
ADDRESS_PARTS = frozenset({"STREET_ADDRESS", "LOCATION", "ZIP_CODE", "ORGANIZATION"})
_JOINT = re.compile(r"(?![^<]*(?:<|[.!?;:]\s|\b(?:and|or|to|from|with|for|by)\b))[^<]{0,40}")
# A number after these is no postal code.
_LABELLED = re.compile(r"(?i)[\s,>?*|-]{1,8}(?:\w*n(?:ummer|r|umber|o)|id|ref\w*|order|invoice|account)\b")
# What follows a street: the floor, postal code and town of a European address; more lines or parts after commas that end in a
# postal code; or a capitalised town.
_CAPITAL = r"[^\W\d_a-zß-öø-ÿ][\w'’-]*"
_TOWN = (
    rf"(?:'s-)?{_CAPITAL}(?: (?:(?:am|an der|ob der|de|del|di|da|do|la|los|las|den|der|sur|aan de[nr]?) )?{_CAPITAL}){{0,3}}"
    r"(?: \([A-Z]{2}\))?"
)
_TAIL = re.compile(
    r"(?:,? (?:scala|int\.|piso|étage|appt?\.|bus)? ?\d{1,2}(?:\.?[ºª°]| ?e?r?)? ?(?:étage|andar|piso|izq|dcha|esq|dto|dir|fte|[A-Z])?\b\.?){0,2}"
    rf"(?: (?:am|an der|ob der|aan de[nr]?|sur) {_CAPITAL}| \([A-Z]{{2}}\)|[\s,>?*|-]{{1,8}}(?:[A-Z]{{1,3}}-)?(?:\d{{4}} [A-Z]{{2}}\b|\d{{4}}-\d{{3}}|\d{{4,5}}),? {_TOWN})"
    r"|(?:[\s,>?*|-]{1,8}[^\W\d_][^\n,.!?;:<\d]{0,40}){0,3}[\s,>?*|]{1,8}(?:\d{5}-\d{4}|\d{4,6}\b(?!\s?[-–/]\s?\d))"
    r"|(?:[\s,]+(?:[A-Z]{2}\b|[^\W\d_a-z][\w'’-]+(?=[^\S\n]*[\n,]))){1,4}"
)
_TAIL_LENGTH = 120
_HOUSE_NUMBER = re.compile(r"(?<![\w.,-])\d{1,6},?\s$")
_OWNER = re.compile(r"[^\w\n]{0,5}((?:[^\W\d_][\w'’.&-]*[ ]){0,5}[^\W\d_][\w'’.&-]*)[ ]*")
_POSTAL_CODE = re.compile(r",?\s{1,3}\d{4,6}(?:-\d{4})?\b(?!\s*[-*/+=])")


def normalise(text: str) -> tuple[str, Sequence[int]]:
    """Return the text as detection reads it and, for each of its characters, the offset in the original.

    Full-width letters, unusual dashes, quotes and spaces become plain, as do HTML entities, URL encoding, decomposed accents
    and s p a c e d letters; invisible characters go. One entry more marks the end.
    """
    if text.isascii() and not _DISGUISED.search(text):
        return text, range(len(text) + 1)
    characters: list[str] = []
    offsets: list[int] = []
    position = 0
    for start, end, plain in [*_disguises(text), (len(text), len(text), "")]:
        for offset in range(position, start):
            character = text[offset]
            if character in _INVISIBLE:
                continue
            read = (
                unicodedata.normalize("NFKC", character).translate(_SPECIAL) if not character.isascii() else character
            )
            characters.append(read)
            offsets.extend([offset] * len(read))
        characters.append(plain)
        offsets.extend([start] * len(plain))
        position = end
    return "".join(characters), [*offsets, len(text)]


def _disguises(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, what it means) of letters written as HTML entity, in URL encoding, decomposed, or spaced out."""
    position = 0
    for match in _DISGUISED.finditer(text):
        if match.start() < position:
            continue
        found, position = match[0], match.end()
        if match["entity"]:
            plain = html.unescape(found)
            if len(plain) == 1:
                yield *match.span(), plain
        elif match["percent"]:
            plain = unquote(found, errors="strict") if _is_utf8(found) else found
            step = len(found) // len(plain) // 3 * 3 if plain != found else 0
            for index, character in enumerate(plain if step else ""):
                start = match.start() + index * step
                yield start, match.end() if index == len(plain) - 1 else start + step, character
        elif match["query"]:
            for plus in re.finditer(r"\+(?=[^\W\d_])", found):
                yield match.start() + plus.start(), match.start() + plus.end(), " "
        elif match["marked"]:
            plain = unicodedata.normalize("NFC", found)
            yield *match.span(), plain
        else:
            for gap in re.finditer(r" +", found):
                yield match.start() + gap.start(), match.start() + gap.end(), " " if len(gap[0]) > 1 else ""


def _is_utf8(encoded: str) -> bool:
    try:
        unquote(encoded, errors="strict")
    except UnicodeDecodeError:
        return False
    return True


def to_original(span: Span, offsets: Sequence[int]) -> Span:
    """Move a span from the normalised text to the original."""
    last, end = offsets[span.end - 1], span.end
    while offsets[end] == last:  # one original character that is read as several
        end += 1
    return span._replace(start=offsets[span.start], end=offsets[end] if isinstance(offsets, list) else last + 1)


def tidy(text: str, spans: Iterable[Span], protected: Sequence[tuple[int, int]] = ()) -> list[Span]:
    """Snap to whole words, leave out our own tags, and join what overlaps; the result is sorted and disjoint."""
    pieces = [piece for span in spans for piece in _around(_snap(text, span), protected)]
    return union(piece for piece in (_trim(text, piece) for piece in pieces) if piece.start < piece.end)


def union(spans: Iterable[Span]) -> list[Span]:
    """Join overlapping spans; the most specific entity names the whole."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and span.start < joined[-1].end:
            last = joined[-1]
            best = min(last, span, key=lambda one: _RANK.get(one.entity, -1))
            joined[-1] = Span(last.start, max(last.end, span.end), best.entity, max(last.score, span.score))
        else:
            joined.append(span)
    return joined


def cut(text: str, spans: Iterable[Span]) -> list[Span]:
    """Cut findings where the structure of the text has a break, so that lines, cells and tags stay; a key may have many lines."""
    pieces: list[Span] = []
    for span in spans:
        if span.entity == "SECRET":
            pieces.append(span)
            continue
        named = span.entity in ("PERSON", "ORGANIZATION", "LOCATION", "NRP")
        breaks = [
            match.span()
            for match in (_NAME_BREAK if named else _BREAK).finditer(text, span.start, span.end)
            if not (named and match["maybe"] and _ENTITY.search(text, max(0, match.start() - 10), match.start()))
        ]
        for part in _around(span, breaks):
            mark = _LIST_MARK.match(text, part.start, part.end) if named else None
            part = part._replace(start=mark.end()) if mark else part
            part = _trim(text, part) if breaks or mark else part
            if part.start < part.end:
                pieces.append(part)
    return pieces


def _snap(text: str, span: Span) -> Span:
    start, end = span.start, span.end
    while start > 0 and text[start].isalnum() and text[start - 1].isalnum():
        start -= 1
    while end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
        end += 1
    return span._replace(start=start, end=end)


def _trim(text: str, span: Span) -> Span:
    start, end = span.start, span.end
    while start < end and (text[start].isspace() or text[start] in ",;:.!?)]}>\"'"):
        start += 1
    while start < end and (text[end - 1].isspace() or text[end - 1] in ",;:!?([{<\"'"):
        end -= 1
    if not any(character.isalnum() for character in text[start:end]):
        end = start
    return span._replace(start=start, end=end)


def _around(span: Span, protected: Sequence[tuple[int, int]]) -> list[Span]:
    pieces = [span]
    for start, end in protected:
        last = pieces[-1]
        if last.start < end and start < last.end:
            pieces[-1:] = [last._replace(end=start), last._replace(start=end)]
    return [piece for piece in pieces if piece.start < piece.end]


def merge_addresses(text: str, spans: Sequence[Span]) -> list[Span]:
    """Join a street with the places and numbers around it into one address, and take the lines above it for its owner."""
    merged: list[Span] = []
    anywhere = any(span.entity == "STREET_ADDRESS" for span in spans)
    index = 0
    while index < len(spans):
        block = [spans[index]]
        index += 1
        while index < len(spans) and {block[-1].entity, spans[index].entity} <= ADDRESS_PARTS:
            if not _JOINT.fullmatch(text, block[-1].end, spans[index].start):
                break
            block.append(spans[index])
            index += 1
        street = next((span for span in block if span.entity == "STREET_ADDRESS"), None)
        if street is None:
            code = _POSTAL_CODE.match(text, block[-1].end) if anywhere and block[-1].entity == "LOCATION" else None
            merged += [*block[:-1], block[-1]._replace(end=code.end() if code else block[-1].end)]
            continue
        if block[0].entity == "ORGANIZATION":
            merged.append(block.pop(0))
        low = merged[-1].end if merged else 0
        high = spans[index].start if index < len(spans) else len(text)
        end = block[-1].end
        end += _tail(text, end, high)
        start = block[0].start
        end += text[end : end + 1] == ")" and "(" in text[start:end]  # `Milano (MI)`
        number = _HOUSE_NUMBER.search(text, max(low, start - 8), start)
        start = number.start() if number else start
        merged += _owners(text, low, start)
        merged.append(Span(start, end, "STREET_ADDRESS", max(part.score for part in block)))
    return merged


def _tail(text: str, start: int, next_finding: int) -> int:
    """Return the length of what follows a street. Only the end of the text ends a line there: a finding does not."""
    stop = next_finding
    if stop - start > _TAIL_LENGTH:  # at a space, so that no word or number is cut
        stop = max(start, text.rfind(" ", start, start + _TAIL_LENGTH))
    rest = text[start:stop] + ("\n" if stop == len(text) else "")
    tail = None if _LABELLED.match(rest) else _TAIL.match(rest)
    return tail.end() if tail else 0


def _owners(text: str, low: int, street: int) -> list[Span]:
    """Take the lines right above a street for the person, the job and the firm of the address, up to four of them."""
    owners: list[Span] = []
    line_start = text.rfind("\n", 0, street) + 1
    if line_start == 0 or any(character.isalnum() for character in text[line_start:street]):
        return owners
    for _ in range(4):
        end, line_start = line_start - 1, text.rfind("\n", 0, max(line_start - 1, 0)) + 1
        match = _OWNER.fullmatch(text, max(line_start, low), max(end, low))
        if not match:
            break
        owners.append(Span(*match.span(1), "PERSON", 0.6))
        if line_start <= low:
            break
    return owners[::-1]
