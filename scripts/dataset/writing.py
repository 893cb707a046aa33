"""Write rows as a stream in any supported format: the counterpart of the readers in files.py."""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from scripts.dataset.files import names_of, read_head

Row: TypeAlias = dict[str, Any]
Write: TypeAlias = Callable[[Row], Any]


@contextmanager
def open_output(path: Path, source: Path) -> Iterator[Write]:
    """Open a file for writing rows in the format of its ending.

    `source`, a file of that format, gives a CSV its columns, separator and byte order mark, and a Parquet file its schema.
    A line of plain text (.txt) is a row with the one field `text`. The function given raises ValueError for a row that the
    format cannot hold.
    """
    writers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text, ".parquet": _parquet}
    yield from writers[path.suffix.lower()](path, source)


def _dumps(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _jsonl(path: Path, source: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield lambda row: file.write(_dumps(row) + "\n")


def _json(path: Path, source: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        comma = "["

        def write(row: Row) -> None:
            nonlocal comma
            file.write(f"{comma}\n{_dumps(row)}")
            comma = ","

        yield write
        file.write("[]\n" if comma == "[" else "\n]\n")


def _csv(path: Path, source: Path) -> Iterator[Write]:
    with source.open(encoding="utf-8-sig", newline="\n") as file:
        head = read_head(file)
        header = next(csv.reader(file, delimiter=head.delimiter), [])
    with source.open("rb") as bytes_of:
        encoding = "utf-8-sig" if bytes_of.read(3) == BOM_UTF8 else "utf-8"
    with path.open("w", encoding=encoding, newline="") as file:
        file.write(head.preamble)
        csv.writer(file, delimiter=head.delimiter, lineterminator="\n").writerow(
            header
        )  # with columns that have no name
        yield csv.DictWriter(file, names_of(header, source), delimiter=head.delimiter, lineterminator="\n").writerow


def _text(path: Path, source: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield lambda row: file.write(row["text"] + "\n")


def _parquet(path: Path, source: Path) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(source)
    rows: list[Any] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def write(row: Row) -> None:
            try:
                rows.append(pyarrow.RecordBatch.from_pylist([row], schema))
            except (pyarrow.ArrowException, TypeError) as error:
                raise ValueError("a column of numbers cannot hold the new value; store it as text") from error
            if len(rows) == 1000:
                writer.write_table(pyarrow.Table.from_batches(rows).combine_chunks())
                rows.clear()

        yield write
        if rows:
            writer.write_table(pyarrow.Table.from_batches(rows, schema).combine_chunks())
