"""Hold an answer against the rules of `eval.checks`."""

from __future__ import annotations

import json
import re

from scripts.common.errors import UserError
from scripts.common.schema import Check

NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def passes(check: Check, answer: str, prompt: str, target: str | None) -> bool:
    """Decide whether an answer keeps every condition of a check. One without a letter or digit of any script keeps none."""
    text = answer.strip()
    words, folded = len(text.split()), text.casefold()
    return (
        any(map(str.isalnum, text))
        and (check.regex is None or re.search(check.regex, text, re.DOTALL) is not None)
        and all(wanted.casefold() in folded for wanted in check.must_contain)
        and not any(_occurs(banned, folded) for banned in check.must_not_contain)
        and check.min_words <= words <= (check.max_words or words)
        and len(SENTENCE_END.findall(text)) <= (check.max_sentences or len(text))
        and (not check.json_parses or _is_json(text))
        and (not check.exact_match or text == (target or "").strip())
        and (not check.numbers_from_prompt or set(NUMBER.findall(text)) <= set(NUMBER.findall(prompt)))
    )


def _occurs(banned: str, folded: str) -> bool:
    """Find a word as a whole word and anything else as it stands."""
    term = re.escape(banned.casefold())
    return re.search(rf"\b{term}\b" if re.fullmatch(r"\w.*\w|\w", banned) else term, folded) is not None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def check_rules(checks: list[Check]) -> None:
    """Refuse rules that cannot be applied."""
    for number, check in enumerate(checks):
        try:
            re.compile(check.regex or "")
        except re.error as error:
            raise UserError(
                f"eval.checks[{number}].regex: not a regular expression ({error}): {check.regex!r}"
            ) from None
    names = [check.name for check in checks]
    if len(set(names)) < len(names):
        raise UserError(f"eval.checks: two checks share a name ({', '.join(sorted(names))}). Give each its own.")
