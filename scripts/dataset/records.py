"""From a row to a record: formats, checks, and why a row cannot be used."""

from __future__ import annotations

import difflib
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.common.artifacts import sha256_file, sha256_json
from scripts.common.errors import UserError, listing
from scripts.common.schema import Config, Data, WeightedDataset
from scripts.common.stages import DPO, KTO, SFT, TRAINING_STAGES
from scripts.dataset.files import BadRow, _hub_rows, find_file, read_rows

log = logging.getLogger(__name__)

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
# How the reasoning of an answer stands in its text, and the keys under which data and templates hold it apart.
THINK, END_THINK = "<think>", "</think>"
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# A thumb as files and tables write it; True and False are 1 and 0 here.
THUMBS: dict[object, bool] = {
    1: True, 0: False, "1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False, "up": True, "down": False,
}  # fmt: skip
LABELLED = "prompt, completion and label"
USE_KTO = f"Set {KTO.name}.dataset_path to this file and run `python -m {KTO.script}`"


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


class RowError(Exception):
    def __init__(self, field_name: str, reason: str) -> None:
        self.field_name, self.reason = field_name, reason


Parser = Callable[[dict[str, Any], str, Data], Any]


def load_datasets(
    dataset_path: str | Sequence[WeightedDataset] | None, parse: Parser, data: Data, key: str
) -> list[DatasetFile]:
    """Read and check every row of one or several sources.

    Raises: UserError with file, line, field and reason of all bad rows, unless `data.on_bad_row` is `skip`.
    """
    if dataset_path is None:
        raise UserError(f"{key}: missing; it has no default, so write down a file, or --set {key}=FILE.")
    files = [_load(source, parse, data, key) for source in sources_of(dataset_path)]
    bad = [row for file in files for row in file.bad_rows]
    for file in files if data.on_bad_row == "stop" else ():
        if len({(row.field, row.reason) for row in file.bad_rows}) == 1 and not file.records and len(file.bad_rows) > 1:
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
        rows, digest = _hub_rows(source.path, key)
    else:
        rows, digest = list(read_rows(path)), sha256_file(path)
    records, bad = [], []
    first_format = ""
    for where, row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            row_format = format_of(row)
            first_format = first_format or row_format
            if row_format != first_format:
                raise RowError(
                    "format", f"found {row_format}, wanted {first_format} as in the first row; keep one format per file"
                )
            records.append(parse(row, where, data))
        except RowError as error:
            bad.append(BadRow(where, error.field_name, error.reason, row))
    if not rows:
        raise UserError(f"{source.path}: the file holds no record. {key} wants at least one.")
    return DatasetFile(source.path, digest, source.weight, tuple(records), tuple(bad))


FORMATS = {
    "instruction/input/output": ("instruction", "output"),
    "prompt/chosen/rejected": ("chosen", "rejected"),
    "prompt/completion": ("prompt", "completion"),
    "messages": ("messages",),
}


def format_of(row: dict[str, Any]) -> str:
    """Name the format of a row by its keys; other keys are allowed and ignored."""
    for name, keys in FORMATS.items():
        if all(key in row for key in keys):
            return name
    for keys in FORMATS.values():
        absent = [key for key in keys if key not in row]
        near = [_nearest_name(key, row) for key in absent]
        if all(near):
            renamed = ", ".join(f"`{old}` to `{new}`" for old, new in zip(near, absent, strict=True))
            raise RowError("fields", f"found {', '.join(map(str, row))}; rename {renamed}")
    wanted = "; ".join(" + ".join(keys) for keys in FORMATS.values())
    raise RowError("fields", f"found {', '.join(map(str, row)) or 'none'}; wanted one of: {wanted}")


def _nearest_name(key: str, row: dict[str, Any]) -> str | None:
    names = {str(name).strip().lower(): str(name) for name in row}
    near = difflib.get_close_matches(key, names, cutoff=0.75)
    return names[near[0]] if near else None


def parse_record(row: dict[str, Any], where: str, data: Data) -> Record:
    """Map a row of any SFT format to a Record."""
    row_format = format_of(row)
    if row_format == "instruction/input/output":
        parts = [
            _text(row, "instruction", empty=True),
            _text(row, "input", empty=True) if row.get("input") is not None else "",
        ]
        prompt = "\n\n".join(part for part in parts if part.strip())
        if not prompt:
            raise RowError("instruction", "instruction and input are both empty")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _text(row, "output")}]
    elif row_format == "prompt/completion":
        if thumb_of(row) is not None:
            raise RowError(
                "label", f"found {row['label']!r}: a thumb up or down, which SFT would ignore. {USE_KTO}; "
                "or rename the field, if it says something else",
            )  # fmt: skip
        messages = [*_turns(row["prompt"], "prompt", "user"), *_turns(row["completion"], "completion", "assistant")]
    elif row_format == "messages":
        messages = _turns(row["messages"], "messages", "user")
    else:
        raise RowError(
            "fields", "found preference pairs, wanted instruction records; set dpo.dataset_path to this file"
        )
    messages = with_system_prompt(messages, data.system_prompt)
    _check_order(messages, last="assistant")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return Record(where, tuple(messages), tuple(answers if data.train_on == "all" else answers[-1:]), _group(row, data))


def parse_preference(row: dict[str, Any], where: str, data: Data) -> Preference:
    """Map a preference row to a Preference.

    Texts stand for one turn each. Without a prompt, chosen and rejected must be message lists: what they share from
    the start is the prompt, and one assistant turn must follow on each side.
    """
    if format_of(row) != "prompt/chosen/rejected":
        if thumb_of(row) is not None:
            raise RowError(
                "label", f"found single answers with a thumb up or down, wanted chosen and rejected. {USE_KTO}"
            )
        raise RowError(
            "fields", f"found {format_of(row)}, wanted prompt, chosen and rejected; set sft.dataset_path to this file"
        )
    chosen, rejected = _turns(row["chosen"], "chosen", "assistant"), _turns(row["rejected"], "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "prompt", "user")
    elif isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise RowError("prompt", "is missing; only message lists may carry it inside chosen and rejected")
    else:
        prompt = [left for left, right in zip(chosen[:-1], rejected[:-1], strict=False) if left == right]
    answers = []
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            raise RowError(name, "wanted exactly one assistant turn after the prompt")
        answers.append(rest[0]["content"])
    prompt = with_system_prompt(prompt, data.system_prompt)
    _check_order(prompt, last="user")
    if answers[0].strip() == answers[1].strip():
        raise RowError("rejected", "is the same as chosen, so there is nothing to prefer")
    return Preference(where, tuple(prompt), answers[0], answers[1], _group(row, data))


def thumb_of(row: dict[str, Any]) -> bool | None:
    """Return what the label of an answer says; None where there is none or it is no thumb."""
    label = row.get("label") if {"prompt", "completion"} <= row.keys() else None
    if not isinstance(label, str | bool | int | float):
        return None
    return THUMBS.get(label.strip().casefold() if isinstance(label, str) else label)


def parse_feedback(row: dict[str, Any], where: str, data: Data) -> Feedback:
    """Map a row of prompt, completion and label to a Feedback."""
    row_format = format_of(row)
    if row_format != "prompt/completion":
        stage = DPO if row_format == "prompt/chosen/rejected" else SFT
        raise RowError("fields", f"found {row_format}, wanted {LABELLED}; set {stage.name}.dataset_path to this file")
    if row.get("label") is None:
        name = None if "label" in row else _nearest_name("label", row)
        fix = f"rename `{name}` to `label`" if name else f"set {SFT.name}.dataset_path to this file, if all are good"
        raise RowError("label", f"is missing, wanted {LABELLED}; {fix}")
    liked = thumb_of(row)
    if liked is None:
        raise RowError("label", f"found {row['label']!r}, wanted true or false; 1 and 0, up and down are read, too")
    prompt, answer = _turns(row["prompt"], "prompt", "user"), _turns(row["completion"], "completion", "assistant")
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise RowError("completion", "wanted exactly one assistant turn after the prompt")
    prompt = with_system_prompt(prompt, data.system_prompt)
    _check_order(prompt, last="user")
    return Feedback(where, (*prompt, *answer), (len(prompt),), _group(row, data), liked=liked)


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """Put the configured system message in front of a conversation that has none."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def _group(row: dict[str, Any], data: Data) -> str | None:
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


def _text(row: dict[str, Any], name: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(name, f"found {type(value).__name__}, wanted text")
    if not value.strip() and not empty:
        raise RowError(name, "is empty")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise RowError(name, "holds half of a surrogate pair, which no tokenizer can read")
    return value


def _turns(value: Any, name: str, role: str) -> list[Message]:
    """Read a text as one turn of `role`, or a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": _text({name: value}, name)}]
    if not isinstance(value, list) or not value:
        raise RowError(name, f"found {type(value).__name__}, wanted text or a list of messages with role and content")
    turns = []
    for number, message in enumerate(value):
        at = f"{name}[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RowError(at, "wanted an object with role and content")
        if message["role"] not in ROLES:
            raise RowError(f"{at}.role", f"found {message['role']!r}, wanted one of {', '.join(ROLES)}")
        content = _text({f"{at}.content": message["content"]}, f"{at}.content", empty=message["role"] == "system")
        if message["role"] == "assistant":
            content = _with_reasoning(message, content, at)
        turns.append({"role": message["role"], "content": content})
    return turns


def _with_reasoning(message: dict[str, Any], content: str, at: str) -> str:
    """Put the reasoning that a message holds apart before its content, where rendering looks for it."""
    given = [key for key in REASONING_KEYS if message.get(key)]
    if not given:
        return content
    if len(given) > 1 or content.lstrip().startswith(THINK):
        places = [*given, "content"] if len(given) == 1 else given
        raise RowError(at, f"holds reasoning in {' and in '.join(places)}; keep one of them")
    reasoning = _text({f"{at}.{given[0]}": message[given[0]]}, f"{at}.{given[0]}").strip("\n")
    return f"{THINK}\n{reasoning}\n{END_THINK}\n\n{content}"


def takes_turns(roles: Sequence[str], last: str) -> bool:
    """Tell whether user and assistant alternate, after a system message at most, and `last` ends the conversation."""
    talk = roles[1:] if roles[:1] == ["system"] else roles
    return bool(talk) and talk[-1] == last and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(talk))


def _check_order(messages: Sequence[Message], last: str) -> None:
    roles = [message["role"] for message in messages]
    if not takes_turns(roles, last):
        raise RowError(
            "messages", f"found the turns {', '.join(roles)}; wanted [system,] user, assistant, … ending with {last}"
        )


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
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
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
