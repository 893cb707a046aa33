"""Read training records from any supported file or format, check every row, and split by prompt."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from scripts.common.artifacts import sha256_file, sha256_json
from scripts.common.config import ROOT
from scripts.common.errors import UserError, did_you_mean, listing, not_utf8
from scripts.common.schema import Data, WeightedDataset

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Record:
    """One conversation; the assistant turns named in `trained` carry the loss."""

    source: str
    messages: tuple[Message, ...]
    trained: tuple[int, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Return what stands before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """Return the last answer."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Preference:
    """One prompt with a better and a worse answer."""

    source: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str

    @property
    def messages(self) -> tuple[Message, ...]:
        """Return everything that makes the pair what it is."""
        return (*self.prompt, {"chosen": self.chosen, "rejected": self.rejected})

    @property
    def answer(self) -> str:
        """Return the answer that training makes more likely."""
        return self.chosen


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be used."""

    source: str
    field: str
    reason: str
    row: Any = None

    def __str__(self) -> str:
        return f"{self.source}: {self.field}: {self.reason}"


@dataclass(frozen=True)
class DatasetFile:
    """One source of records, with what identifies its content."""

    path: str
    sha256: str
    weight: float
    records: tuple[Any, ...] = field(repr=False)
    bad_rows: tuple[BadRow, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Split:
    """Training and validation records; the side follows from the prompt alone."""

    train: tuple[Any, ...]
    validation: tuple[Any, ...]


class _RowError(Exception):
    def __init__(self, field_name: str, reason: str) -> None:
        self.field_name, self.reason = field_name, reason


Parser = Callable[[dict[str, Any], str, Data], Any]


def load_datasets(
    dataset_path: str | Sequence[WeightedDataset], parse: Parser, data: Data, key: str
) -> list[DatasetFile]:
    """Read and check every row of one or several sources.

    Raises: UserError with file, line, field and reason of all bad rows, unless `data.on_bad_row` is `skip`.
    """
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
                "Mend them, or set data.on_bad_row: skip to set them aside.",
            )
        )
    if not any(file.records for file in files):
        raise UserError(f"{key}: found no usable record in {', '.join(file.path for file in files)}.")
    return files


def sources_of(dataset_path: str | Sequence[WeightedDataset]) -> list[WeightedDataset]:
    """Return what a `dataset_path` names as a list in any case."""
    return [WeightedDataset(path=dataset_path)] if isinstance(dataset_path, str) else list(dataset_path)


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
                raise _RowError(
                    "format", f"found {row_format}, wanted {first_format} as in the first row; keep one format per file"
                )
            records.append(parse(row, where, data))
        except _RowError as error:
            bad.append(BadRow(where, error.field_name, error.reason, row))
    if not rows:
        raise UserError(f"{source.path}: the file holds no record. {key} wants at least one.")
    return DatasetFile(source.path, digest, source.weight, tuple(records), tuple(bad))


def find_file(name: str, key: str) -> Path | None:
    """Find a file from the working folder or the repository; None means the name is meant for the Hub."""
    for path in (Path(name), ROOT / name):
        try:
            if path.is_file():
                return path
            if path.is_dir():
                raise UserError(f"{key}: {name}: is a folder, wanted one file; list several files with their weights.")
        except OSError as error:  # a name that no file can have
            raise UserError(f"{key}: {name}: {error.strerror}. Correct the path.") from None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.search(r"\.(jsonl?|csv|parquet)$", name):
        return None
    near = did_you_mean(name) or did_you_mean(ROOT / name)
    raise UserError(
        f"{key}: {name}: no such file.{near or ' Correct the path, or give a Hub dataset id of the form owner/name.'}"
    )


def _hub_rows(name: str, key: str) -> tuple[list[tuple[str, Any]], str]:
    import datasets

    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises a dozen kinds for "not reachable" and "not there"
        raise UserError(
            f"{key}: cannot load the Hub dataset {name} ({type(error).__name__}). "
            "Is the name right and the Hub reachable? Without a network, use a local file."
        ) from None
    rows = [(f"{name}:{number}", dict(row)) for number, row in enumerate(table, 1)]
    return rows, sha256_json([row for _, row in rows])


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row) of a JSONL, JSON, CSV or Parquet file; what cannot be decoded comes as a BadRow."""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        sheet = " Save the sheet as `CSV UTF-8`." if path.suffix.lower() in (".xlsx", ".xls", ".ods", ".tsv") else ""
        raise UserError(f"{path}: found the ending `{path.suffix}`, wanted one of {', '.join(readers)}.{sheet}")
    return reader(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Binary lines end at \n only; text mode and splitlines() would cut a record that holds U+2028 or \r.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                if number == 1 and text.strip() in ("[", "{"):
                    raise UserError(
                        f"{where}: JSON that goes over several lines, wanted one object per line. "
                        "A list [...] is read from a file that ends in .json."
                    )
                row = json.loads(text, object_pairs_hook=_unique_keys)
            except UnicodeDecodeError as error:
                if number == 1 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise not_utf8(path, error) from None
                row = BadRow(
                    where, "encoding", f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
                )
            except (ValueError, RecursionError) as error:
                comma = ", without a comma at its end" if text.rstrip().endswith(",") else ""
                row = BadRow(where, "json", f"not valid JSON ({_reason(error)}); one object per line{comma}")
            if not isinstance(row, dict | BadRow):
                mend = "; a list of records is read from a file that ends in .json" if isinstance(row, list) else ""
                row = BadRow(where, "json", f"found {type(row).__name__}, wanted an object {{…}}{mend}")
            yield where, row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; of a key written twice JSON would silently keep the last value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"`{next(name for name in names if names.count(name) > 1)}` is written twice")
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number with thousands of digits" if "integer string conversion" in str(error) else str(error)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(_read_text(path), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        hint = "; one object per line is .jsonl" if error.msg == "Extra data" else ""
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}). Wanted a list of objects{hint}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({_reason(error)}). Wanted a list of objects.") from None
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: found {type(rows).__name__}, wanted a list of objects; one object per line is .jsonl."
        )
    for number, row in enumerate(rows, 1):
        where = f"{path}: record {number}"
        yield (
            where,
            row if isinstance(row, dict) else BadRow(where, "json", f"found {type(row).__name__}, wanted an object"),
        )


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is less than a long document
    # newline="\n" keeps the line breaks inside quoted cells as they are; the file is streamed.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            reader = csv.reader(file, strict=True, delimiter=delimiter_of(file))
            header = next(reader, [])
            _check_header(header, path)
            for cells in reader:
                if not any(map(str.strip, cells)):  # Excel leaves such rows behind
                    continue
                where = f"{path}:{reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
                if len(cells) == len(header):
                    yield where, dict(zip(header, cells, strict=True))
                else:
                    reason = f"found {len(cells)} cells, wanted the {len(header)} of the header"
                    reason += (
                        '; put "quotes" around a text that holds the separator' if len(cells) > len(header) else ""
                    )
                    yield where, BadRow(where, "columns", reason, cells)
        except csv.Error as error:
            if "new-line character" in str(error):
                error = csv.Error(
                    "a bare carriage return ends a line; save the file with line ends of today, \\n or \\r\\n"
                )
            raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error}).") from None
        except UnicodeDecodeError:
            _read_text(path)  # says where; decoding a stream knows only the place within a block
            raise


def delimiter_of(file: TextIO) -> str:
    """Tell by the header which separator a CSV uses: Excel writes what the country's settings say."""
    header = file.readline()
    file.seek(0)
    return max(",;\t", key=header.count)


def _check_header(header: Sequence[str], path: Path) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}:1: the column `{twice}` stands twice. Rename or remove one.")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}: record {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: not a Parquet file that can be read ({' '.join(str(error).split())[:200]})."
        ) from None


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
            raise _RowError("fields", f"found {', '.join(map(str, row))}; rename {renamed}")
    wanted = "; ".join(" + ".join(keys) for keys in FORMATS.values())
    raise _RowError("fields", f"found {', '.join(map(str, row)) or 'none'}; wanted one of: {wanted}")


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
            raise _RowError("instruction", "instruction and input are both empty")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _text(row, "output")}]
    elif row_format == "prompt/completion":
        messages = [*_turns(row["prompt"], "prompt", "user"), *_turns(row["completion"], "completion", "assistant")]
    elif row_format == "messages":
        messages = _turns(row["messages"], "messages", "user")
    else:
        raise _RowError(
            "fields", "found preference pairs, wanted instruction records; set dpo.dataset_path to this file"
        )
    messages = with_system_prompt(messages, data.system_prompt)
    _check_order(messages, last="assistant")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return Record(where, tuple(messages), tuple(answers if data.train_on == "all" else answers[-1:]))


def parse_preference(row: dict[str, Any], where: str, data: Data) -> Preference:
    """Map a preference row to a Preference.

    Texts stand for one turn each. Without a prompt, chosen and rejected must be message lists: what they share from
    the start is the prompt, and one assistant turn must follow on each side.
    """
    if format_of(row) != "prompt/chosen/rejected":
        raise _RowError(
            "fields", f"found {format_of(row)}, wanted prompt, chosen and rejected; set sft.dataset_path to this file"
        )
    chosen, rejected = _turns(row["chosen"], "chosen", "assistant"), _turns(row["rejected"], "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "prompt", "user")
    elif isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise _RowError("prompt", "is missing; only message lists may carry it inside chosen and rejected")
    else:
        prompt = [left for left, right in zip(chosen[:-1], rejected[:-1], strict=False) if left == right]
    answers = []
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            raise _RowError(name, "wanted exactly one assistant turn after the prompt")
        answers.append(rest[0]["content"])
    prompt = with_system_prompt(prompt, data.system_prompt)
    _check_order(prompt, last="user")
    if answers[0].strip() == answers[1].strip():
        raise _RowError("rejected", "is the same as chosen, so there is nothing to prefer")
    return Preference(where, tuple(prompt), answers[0], answers[1])


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """Put the configured system message in front of a conversation that has none."""
    if system_prompt is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def _text(row: dict[str, Any], name: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _RowError(name, f"found {type(value).__name__}, wanted text")
    if not value.strip() and not empty:
        raise _RowError(name, "is empty")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise _RowError(name, "holds half of a surrogate pair, which no tokenizer can read")
    return value


def _turns(value: Any, name: str, role: str) -> list[Message]:
    """Read a text as one turn of `role`, or a list of messages as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": _text({name: value}, name)}]
    if not isinstance(value, list) or not value:
        raise _RowError(name, f"found {type(value).__name__}, wanted text or a list of messages with role and content")
    turns = []
    for number, message in enumerate(value):
        at = f"{name}[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise _RowError(at, "wanted an object with role and content")
        if message["role"] not in ROLES:
            raise _RowError(f"{at}.role", f"found {message['role']!r}, wanted one of {', '.join(ROLES)}")
        content = _text({f"{at}.content": message["content"]}, f"{at}.content", empty=message["role"] == "system")
        turns.append({"role": message["role"], "content": content})
    return turns


def _check_order(messages: Sequence[Message], last: str) -> None:
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk[-1] != last or talk != [("user", "assistant")[i % 2] for i in range(len(talk))]:
        raise _RowError(
            "messages", f"found the turns {', '.join(roles)}; wanted [system,] user, assistant, … ending with {last}"
        )


def prompt_key(messages: Sequence[Message]) -> str:
    """Return what decides the side of a record: its first user turn, case and white space aside.

    Conversations that open alike stay together, whatever their format, stage or later turns.
    """
    first = next(message["content"] for message in messages if message["role"] == "user")
    return " ".join(first.casefold().split())


def is_validation(messages: Sequence[Message], data: Data) -> bool:
    """Decide by hash, so that a prompt falls on the same side in every file, stage and order of rows."""
    digest = hashlib.sha256(f"{data.split_seed}\n{prompt_key(messages)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < data.validation_ratio * 2**64


def split_records(files: Sequence[DatasetFile], data: Data, seed: int) -> Split:
    """Split by prompt, then mix the training side by the weights of the sources."""
    train: list[Any] = []
    validation: list[Any] = []
    for file in files:
        kept = [record for record in file.records if not is_validation(record.prompt, data)]
        validation += [record for record in file.records if is_validation(record.prompt, data)]
        whole, part = divmod(file.weight, 1)
        train += kept * int(whole)
        train += random.Random(seed).sample(kept, round(part * len(kept)))
    if not train:
        raise UserError(
            f"data.validation_ratio: {data.validation_ratio} leaves no record to train on. Lower it, or vary the prompts: "
            "records with the same prompt always stay on one side."
        )
    return Split(tuple(train), tuple(validation))


def count_duplicates(records: Sequence[Any]) -> int:
    """Count records that repeat an earlier one word for word."""
    contents = {sha256_json(record.messages) for record in records}
    return len(records) - len(contents)


def shared_answers(split: Split) -> int:
    """Count validation answers that also stand in training: they make the held-out loss look better than it is."""
    trained = {record.answer.strip() for record in split.train}
    return sum(record.answer.strip() in trained for record in split.validation)


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
