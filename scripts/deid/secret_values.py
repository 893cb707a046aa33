"""Find secrets by the words beside them: a password has no format of its own, only a label.

Keys with a format of their own, such as `ghp_…`, are patterns in recognizers.yaml.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from scripts.deid.spans import Span

# A name that ends in one of these words holds a secret: DB_PASSWORD, aws_secret_access_key, jwt.secret, dbPassword.
_STRONG = r"pass(?:word|wd|phrase|code|wort)?|pwd|pw|pass_?key|credentials?|recovery[ _-]?(?:key|code)"
_KEYS = (
    r"pass|secret(?:s|[ _-]?(?:key|token|value))?|(?:api|access|private|signing|encryption|account|master|shared|license|app|admin|auth|client"
    r"|subscription|service|ssh|deploy|encrypt|hmac|webhook|stripe|sendgrid|google|openai|mail\w*)[ _.-]?(?:secret[ _-]?)?(?:key|secret|token)"
    r"|token|apikey|auth|authtoken|_pat|salt|session(?:[ _-]?(?:id|key|token))?|sid|jwt|bearer|nonce|signature"
)
_START = r"(?:(?<![A-Za-z])|(?-i:(?<=[a-z])(?=[A-Z]))|(?=passw|secret))"
_LABEL = rf"{_START}(?:{_STRONG}|{_KEYS})(?:[_-]?\d{{1,2}})?(?![A-Za-z])"
_ASSIGNED = re.compile(
    rf"(?i)(?P<label>{_LABEL})[\"'`\])]{{0,3}}\s{{0,8}}(?::\s?[A-Za-z\[\]]{{2,12}}\s?)?(?P<sign>=>|:=|[:=]|\s(?:is now|was|is|are)\b:?)\s{{0,4}}"
    r"(?:\[\]byte\(|bytes\(|b(?=[\"']))?(?:(?P<quote>[\"'`])(?P<quoted>[^\"'`\n]{3,400})(?P=quote)|(?P<bare>[^\s\"'`<>{}()\[\],;]{4,400}))"
)
_SPOKEN = re.compile(
    rf"(?i)(?<![\w-])(?:{_STRONG}|pass)\s+(?:for [\w ]{{1,24}} )?(?P<bare>[^\s\"'`<>{{}}()\[\],;:=]{{6,80}})"
)
_FLAG = re.compile(
    r"(?i)(?<!\S)--?(?:pass(?:word|wd|phrase)?|pwd|token|secret|api[_-]?key|access[_-]?token|auth[_-]?token)[ =](?:(?P<quote>[\"'])(?P<quoted>[^\"'\n]{3,200})(?P=quote)|(?P<bare>[^\s\"'-][^\s\"']{3,200}))"
)
_SQL = re.compile(
    r"(?i)\b(?:identified\s+by|(?:with\s+|encrypted\s+)?password)\s+(?P<quote>['\"])(?P<quoted>[^'\"\n]{3,200})(?P=quote)"
)
# `-p` glued to its value is a password for these programs and a port or a path for others.
_SHELL = re.compile(
    r"(?<!\S)(?:mysql\w*|mariadb\w*|sshpass|mongo\w*|redis-cli)\b[^\n|;]{0,80}?\s-(?:p|a\s)\s?(?P<quote>['\"]?)(?P<quoted>[^\s'\"]{3,200})(?P=quote)"
)
_USER = re.compile(
    r"(?<!\S)(?:-u|--user|--proxy-user)[ =]?(?P<quote>['\"]?)[^\s:'\"]{1,60}:(?P<quoted>[^\s'\"]{3,200})(?P=quote)"
)
_HEADER = re.compile(
    r"(?i)\b(?:proxy-)?authorization[\"']?\s?[:=]\s?[\"']?(?:bearer|basic|token|apikey|digest|key)\s+(?P<bare>[^\s\"'<>,;]{6,4000})"
    r"|\b(?P<scheme>bearer|basic)\s+(?P<free>[\w.~+/=-]{16,4000})"
    r"|\bcookie[\"']?\s?:\s?[\"']?[\w.-]{1,40}=(?P<cookie>[^\s;\"']{8,4000})"
)
_LOGIN = re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,63})+\s?(?:/|\||:)\s?(?P<bare>[^\s\"'<>,;/|:]{6,80})")
_URL_QUERY = re.compile(
    r"(?i)[?&;](?:[\w-]{0,30}(?:token|secret|password|passwd|signature|apikey|api_key|access_key)|sig|pwd|key)=(?P<bare>[^&\s\"'<>#;]{4,400})"
)
_QUALIFIERS = (
    r"security|verification|access|login|log-in|door|gate|entry|alarm|unlock|backup|recovery|confirmation|activation|reset"
    r"|auth(?:entication|orization)?|two-factor|2fa|mfa|sms|one[ -]time|safe|lock|sign-in|garage|building|lockbox|key ?pad"
)
_CODE = re.compile(
    rf"(?i)\b(?:(?:(?:{_QUALIFIERS})[ -](?:pass)?(?:code|pin|password)s?|(?:your|the|my) (?:pass)?code(?= (?:is|was)\b)|pins?|pin[ -](?:code|number)"
    r"|pass[ -]?codes?|otp|cvv2?|cvc2?|totp)\b(?: (?:for|to|of) (?:the |my |our )?[\w'-]{1,20}(?: [\w'-]{1,20})?)?[\"']?(?:\s?[:=#]|\s+(?:is|was|are|now|code|number))*\s{0,3}[\"']?)"
    r"(?P<bare>(?=[\w#*-]*\d)[\w*-]{2,12}(?:#[\w*-]{0,8})?(?:,? (?:and |or )?(?=[\w-]*\d)[\w]{3,6}-[\w-]{3,14})*)"
    rf"|(?<![\w.,-])(?P<front>\d{{4,8}})(?= is (?:your|the) (?:[\w-]+ ){{0,3}}(?:code|pin|passcode|password|otp)\b)"
)
_PHRASE = re.compile(
    r"(?i)\b(?:(?:seed|recovery|secret|backup|mnemonic|wallet|pass)[ -]?(?:recovery )?(?:phrase|words)|mnemonic|seed|passphrase)\b[^.\n:=\"]{0,40}?(?:[:=]|\bis\b|\bwas\b)\s{0,3}[\"']?"
    r"(?P<bare>[a-z]{3,10}(?:[ ,]{1,2}(?!and\b|or\b)[a-z]{3,10}){3,24})"
)
_ENTROPY = re.compile(r"(?<![\w+/=.-])[A-Za-z0-9+/_-]{20,200}={0,2}(?![\w+/=.-])")
_NEARBY = re.compile(r"(?i)(?:key|token|secret|passw|credential|auth|salt|bearer|dsn)")
_DIGEST = re.compile(r"(?i)sha-?\d|md5|digest|checksum|commit|revision|etag|hash|fingerprint|integrity|uuid")

_STAND_IN = re.compile(
    r"(?i)^(?:your|my|the|some|any|new|old|insert|enter|put|add|replace|change|fill|example|sample|dummy|fake|test|todo|tbd|none|null|nil|true|false|undefined|redacted"
    r"|hidden|removed|empty|secret|password|passwd|token|string|str|int|bool|bytes|optional|required|env|process|os|config|settings|self|this|get|var|vault|from|new|await"
    r"|placeholder|default|masked|n/?a)(?:$|[\W_]|pass|key|token|secret|here|me)|^changeme|^change[_-]|^x{3,}|^\*{3,}|^\.{3,}|^_{3,}|^-{3,}|^[#$%&@]?[{(<\[]|^\$\w|^%\w+%|^<|^\W+$|here$"
)
_CALL = re.compile(r"^[A-Za-z_][\w]*(?:\.[A-Za-z_]\w*)+$|^[A-Za-z_]\w*[(\[]|^[A-Za-z_][\w.]*$")
_TAIL = ".,;:!?)]}>\"'`"


def find_secrets(text: str) -> list[Span]:
    """Return the values that their surroundings call secret, placeholders left out."""
    return [Span(start, end, "SECRET", 0.85) for start, end in _values(text) if end > start]


def _values(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_FLAG, _SQL, _SHELL, _USER, _HEADER, _LOGIN, _URL_QUERY):
        for match in pattern.finditer(text):
            value, start, end = _captured(match)
            if not is_placeholder(value) and (pattern is not _LOGIN or _mixed(value)):
                if match.groupdict().get("free") and not _mixed(value):
                    continue
                yield start, end
    for match in _ASSIGNED.finditer(text):
        value, start, end = _captured(match)
        if _is_assigned_secret(match, value, text):
            yield start, end
    for match in _SPOKEN.finditer(text):
        value, start, end = _captured(match)
        if _odd(value) and not is_placeholder(value):
            yield start, end
    for pattern in (_CODE, _PHRASE):
        for match in pattern.finditer(text):
            _, start, end = _captured(match)
            yield start, end
    for match in _ENTROPY.finditer(text):
        line = text[max(0, text.rfind("\n", 0, match.start()) + 1, match.start() - 60) : match.start()]
        if _NEARBY.search(line) and not _DIGEST.search(line) and is_random(match[0]):
            yield match.span()


def _captured(match: re.Match[str]) -> tuple[str, int, int]:
    """Return the value of a match and its place, without the punctuation of the sentence around it."""
    name = next(
        n
        for n, value in match.groupdict().items()
        if value is not None and n not in ("label", "sign", "quote", "scheme")
    )
    start, end = match.span(name)
    if name != "quoted":
        while end > start and match.string[end - 1] in _TAIL:
            end -= 1
    return match.string[start:end], start, end


def _is_assigned_secret(match: re.Match[str], value: str, text: str) -> bool:
    label, sign = match["label"], match["sign"].strip().casefold()
    quoted = match["quoted"] is not None
    if len(value) < 4 or is_placeholder(value):
        return False
    strong = re.search(rf"(?i)(?:{_STRONG})(?:[_-]?\d{{1,2}})?$", label) is not None
    if not quoted and text[match.end() : match.end() + 1] in ("(", "["):
        return False  # a call or an index, not a value
    if sign not in ("=", ":", "=>", ":="):
        return _odd(value) and len(value) >= 5  # "the password is wrong" names none
    if strong:
        if quoted:
            return " " not in value or _odd(value) or len(value.split()) >= 3
        rest = text[match.end() : match.end() + 2]
        # In prose a word may follow the colon: "Password: must have a digit".
        return _odd(value) or sign == "=" or not re.match(r"\s[A-Za-z]", rest)
    if not quoted and _CALL.match(value) and not _mixed(value):
        return False
    return len(value) >= 8 and _mixed(value) and " " not in value


def is_placeholder(value: str) -> bool:
    """Say whether a value only stands for one: `your-key-here`, `$TOKEN`, `{{ token }}`, `changeme`, `****`."""
    if _STAND_IN.search(value) and not is_random(value):
        return True
    return len(set(value)) <= 2


def is_random(value: str) -> bool:
    """Say whether a word looks drawn at random: letters and digits, and an entropy that no word of a language has."""
    if not (any(c.isdigit() for c in value) and any(c.isalpha() for c in value)):
        return False
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())
    return bits >= (3.0 if re.fullmatch(r"(?i)[0-9a-f-]+", value) else 3.5) and len(value) >= 16


def _mixed(value: str) -> bool:
    return any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def _odd(value: str) -> bool:
    """Say whether a value is no word of a language: it holds a digit, a symbol, or a capital after the first letter."""
    core = value.strip(_TAIL)
    return bool(re.search(r"\d|[^\w\s.,'’-]|[a-z][A-Z]|\w_\w", core)) and any(c.isalnum() for c in core)
