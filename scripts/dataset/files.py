"""Read the rows of any supported file, and say where one cannot be read."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

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
