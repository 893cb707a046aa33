"""From a row to a record: formats, checks, and why a row cannot be used."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from scripts.common.artifacts import sha256_file, sha256_json
from scripts.common.errors import UserError, listing
from scripts.common.schema import Config, Data, WeightedDataset
from scripts.common.stages import KTO, SFT, TRAINING_STAGES
from scripts.dataset.columns import (
    ANSWERS,
    ASSISTANT,
    MESSAGES,
    NO_VALUE,
    PAIR,
    PROMPT,
    SYSTEM,
    USER,
    Layout,
    RowError,
    as_columns,
    as_list,
    describe_missing_layout,
    find_layout,
    is_missing,
    is_verdict,
    message_list_in,
    missing_words,
    nearest_column,
    refuse_unusable,
    rename,
    thumb_of,
    unused_columns,
)  # fmt: skip
from scripts.dataset.files import BadRow, find_file, read_hub, read_rows
from scripts.dataset.turns import Turn, merge_turns, read_text, read_turns, show_difference

log = logging.getLogger(__name__)

Message = dict[str, str]
LABELLED = "prompt, completion and label"


@dataclass(frozen=True)
class Record:
    """One conversation; the assistant turns named in `trained` carry the loss."""

    source: str
    messages: tuple[Message, ...]
    trained: tuple[int, ...]
    group: str | None = None  # what data.group_field says

    @property
    def answers(self) -> tuple[str, ...]:
        """Return the answers that carry loss."""
        return tuple(self.messages[turn]["content"] for turn in self.trained)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Return what stands before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """Return the last answer."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, kw_only=True)
class Feedback(Record):
    """One conversation whose last answer got a thumb up or down."""

    liked: bool


@dataclass(frozen=True)
class Preference:
    """One prompt with a better and a worse answer."""

    source: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    group: str | None = None  # what data.group_field says

    @property
    def messages(self) -> tuple[Message, ...]:
        """Return everything that makes the pair what it is."""
        return (*self.prompt, {"chosen": self.chosen, "rejected": self.rejected})

    @property
    def answers(self) -> tuple[str, ...]:
        """Return the answers that carry loss."""
        return (self.chosen, self.rejected)

    @property
    def answer(self) -> str:
        """Return the answer that training makes more likely."""
        return self.chosen


@dataclass(frozen=True)
class DatasetFile:
    """One source of records, with what identifies its content."""

    path: str
    sha256: str
    weight: float
    records: tuple[Any, ...] = field(repr=False)
    bad_rows: tuple[BadRow, ...] = field(repr=False, default=())
    unused: tuple[str, ...] = ()  # columns and keys of messages that hold something and are not read
    missing_words: tuple[tuple[str, int], ...] = ()  # columns in which so many words stand for a missing value


Parser = Callable[[dict[str, Any], str, Data], Any]


def load_datasets(
    dataset_path: str | Sequence[WeightedDataset] | None, parse: Parser, data: Data, key: str
) -> list[DatasetFile]:
    """Read and check every row of one or several sources.

    Raises: UserError with file, line, field and reason of all bad rows, unless `data.on_bad_row` is `skip`.
    """
    if dataset_path is None:
        made = (
            " python -m scripts.make_pairs makes pairs of the adapter's own answers." if key.startswith("dpo.") else ""
        )
        raise UserError(f"{key}: found null, wanted data. Name a file there, or --set {key}=FILE.{made}")
    files = [_load(source, parse, data, key) for source in sources_of(dataset_path)]
    bad = [row for file in files for row in file.bad_rows]
    for file in files if data.on_bad_row == "stop" else ():
        # What stands behind the first semicolon may quote the row.
        kinds = {(row.field, row.reason.partition(";")[0]) for row in file.bad_rows}
        if len(kinds) == 1 and not file.records and len(file.bad_rows) > 1:
            raise UserError(
                f"{key}: none of the {len(file.bad_rows)} rows can be used, all for one reason\n  {file.bad_rows[0]}"
            )
    if bad and data.on_bad_row == "stop":
        total = sum(len(file.records) for file in files) + len(bad)
        raise UserError(
            listing(
                f"{len(bad)} of {total} rows cannot be used",
                map(str, bad),
                "Fix them, or set data.on_bad_row: skip to set them aside.",
            )
        )
    if not any(file.records for file in files):
        raise UserError(f"{key}: found no usable record in {', '.join(file.path for file in files)}.")
    return files


def sources_of(dataset_path: str | Sequence[WeightedDataset] | None) -> list[WeightedDataset]:
    """Return what a `dataset_path` names as a list in any case."""
    return [WeightedDataset(path=dataset_path)] if isinstance(dataset_path, str) else list(dataset_path or ())


def _load(source: WeightedDataset, parse: Parser, data: Data, key: str) -> DatasetFile:
    path = find_file(source.path, key)
    if path is None:
        rows, digest = read_hub(source.path, source.name, source.split, key)
    elif source.name or source.split:
        option = "name" if source.name else "split"
        raise UserError(f"{key}: {source.path}: has `{option}`, which only a dataset of the Hub has. Remove it.")
    else:
        rows, digest = list(read_rows(path)), sha256_file(path)
    if not rows:
        raise UserError(f"{source.path}: the file holds no record. {key} wants at least one.")
    _check_columns(source, rows, key)
    records: list[Any] = []
    bad: list[BadRow] = []
    unused, words = Counter[str](), Counter[str]()
    first: Layout | None = None
    for where, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            renamed = rename(row, source.columns, data.group_field)
            layout = find_layout(renamed)
            first = first or layout
            if first and layout and layout.name != first.name:
                raise RowError(
                    "format",
                    f"found {layout.name}, wanted {first.name} as in the first row; keep one format per file",
                )
            parsed = parse(renamed, where, data)
            records += parsed if isinstance(parsed, list) else [parsed]
        except RowError as error:
            bad.append(BadRow(where, error.field_name, error.reason, row))
        else:
            if layout:
                unused.update(unused_columns(renamed, layout, data.group_field))
                unused.update(name for name in row if name not in renamed and name not in source.columns)
                words.update(missing_words(renamed, layout))
    return DatasetFile(
        source.path, digest, source.weight, tuple(records), tuple(bad), tuple(unused), tuple(words.items())
    )


def _check_columns(source: WeightedDataset, rows: Sequence[tuple[str, Any]], key: str) -> None:
    """Refuse a map of columns that names a column no row has, or one field twice."""
    names = dict.fromkeys(str(name) for _, row in rows if isinstance(row, dict) for name in row)
    for column in source.columns:
        if column not in names:
            raise UserError(
                f"{key}: {source.path}: `columns` names `{column}`, which no row has. Found: {', '.join(names) or 'none'}."
            )
    fields = [name for name in source.columns.values() if name]
    twice = next((name for name in fields if fields.count(name) > 1), None)
    if twice:
        raise UserError(f"{key}: {source.path}: `columns` maps two columns to `{twice}`. Wanted one of each.")


def parse_record(row: dict[str, Any], where: str, data: Data) -> Record:
    """Map a row of any SFT layout to a Record."""
    layout = _layout_of(row, pairs=False)
    if layout.name == PAIR:
        raise RowError(
            "fields", "found preference pairs, wanted instruction records; set dpo.dataset_path to this file"
        )
    _refuse_verdict(row, layout)
    fields = layout.read(row)
    if layout.name == MESSAGES:
        turns = read_turns(fields["messages"], layout.columns["messages"], USER)
    else:
        answer = next(field for field in ANSWERS if field in fields)
        turns = [*_question(fields, layout), *read_turns(fields[answer], layout.columns[answer], ASSISTANT)]
        if not is_missing(fields.get("reasoning_content")):
            turns[-1] = turns[-1].thinking({"reasoning_content": fields["reasoning_content"]}, "reasoning_content")
    turns = _in_order(_merged(_with_system_column(turns, fields, layout), data), data, last=ASSISTANT)
    answers = [index for index, turn in enumerate(turns) if turn.role == ASSISTANT]
    wanted = answers if data.train_on == "all" else answers[-1:]
    trained = [index for index in wanted if turns[index].trained]
    if not trained:
        raise RowError("messages", "holds no answer to train: each has weight 0")
    # What follows the last trained answer teaches nothing.
    return Record(where, _messages(turns[: trained[-1] + 1]), tuple(trained), group_of(row, data))


def parse_preference(row: dict[str, Any], where: str, data: Data) -> Preference:
    """Map a preference row to a Preference.

    Texts stand for one turn each. Without a prompt, chosen and rejected must be message lists: what they share from
    the start is the prompt, and one assistant turn must follow on each side.
    """
    layout = _layout_of(row, pairs=True)
    if layout.name != PAIR:
        _refuse_verdict(row, layout)
        raise RowError(
            "fields", f"found {layout.name}, wanted prompt, chosen and rejected; set sft.dataset_path to this file"
        )
    fields = layout.read(row)
    sides = {
        name: _merged(read_turns(_one_text(fields[name], layout.columns[name]), layout.columns[name], ASSISTANT), data)
        for name in ("chosen", "rejected")
    }
    asked = [fields.get(name) for name in ("prompt", "instruction", "input")]
    given = any(value is not None and value == value for value in asked)
    if given:
        prompt = _merged(_question(fields, layout), data)
    elif any(len(turns) == 1 for turns in sides.values()):
        raise _missing_prompt(row, layout)
    else:
        prompt = _shared_start(*sides.values())
        _check_shared_start(prompt, *sides.values())
    answers = [_answer_after(prompt, turns, layout.columns[name]) for name, turns in sides.items()]
    prompt = _in_order(_merged(_with_system_column(prompt, fields, layout), data), data, last=USER)
    if answers[0].strip() == answers[1].strip():
        raise RowError("rejected", "is the same as chosen, so there is nothing to prefer")
    return Preference(where, _messages(prompt), answers[0], answers[1], group_of(row, data))


def _layout_of(row: dict[str, Any], *, pairs: bool) -> Layout:
    layout = find_layout(row)
    if layout is None:
        raise describe_missing_layout(row, pairs=pairs)
    refuse_unusable(row)
    if "reasoning_content" not in layout.columns and not is_missing(row.get("reasoning_content")):
        raise RowError("reasoning_content", "stands beside the answers; put it into the message that it belongs to")
    return layout


def _refuse_verdict(row: dict[str, Any], layout: Layout) -> None:
    if is_verdict(row, layout):
        label = layout.columns["label"]
        raise RowError(
            label,
            "says that an answer is good or bad, and here a bad one would be trained like a good one; set "
            f"{KTO.name}.dataset_path to this file and run python -m {KTO.script}, or leave the column out: {as_columns({label: None})}",
        )


def _question(fields: dict[str, Any], layout: Layout) -> list[Turn]:
    """Return what is asked, with the turns before it: a prompt, or an instruction with its input."""
    history = _history(fields.get("history"), layout.columns.get("history", ""))
    has_input = not is_missing(fields.get("input"))
    if "prompt" in fields:
        if has_input:
            prompt, more = layout.columns["prompt"], layout.columns["input"]
            join, leave_out = as_columns({prompt: "instruction"}), as_columns({more: None})
            raise RowError(
                more, f"stands beside {prompt}; say beside the path whether it is part of the question: {join} joins both, {leave_out} leaves it out"
            )  # fmt: skip
        return [*history, *read_turns(fields["prompt"], layout.columns["prompt"], USER)]
    instruction = layout.columns.get("instruction", "instruction")
    if isinstance(fields.get("instruction"), str) and (listed := message_list_in(fields["instruction"], instruction)):
        fields = fields | {"instruction": listed}
    if isinstance(fields.get("instruction"), list) and not has_input:
        return [*history, *read_turns(fields["instruction"], instruction, USER)]
    parts = [
        "" if fields.get("instruction") is None else read_text(fields, "instruction", instruction, empty=True),
        read_text(fields, "input", layout.columns["input"], empty=True) if has_input else "",
    ]
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise RowError(instruction, "instruction and input are both empty" if "input" in fields else "is empty")
    return [*history, Turn(USER, prompt)]


def _history(value: Any, name: str) -> list[Turn]:
    """Return the turns before a question: pairs of question and answer, or messages."""
    if isinstance(value, str) and not is_missing(value):
        value = as_list(value)
        if value is None:
            raise RowError(name, "found text, wanted a list of [question, answer]")
    if is_missing(value) or value == []:
        return []
    if isinstance(value, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return [
            Turn(role, read_text({name: text}, name, f"{name}[{number}]"))
            for number, pair in enumerate(value)
            for role, text in zip((USER, ASSISTANT), pair, strict=True)
        ]
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return read_turns(value, name, USER)
    raise RowError(name, "wanted a list of [question, answer], or of messages")


def _with_system_column(turns: list[Turn], fields: dict[str, Any], layout: Layout) -> list[Turn]:
    """Put the system message of a column before the turns."""
    if is_missing(fields.get("system")):
        return turns
    column = layout.columns["system"]
    text = read_text(fields, "system", column)
    if turns and turns[0].role == SYSTEM:
        if turns[0].content.strip() != text.strip():
            raise RowError(column, "differs from the system message in the conversation; keep one of them")
        return turns
    return [Turn(SYSTEM, text), *turns]


def _one_text(value: Any, name: str) -> Any:
    """Return the text of a list with one text, as some preference data have each answer."""
    listed = value
    if isinstance(value, str) and value.lstrip()[:2] in ("['", '["'):
        listed = as_list(value)
    if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
        return value
    if len(listed) > 1:
        raise RowError(name, f"found a list of {len(listed)} answers, wanted one; write a row for each pair")
    return listed[0]


def _missing_prompt(row: dict[str, Any], layout: Layout) -> RowError:
    others = [
        str(name) for name, value in row.items() if isinstance(value, str) and name not in layout.columns.values()
    ]
    hint = f"; if it is another column, say so beside the path: {as_columns({others[0]: 'prompt'})}" if others else ""
    return RowError("prompt", f"is missing; only message lists may carry it inside chosen and rejected{hint}")


def _shared_start(chosen: list[Turn], rejected: list[Turn]) -> list[Turn]:
    """Return the turns that both sides begin with, as far as an answer is left on each."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return [left for left, _ in takewhile(lambda pair: pair[0][:2] == pair[1][:2], pairs)]


def _check_shared_start(shared: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> None:
    number = len(shared)
    if max(len(chosen), len(rejected)) > number + 1:
        left, right = show_difference(chosen, number, rejected), show_difference(rejected, number, chosen)
        raise RowError(
            "rejected",
            "wanted a pair that shares everything before its last answer; chosen and rejected differ from turn "
            f"{number + 1} on: {left} and {right}",
        )


def _answer_after(prompt: list[Turn], turns: list[Turn], name: str) -> str:
    """Return the one answer that follows a prompt, which a side may repeat before it."""
    repeats = [turn[:2] for turn in turns[: len(prompt)]] == [turn[:2] for turn in prompt]
    rest = turns[len(prompt) :] if repeats else turns
    if len(rest) == 1 and rest[0].role == ASSISTANT:
        if not rest[0].trained:
            raise RowError(name, "has weight 0, so there is nothing to prefer")
        return rest[0].content
    reason = "wanted exactly one assistant turn after the prompt"
    if len(turns) > 1 and not repeats:
        number = next(
            (n for n, (own, asked) in enumerate(zip(turns, prompt, strict=False)) if own[:2] != asked[:2]), len(turns)
        )
        own, asked = (show_difference(side, number, other) for side, other in ((turns, prompt), (prompt, turns)))
        reason += (
            f"; its turn {number + 1} is {own}, in the prompt {asked}. Make both the same, or take the prompt from chosen and "
            f"rejected: {as_columns({'prompt': None})}"
        )
    raise RowError(name, reason)


def parse_feedback(row: dict[str, Any], where: str, data: Data) -> Feedback | list[Feedback]:
    """Map a row of prompt, completion and label to a Feedback.

    A preference pair is two: its chosen answer a thumb up and its rejected one a thumb down, as in KTO's paper (Ethayarajh
    et al. 2024, arXiv:2402.01306).
    """
    layout = _layout_of(row, pairs=False)
    if layout.name == PAIR:
        pair = parse_preference(row, where, data)
        return [
            Feedback(where, (*pair.prompt, _message(ASSISTANT, text)), (len(pair.prompt),), pair.group, liked=liked)
            for text, liked in ((pair.chosen, True), (pair.rejected, False))
        ]
    if layout.name != PROMPT:
        raise RowError("fields", f"found {layout.name}, wanted {LABELLED}; set {SFT.name}.dataset_path to this file")
    fields, label = layout.read(row), layout.columns.get("label", "label")
    if is_missing(fields.get("label")):
        name = None if "label" in fields else nearest_column("label", map(str, row))
        fix = f"rename `{name}` to `label`" if name else f"set {SFT.name}.dataset_path to this file, if all are good"
        raise RowError(label, f"is missing, wanted {LABELLED}; {fix}")
    liked = thumb_of(fields["label"])
    if liked is None:
        raise RowError(label, f"found {fields['label']!r}, wanted true or false; 1 and 0, up and down are read, too")
    answer = _merged(read_turns(fields["completion"], layout.columns["completion"], ASSISTANT), data)
    if len(answer) != 1 or answer[0].role != ASSISTANT:
        raise RowError(layout.columns["completion"], "wanted exactly one assistant turn after the prompt")
    prompt = _merged(_question(fields, layout), data)
    prompt = _in_order(_with_system_column(prompt, fields, layout), data, last=USER)
    return Feedback(where, _messages([*prompt, *answer]), (len(prompt),), group_of(row, data), liked=liked)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """Put the configured system message in front of a conversation that has none."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def group_of(row: dict[str, Any], data: Data) -> str | None:
    """Return what keeps a record together with others, written in one way: 7, 7.0 and " 7" are one customer."""
    name = data.group_field
    if name is None:
        return None
    value = row.get(name)
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise RowError(name, "is empty or missing, but data.group_field names it")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(
            name, f"found {type(value).__name__}, wanted text or a number, because data.group_field names it"
        )
    text = " ".join(unicodedata.normalize("NFKC", str(value)).casefold().split())
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)  # a column of numbers with a gap is written as 7.0


def _merged(turns: list[Turn], data: Data) -> list[Turn]:
    return merge_turns(turns) if data.merge_turns else turns


def _in_order(turns: list[Turn], data: Data, last: str) -> list[Turn]:
    """Return turns that take turns, with the configured system message in front where they bring none."""
    if data.system_prompt is not None and not (turns and turns[0].role == SYSTEM):
        turns = [Turn(SYSTEM, data.system_prompt), *turns]
    roles = [turn.role for turn in turns]
    if not takes_turns(roles, last):
        twice = any(left == right for left, right in pairwise(roles))
        raise RowError(
            "messages",
            f"found the turns {', '.join(roles)}; wanted [system,] user, assistant, … ending with {last}"
            + ("; data.merge_turns: true joins consecutive turns of one role" if twice else ""),
        )
    return turns


def _messages(turns: Sequence[Turn]) -> tuple[Message, ...]:
    return tuple(_message(turn.role, turn.content) for turn in turns)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def takes_turns(roles: Sequence[str], last: str) -> bool:
    """Tell whether user and assistant alternate, after a system message at most, and `last` ends the conversation."""
    talk = roles[1:] if roles[:1] == ["system"] else roles
    return bool(talk) and talk[-1] == last and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(talk))


def describe_reading(file: DatasetFile) -> list[str]:
    """Say which columns of a file are not used, and where a word was taken for a missing value."""
    lines = []
    if file.unused:
        shown = ", ".join(file.unused[:20]) + (f" and {len(file.unused) - 20} more" if len(file.unused) > 20 else "")
        lines.append(f"{file.path}: not used: {shown}. If one belongs to the records, name it in `columns`.")
    for column, count in file.missing_words:
        lines.append(f"{file.path}: {column}: {count} cells hold {' or '.join(NO_VALUE)} and are taken as empty")
    return lines


def count_duplicates(records: Sequence[Any]) -> int:
    """Count records that repeat an earlier one word for word."""
    contents = {sha256_json(record.messages) for record in records}
    return len(records) - len(contents)


def write_rejects(path: Path, files: Sequence[DatasetFile]) -> int:
    """Write the rows that were skipped, with the reason beside each."""
    bad = [row for file in files for row in file.bad_rows]
    if bad:
        lines = [
            json.dumps(
                {"source": row.source, "field": row.field, "reason": row.reason, "row": row.row},
                ensure_ascii=False,
                default=str,
            )
            for row in bad
        ]
        # Half a surrogate pair is one of the reasons for a reject; it can only be written as the escape it came as.
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace", newline="\n")
    return len(bad)


# By the kind of record that a training stage names in scripts.common.stages.
PARSERS: dict[str, Parser] = {
    "conversations": parse_record,
    "preferences": parse_preference,
    "feedback": parse_feedback,
}


def load_rest_of_chain(config: Config, read: Collection[str]) -> list[DatasetFile]:
    """Read the files of the training stages that were not read yet, as far as they are here and of use.

    Only their prompts count, for near-duplicates: what is wrong with such a file is for its own stage to say.
    """
    data = config.data.model_copy(update={"on_bad_row": "skip"})
    files: list[DatasetFile] = []
    if not data.validation_ratio and not data.test_ratio:
        return files
    for stage in TRAINING_STAGES.values():
        key = f"{stage.name}.dataset_path"
        for source in () if stage.name in read else sources_of(getattr(config, stage.name).dataset_path):
            try:
                if find_file(source.path, key) is not None:  # what lies on the Hub is not downloaded for this
                    files += load_datasets([source], PARSERS[stage.records], data, key)
            except UserError as error:
                log.info("not searched for near-duplicates: %s", str(error).partition("\n")[0])
    return files
