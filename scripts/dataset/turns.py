"""The turns of a row: texts, lists of messages in every spelling, and their contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from scripts.dataset.columns import (
    ASSISTANT,
    NO_VALUE,
    REASONING_KEYS,
    ROLES,
    SPEAKERS,
    SYSTEM,
    TOOL_SPEAKERS,
    RowError,
    is_missing,
    message_list_in,
    refuse_tools,
)  # fmt: skip

THINK, END_THINK = "<think>", "</think>"  # how the reasoning of an answer stands in its text


def read_text(row: dict[str, Any], field_name: str, name: str, *, empty: bool = False) -> str:
    """Return a text of a row; `name` is what an error calls it."""
    value = row.get(field_name)
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        value = _joined_parts(value, name)
    if value is not None and value != value:
        raise RowError(name, "is empty (NaN)")
    if not isinstance(value, str):
        raise RowError(name, f"found {type(value).__name__}, wanted text{_quoted(value)}")
    if not value.strip() and not empty:
        raise RowError(name, "is empty")
    if value.strip() in NO_VALUE:
        raise RowError(name, f"is the word {value.strip()}, which pandas writes for an empty cell; take such rows out")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise RowError(name, "holds half of a surrogate pair, which no tokenizer can read")
    return value


def _quoted(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return f'; write a number in quotes: "{value}"' if number else ""


def _joined_parts(parts: Sequence[dict[str, Any]], name: str) -> str:
    """Return the text of a content that comes in parts, as OpenAI's format allows."""
    for part in parts:
        if part["type"] not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise RowError(name, f"holds a part of type {part['type']!r}; only text can be trained on here")
    return "".join(part["text"] for part in parts)


class Turn(NamedTuple):
    """One message of a row, and whether an answer carries loss (OpenAI's `weight`)."""

    role: str
    content: str
    trained: bool = True

    def thinking(self, message: dict[str, Any], at: str) -> Turn:
        """Put the reasoning that a message holds apart before its content, where rendering looks for it."""
        given = [key for key in REASONING_KEYS if not is_missing(message.get(key))]
        if not given:
            return self
        if len(given) > 1 or self.content.lstrip().startswith(THINK):
            places = [*given, "content"] if len(given) == 1 else given
            raise RowError(at, f"holds reasoning in {' and in '.join(places)}; keep one of them")
        reasoning = read_text(message, given[0], f"{at}.{given[0]}").strip("\n")
        return self._replace(content=f"{THINK}\n{reasoning}\n{END_THINK}\n\n{self.content}")


def read_turns(value: Any, name: str, role: str) -> list[Turn]:
    """Read a text as one turn of `role`, or a list of messages as it is, be it as a text too."""
    if isinstance(value, str):
        listed = message_list_in(value, name)
        if listed is None:
            return [Turn(role, read_text({name: value}, name, name))]
        value = listed
    if not isinstance(value, list) or not value:
        wanted = "wanted text or a list of messages with role and content"
        way = _quoted(value) if role == ASSISTANT else ""
        raise RowError(name, f"found {type(value).__name__}, {wanted}{way}")
    return [_turn(message, f"{name}[{number}]") for number, message in enumerate(value)]


def _turn(message: Any, at: str) -> Turn:
    if not isinstance(message, dict):
        raise RowError(at, "wanted an object with role and content")
    refuse_tools(message, at)
    speaker, content = ("role", "content") if "role" in message else ("from", "value")
    if speaker not in message or content not in message:
        raise RowError(at, "wanted an object with role and content")
    said = message[speaker]
    role = SPEAKERS.get(said.strip().casefold()) if isinstance(said, str) else None
    if role is None:
        tools = "; the turns of tools cannot be trained on here" if said in TOOL_SPEAKERS else ""
        raise RowError(f"{at}.{speaker}", f"found {said!r}, wanted one of {', '.join(ROLES)}{tools}")
    weight = message.get("weight")
    if not is_missing(weight) and (isinstance(weight, str) or weight not in (0, 1)):
        raise RowError(f"{at}.weight", f"found {weight!r}, wanted 0 (not trained) or 1")
    turn = Turn(
        role, read_text(message, content, f"{at}.{content}", empty=role == SYSTEM), is_missing(weight) or bool(weight)
    )
    return turn.thinking(message, at) if role == ASSISTANT else turn


def merge_turns(turns: list[Turn]) -> list[Turn]:
    """Join consecutive turns of one role with a blank line."""
    merged: list[Turn] = []
    for turn in turns:
        before = merged[-1] if merged else None
        if before is None or before.role != turn.role:
            merged.append(turn)
            continue
        if before.trained != turn.trained or THINK in turn.content:
            raise RowError(
                "messages",
                f"has consecutive {turn.role} turns of different weight or with reasoning; join them by hand",
            )
        merged[-1] = before._replace(content=f"{before.content}\n\n{turn.content}")
    return merged


def show_difference(turns: list[Turn], number: int, other: list[Turn]) -> str:
    """Write a turn so that the place shows where it differs from the other side's."""
    if number >= len(turns):
        return "missing"
    role, text, _ = turns[number]
    beside = other[number].content if number < len(other) else ""
    start = next((n for n, (a, b) in enumerate(zip(text, beside, strict=False)) if a != b), min(len(text), len(beside)))
    start = 0 if number >= len(other) or role != other[number].role else max(0, start - 20)
    piece = ("…" if start else "") + text[start : start + 40] + ("…" if len(text) > start + 40 else "")
    return f"{role} {piece!r}"
