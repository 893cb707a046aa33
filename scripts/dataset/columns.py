"""Which column of a row holds what: the names that people's layouts have, and what becomes of the other columns."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import yaml

from scripts.common.schema import RecordField

Row = dict[str, Any]
FIELDS: tuple[str, ...] = get_args(RecordField)
# Other names of our fields, as data on the Hub and other tools have them. Case and white space do not count.
ALIASES: dict[str, tuple[str, ...]] = {
    "instruction": ("question", "query"),
    "input": ("context",),
    "output": ("answer", "response"),
    "messages": ("conversations", "conversation"),
    "chosen": ("response_j",),
    "rejected": ("response_k",),
    "system": ("system_prompt",),
    "label": ("kto_tag",),
}
# Fields of which a record has one. An alias counts only where no field of the group has its own name.
QUESTIONS, ANSWERS = ("prompt", "instruction"), ("completion", "output")
# One group of these makes a layout, and the fields of the others are then left unused.
GROUPS = (ANSWERS, ("chosen", "rejected"), ("messages",))

INSTRUCTION, PAIR, PROMPT, MESSAGES = (
    "instruction/input/output",
    "prompt/chosen/rejected",
    "prompt/completion",
    "messages",
)
WANTED = "instruction + output; chosen + rejected; prompt + completion; messages"
# How the reasoning of an answer stands in its text, and the keys under which data and templates hold it apart.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# What would change what an answer means and cannot be trained. It is refused by name, in rows and in messages.
TOOL_KEYS = ("tools", "tool_calls", "functions", "function_call")
MEDIA_KEYS = ("images", "image", "videos", "audios")
MESSAGE_KEYS = ("role", "content", "from", "value", "weight", *REASONING_KEYS)
# Texts that stand for a missing value: what pandas writes for it into a file of texts.
NO_VALUE = ("nan", "<NA>")
# A thumb as files and tables write it; True and False are 1 and 0 here.
THUMBS: dict[object, bool] = {
    1: True, 0: False, "1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False, "up": True, "down": False,
}  # fmt: skip
# What speakers are called in messages, and our name for each.
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)
SPEAKERS = {
    **{name: SYSTEM for name in ("system", "developer")},
    **{name: USER for name in ("user", "human")},
    **{name: ASSISTANT for name in ("assistant", "gpt", "chatgpt", "bot", "model")},
}
TOOL_SPEAKERS = ("tool", "function", "function_call", "function_response", "observation", "ipython")


class RowError(Exception):
    """Why a row cannot be used: the field and the reason."""

    def __init__(self, field_name: str, reason: str) -> None:
        self.field_name, self.reason = field_name, reason


@dataclass(frozen=True)
class Layout:
    """The layout of a row, and the column that each of our fields stands in."""

    name: str
    columns: Mapping[str, str]

    def read(self, row: Row) -> Row:
        """Return the values of a row under our names."""
        return {field: row[column] for field, column in self.columns.items()}


def rename(row: Row, columns: Mapping[str, str | None], keep: str | None = None) -> Row:
    """Give the columns that a source maps our names; a row without columns of that kind stays as it is.

    What is mapped decides: another column of that name, and columns that make another layout, are taken out. `keep` is a
    column that stays under its own name too, because `data.group_field` names it.
    """
    if not columns:
        return row
    mapped = {field for column, field in columns.items() if field and column in row}
    others = {field for group in GROUPS if mapped & {*group} for field in {*sum(GROUPS, ())} - {*group}}
    others |= {field for pair in (QUESTIONS, ANSWERS) if mapped & {*pair} for field in pair}
    kept = {
        column: value
        for column, value in row.items()
        if column == keep or (column not in columns and _field_of(column) not in others | mapped)
    }
    return kept | {field: row[column] for column, field in columns.items() if field and column in row}


def find_layout(row: Row) -> Layout | None:
    """Return the layout of a row by the names of its columns, or None where no layout is complete.

    Raises: RowError where two columns could be the same field.
    """
    return _find_layout(tuple(str(column) for column in row))


@cache
def _find_layout(names: tuple[str, ...]) -> Layout | None:
    own = {field: field for field in FIELDS if field in names}
    for field in FIELDS:  # of another case, or with spaces
        for name in names:
            if field not in own and _plain(name) == field:
                own[field] = name
    found, ambiguous = dict(own), dict[str, list[str]]()
    for field, aliases in ALIASES.items():
        group = next((group for group in (QUESTIONS, ANSWERS) if field in group), (field,))
        candidates = [name for name in names if _plain(name) in aliases and name not in found.values()]
        beside_prompt = field == "input" and "prompt" in own  # which says everything by itself
        if candidates and not beside_prompt and not any(one in own for one in group):
            ambiguous |= {field: candidates} if len(candidates) > 1 else {}
            found[field] = candidates[0]
    layout = _layout_of(own) or _layout_of(found)
    if layout is None:
        return None
    columns = {field: found[field] for field in _fields_of(layout, found)}
    for field in columns.keys() & ambiguous.keys():
        maps = " or ".join(as_columns({name: field}) for name in ambiguous[field])
        raise RowError(
            "fields", f"{' and '.join(ambiguous[field])} could both be {field}; say beside the path which: {maps}"
        )
    return Layout(layout, columns)


def _layout_of(fields: Collection[str]) -> str | None:
    """Name the layout that a set of our fields makes, the first of several."""
    if {"instruction", "output"} <= {*fields}:
        return INSTRUCTION
    if {"chosen", "rejected"} <= {*fields}:
        return PAIR
    if {"prompt", "completion"} <= {*fields}:
        return PROMPT
    if "messages" in fields:
        return MESSAGES
    if any(field in fields for field in ANSWERS):
        return PROMPT if "prompt" in fields else INSTRUCTION if {"instruction", "input"} & {*fields} else None
    return None


def _fields_of(layout: str, found: Collection[str]) -> list[str]:
    """Return which of the fields that were found belong to a layout."""
    wanted = {"system"} if layout == PAIR else {"system", "label"}
    if layout == MESSAGES:
        wanted |= {"messages"}
    else:
        asked = {"instruction", "input"} if layout == INSTRUCTION or "prompt" not in found else {"prompt", "input"}
        wanted |= asked | {"history"}
        if layout == PAIR:
            wanted |= {"chosen", "rejected"}
        else:
            preferred, other = ("output", "completion") if layout == INSTRUCTION else ("completion", "output")
            wanted |= {preferred if preferred in found else other, "reasoning_content"}
    return [field for field in FIELDS if field in found and field in wanted]


def describe_missing_layout(row: Row, *, pairs: bool) -> RowError:
    """Say that no layout is complete, and which `columns:` would make one."""
    names = [str(name) for name in row]
    found = f"found {', '.join(names) or 'none'}"
    texts = [name for name in names if _may_be_turns(row.get(name)) and _field_of(name) not in ("system", "label")]
    wanted = ["prompt", "chosen", "rejected"] if pairs else ["instruction", "output"]
    known = {field: name for name in names if (field := _field_of(name)) in wanted}
    rest = [name for name in texts if name not in known.values()]
    open_fields = [field for field in wanted if field not in known]
    if not pairs and len(texts) == 1 and _field_of(texts[0]) is None:
        return RowError(
            "fields",
            f"{found}: one text with question and answer in it; only the answer is trained, so put them apart, into two "
            f"columns such as instruction and output; other names are mapped beside the path: "
            f"{as_columns({'question': 'instruction', 'answer': 'output'})}",
        )
    if len(rest) >= len(open_fields) > 0:
        near = {field: nearest_column(field, rest) for field in open_fields}
        if all(near.values()):
            renamed = ", ".join(f"`{name}` to `{field}`" for field, name in near.items())
            columns = as_columns({str(name): field for field, name in near.items()})
            return RowError("fields", f"{found}; rename {renamed}, or write beside the path {columns}")
        columns = as_columns(dict(zip(rest, open_fields, strict=False)))
        return RowError(
            "fields",
            f"{found}; say beside the path which column is which, such as {columns}; a table without a header needs one",
        )
    return RowError("fields", f"{found}; wanted one of: {WANTED}; other names are mapped with columns: {{name: field}}")


def _may_be_turns(value: Any) -> bool:
    listed = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    return isinstance(value, str) or listed


def nearest_column(field: str, names: Iterable[str]) -> str | None:
    """Return the column that is probably a field of ours, misspelt."""
    import difflib

    plain = {_plain(name): name for name in names}
    near = difflib.get_close_matches(field, plain, n=1, cutoff=0.75)
    return plain[near[0]] if near else None


def as_columns(columns: Mapping[str, str | None]) -> str:
    """Write a map of columns as it stands in the configuration."""
    text = yaml.safe_dump(dict(columns), default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    return f"columns: {text.strip()}"


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


@cache
def _field_of(name: str) -> str | None:
    """Return which of our fields a column's name stands for."""
    plain = _plain(str(name))
    return next((field for field in FIELDS if plain == field or plain in ALIASES.get(field, ())), None)


# --- values


def is_missing(value: Any) -> bool:
    """Tell whether there is nothing in a value: null, NaN, white space, or the word that pandas writes for it."""
    if value is None or value != value:
        return True
    return isinstance(value, str) and (not value.strip() or value.strip() in NO_VALUE)


def refuse_unusable(row: Row) -> None:
    """Refuse a row whose meaning would be lost by reading its text alone.

    Raises: RowError with the name of the column.
    """
    refuse_tools(row)
    for key in MEDIA_KEYS:
        if _is_structure(row.get(key)):
            raise RowError(key, f"holds pictures or sounds, of which nothing is trained here; {_leave_out(key)}")


def refuse_tools(row: Row, at: str = "") -> None:
    """Refuse the tools of a row, or the calls of a message `at` a place."""
    for key in TOOL_KEYS:
        if _is_structure(row.get(key)):
            if at:
                raise RowError(
                    f"{at}.{key}",
                    "holds a call of a tool, and the use of tools is not trained here; take such rows out",
                )
            raise RowError(key, f"holds tools, and their use is not trained here; {_leave_out(key)}")


def _leave_out(key: str) -> str:
    return f"take such rows out, or leave the column out: {as_columns({key: None})}"


def _is_structure(value: Any) -> bool:
    if isinstance(value, str):
        value = as_list(value) if value.strip()[:1] in ("[", "{") else None
    return bool(value) and isinstance(value, list | dict)


def thumb_of(label: Any) -> bool | None:
    """Return what a label says of an answer; None where it is no thumb."""
    if not isinstance(label, str | bool | int | float):
        return None
    return THUMBS.get(label.strip().casefold() if isinstance(label, str) else label)


def is_verdict(row: Row, layout: Layout) -> bool:
    """Tell whether `label` says that an answer is good or bad, as KTO's data do.

    0 and 1 may be classes of any kind; they count beside a prompt or messages only, as KTO's layouts have them.
    """
    value = _value_of(row, layout, "label")
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().casefold() in ("true", "false")):
        return True
    return layout.name in (PROMPT, MESSAGES) and thumb_of(value) is not None


def _value_of(row: Row, layout: Layout, field: str) -> Any:
    column = layout.columns.get(field)
    return None if column is None else row.get(column)  # a file may have a column whose name is empty


def as_list(text: str) -> Any:
    """Read a text that was a list before it went into a table: JSON, or as Python writes it. None for any other text."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | dict):
            return value
    return None


_LIST_OF_MESSAGES = re.compile(
    rf"""\s*\[\s*\{{.*?["'](role|from)["']\s*:\s*["']({"|".join([*SPEAKERS, *TOOL_SPEAKERS])})["']""", re.DOTALL
)


def message_list_in(text: str, name: str) -> list[Any] | None:
    """Return the messages of a text that is a list of messages; None for any other text.

    Raises: RowError where it looks like one and cannot be read.
    """
    if not _LIST_OF_MESSAGES.match(text) or not re.search(r"""["'](content|value)["']\s*:""", text):
        return None
    value = as_list(text)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return value
    raise RowError(
        name, f"is a text that looks like a list of messages, but cannot be read ({text[:40]!r}…); write it as JSON"
    )


# --- what is not used


def unused_columns(row: Row, layout: Layout, keep: str | None) -> Iterable[str]:
    """Name the columns and the keys of messages that hold something and are not read."""
    used = {*layout.columns.values(), keep}
    if not is_verdict(row, layout):
        used.discard(layout.columns.get("label"))
    yield from (str(column) for column, value in row.items() if column not in used and not _is_empty(value))
    for column in layout.columns.values():
        value = row[column]
        for message in value if isinstance(value, list) else ():
            if isinstance(message, dict):
                yield from (
                    f"{column}[].{key}"
                    for key, inner in message.items()
                    if key not in MESSAGE_KEYS and not _is_empty(inner)
                )


def _is_empty(value: Any) -> bool:
    return is_missing(value) or value in ([], {}, ())


def missing_words(row: Row, layout: Layout) -> Iterable[str]:
    """Name the optional fields in which a word stands for a missing value."""
    for field in ("input", "system", "history"):
        value = _value_of(row, layout, field)
        if isinstance(value, str) and value.strip() in NO_VALUE:
            yield layout.columns[field]
