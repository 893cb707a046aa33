"""Read the rows of any supported file, and say where one cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from scripts.common.artifacts import sha256_json
from scripts.common.errors import UserError, did_you_mean, not_utf8
from scripts.common.paths import ROOT, resolve


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be used."""

    source: str
    field: str
    reason: str
    row: Any = None

    def __str__(self) -> str:
        return f"{self.source}: {self.field}: {self.reason}"


def find_file(name: str, key: str) -> Path | None:
    """Find a file from the working folder or the repository; None means the name is meant for the Hub."""
    try:
        path = resolve(name)
        if path.is_file():
            return path
        if path.is_dir():
            raise UserError(f"{key}: {name}: is a folder, wanted one file; list several files with their weights.")
    except OSError as error:  # a name that no file can have
        raise UserError(f"{key}: {name}: {error.strerror}. Correct the path.") from None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.search(
        r"\.(jsonl?|csv|tsv|parquet|gz|xlsx?|ods|txt|md)$", name
    ):
        return None
    near = did_you_mean(name) or did_you_mean(ROOT / name)
    raise UserError(
        f"{key}: {name}: no such file.{near or ' Correct the path, or give a Hub dataset id of the form owner/name.'}"
    )


def read_hub(name: str, configuration: str | None, split: str | None, key: str) -> tuple[list[tuple[str, Any]], str]:
    """Return the rows of a Hub dataset's split, each with its place, and a hash of them."""
    import datasets

    wanted = split or "train"
    try:
        table = datasets.load_dataset(name, configuration, split=wanted)
    except Exception as error:  # the library raises a dozen kinds for "not reachable" and "not there"
        said = " ".join(str(error).split())[:400]
        raise UserError(
            f"{key}: cannot load the Hub dataset {name}, split {wanted} ({type(error).__name__}: {said}). "
            "Are path, name and split right and the Hub reachable? Without a network, use a local file."
        ) from None
    rows = [(f"{name}:{number}", dict(row)) for number, row in enumerate(table, 1)]
    return rows, sha256_json([row for _, row in rows])


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row) of a JSONL, JSON, CSV, TSV or Parquet file or of a sheet; what cannot be decoded comes as a BadRow.

    JSONL, JSON and CSV may be compressed with gzip.
    """
    readers = {
        ".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows, **dict.fromkeys(SHEETS, _sheet_rows)
    }  # fmt: skip
    ending = path.suffix.lower()
    if ending == ".gz":
        inner = Path(path.stem).suffix.lower()
        reader = readers.get(inner) if inner in (".jsonl", ".json", ".csv", ".tsv") else None
    else:
        reader = readers.get(ending)
    if reader is None:
        text = " python -m scripts.start makes records of documents." if ending in (".txt", ".md") else ""
        raise UserError(f"{path}: found the ending `{path.suffix}`, wanted one of {', '.join(readers)}.{text}")
    return _unpacked(path, reader(path)) if ending == ".gz" else reader(path)


def _unpacked(path: Path, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    try:
        yield from rows
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a gzip file that can be read ({error}). Compress it again.") from None


def _open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Binary lines end at \n only; text mode and splitlines() would cut a record that holds U+2028 or \r.
    with _open_bytes(path) as file:
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
                fix = "; a list of records is read from a file that ends in .json" if isinstance(row, list) else ""
                row = BadRow(where, "json", f"found {type(row).__name__}, wanted an object {{…}}{fix}")
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
        with _open_bytes(path) as file:
            return file.read().decode("utf-8-sig")
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
    rows = _list_in(rows, path)
    for number, row in enumerate(rows, 1):
        where = f"{path}: record {number}"
        yield (
            where,
            row if isinstance(row, dict) else BadRow(where, "json", f"found {type(row).__name__}, wanted an object"),
        )


def _list_in(value: Any, path: Path) -> list[Any]:
    """Return the records of a JSON document: a list, one list in an object, or columns as pandas writes them."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        names, columns = value.get("columns"), list(value.values())
        if isinstance(names, list) and isinstance(value.get("data"), list) and all(isinstance(row, list) and len(row) == len(names) for row in value["data"]):  # fmt: skip
            return [dict(zip(names, row, strict=True)) for row in value["data"]]
        lists = {
            name: inner
            for name, inner in value.items()
            if isinstance(inner, list) and inner and isinstance(inner[0], dict)
        }
        if len(lists) == 1:
            return next(iter(lists.values()))
        if lists:
            raise UserError(
                f"{path}: found lists of records under {', '.join(lists)}, wanted one. Save each as a file of its own."
            )
        if columns and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
            return [{name: column[index] for name, column in value.items()} for index in columns[0]]
        if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    raise UserError(f"{path}: found {type(value).__name__}, wanted a list of objects; one object per line is .jsonl.")


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is less than a long document
    # newline="\n" keeps the line breaks inside quoted cells as they are; the file is streamed.
    with io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline="\n") as file:
        reader, skipped = csv.reader(()), 0
        try:
            head = read_head(file)
            skipped = bool(head.preamble)
            reader = csv.reader(file, strict=True, delimiter=head.delimiter)
            header = names_of(next(reader, []), path)
            for cells in reader:
                if not any(map(str.strip, cells)):  # Excel leaves such rows behind
                    continue
                while len(cells) > len(header) and not cells[-1].strip():  # separators at the end of the line
                    cells.pop()
                where = f"{path}:{skipped + reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
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
            line = skipped + reader.line_num
            cure = _quotes_cure(path, line) if "expected after" in str(error) else ""
            raise UserError(f"{path}:{line}: not valid CSV ({error}).{cure}") from None
        except UnicodeDecodeError:
            _read_text(path)  # says where; decoding a stream knows only the place within a block
            raise


def _quotes_cure(path: Path, line: int) -> str:
    """Say how to write a quotation mark in a cell, where a backslash stands before it."""
    lines = _read_text(path).split("\n")[:line]
    if any('\\"' in text for text in lines[-20:]):
        return (
            ' In a CSV a quotation mark in a cell is written twice, "", not \\". Save it so (pandas: to_csv without '
            "escapechar; MySQL and Spark: escape='\"'), or as .jsonl."
        )
    return ' Write a quotation mark in a cell twice, "".'


SAMPLED = 2**16  # characters by which a separator is chosen


class Head(NamedTuple):
    """What stands above the rows of a CSV: Excel's line that names the separator, or nothing; and the separator."""

    preamble: str
    delimiter: str


def read_head(file: TextIO) -> Head:
    """Tell which separator a CSV uses, and leave the file at its header.

    Excel writes what the country's settings say, and reads a first line `sep=;`.
    """
    first = file.readline()
    if said := re.fullmatch(r'"?sep=(.)"?[\r\n]*', first, re.IGNORECASE):
        return Head(first, said[1])
    sample = first + file.read(SAMPLED)
    file.seek(0)
    return Head("", max("\t;,", key=lambda separator: (_rows_alike(sample, separator), first.count(separator))))


def _rows_alike(sample: str, separator: str) -> int:
    """Count the rows that a separator parts as it parts the header: names and texts hold the other separators too."""
    try:
        header, *rows = csv.reader(io.StringIO(sample, newline="\n"), delimiter=separator)
    except (csv.Error, ValueError):  # reading the file says what is wrong with it
        return 0
    width = len(header)
    return sum(len(row) >= width and not any(row[width:]) for row in rows) if width > 1 else 0


def names_of(header: Sequence[str], path: Path) -> list[str]:
    """Return the names of the columns; one without a name, such as pandas' index, is called by its number."""
    twice = next((name for name in header if name.strip() and header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}:1: the column `{twice}` stands twice. Rename or remove one.")
    return [name if name.strip() else f"column {number}" for number, name in enumerate(header, 1)]


SHEETS = (".xlsx", ".xlsm", ".xls", ".ods")


def _sheet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the one sheet of a workbook that holds any; cells become text."""
    import python_calamine

    try:
        book = python_calamine.CalamineWorkbook.from_path(str(path))
        sheets = [(name, book.get_sheet_by_name(name).to_python(skip_empty_area=False)) for name in book.sheet_names]
    except (python_calamine.CalamineError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a workbook that can be read ({' '.join(str(error).split())[:200]}).") from None
    sheets = [(name, cells) for name, cells in sheets if any(any(map(_cell_text, row)) for row in cells)]
    if len(sheets) > 1:
        names = ", ".join(name for name, _ in sheets)
        raise UserError(
            f"{path}: found {len(sheets)} sheets ({names}), wanted one. Save the one with the records by itself."
        )
    for _, cells in sheets:
        texts = [[_cell_text(cell) for cell in row] for row in cells]
        top = next(number for number, row in enumerate(texts) if any(row))
        header = names_of(texts[top], path)
        for number, row in enumerate(texts[top + 1 :], top + 2):
            if any(row):
                yield f"{path}:{number}", dict(zip(header, row, strict=True))


def _cell_text(cell: Any) -> str:
    if isinstance(cell, float) and cell.is_integer():  # a sheet knows no whole numbers
        return str(int(cell))
    return str(cell) if not isinstance(cell, str) or cell.strip() else ""


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
