"""Read and write the files of the scrubber as streams, in their own format and order."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError, did_you_mean
from scripts.common.records import BadRow, delimiter_of, read_rows

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
LINES = (".jsonl", ".csv", ".txt")
Row = dict[str, Any]


def read_input(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row or BadRow); a line of plain text is a row with the one field `text`.

    The file's name stands in without its folder, which may name a person.
    """
    rows = _text_lines(path) if path.suffix.lower() == ".txt" else read_rows(path)
    for where, row in rows:
        yield path.name + where.removeprefix(str(path)), row


def _text_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n")
            except UnicodeDecodeError:
                yield where, BadRow(where, "encoding", "not UTF-8")
            else:
                yield where, {"text": text}


def count_rows(path: Path) -> int | None:
    """Estimate the number of rows for the progress bar; None where that would mean reading the file."""
    if path.suffix.lower() not in LINES:
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


@contextmanager
def open_output(path: Path, source: Path) -> Iterator[Callable[[Row], None]]:
    """Open a file for writing rows in the format of its ending; `source` gives a Parquet file its schema.

    The function given raises ValueError for a row that the format cannot hold.
    """
    writers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _text, ".parquet": _parquet}
    yield from writers[path.suffix.lower()](path, source)


def _dumps(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)


def _jsonl(path: Path, source: Path) -> Iterator[Callable[[Row], None]]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield lambda row: _written(file.write(_dumps(row) + "\n"))


def _json(path: Path, source: Path) -> Iterator[Callable[[Row], None]]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        comma = "["

        def write(row: Row) -> None:
            nonlocal comma
            file.write(f"{comma}\n{_dumps(row)}")
            comma = ","

        yield write
        file.write("[]\n" if comma == "[" else "\n]\n")


def _csv(path: Path, source: Path) -> Iterator[Callable[[Row], None]]:
    with source.open(encoding="utf-8-sig", newline="\n") as file:
        header = next(csv.reader(file, delimiter=delimiter_of(file)), [])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        yield lambda row: _written(writer.writerow(row))


def _text(path: Path, source: Path) -> Iterator[Callable[[Row], None]]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield lambda row: _written(file.write(row["text"] + "\n"))


def _parquet(path: Path, source: Path) -> Iterator[Callable[[Row], None]]:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(source)
    rows: list[Any] = []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def write(row: Row) -> None:
            try:
                rows.append(pyarrow.RecordBatch.from_pylist([row], schema))
            except (pyarrow.ArrowException, TypeError) as error:
                raise ValueError("a column of numbers cannot hold what replaces a value; store it as text") from error
            if len(rows) == 1000:
                writer.write_table(pyarrow.Table.from_batches(rows).combine_chunks())
                rows.clear()

        yield write
        if rows:
            writer.write_table(pyarrow.Table.from_batches(rows, schema).combine_chunks())


def _written(_: Any) -> None:
    """Turn a writing call into a statement."""


def check_paths(source: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse paths that would lose or mix something up."""
    if not source.is_file():
        raise UserError(f"--in {source}: no such file.{did_you_mean(source)}")
    for flag, path in (("--in", source), ("--out", out)):
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{flag} {path}: found the ending `{path.suffix}`, wanted one of {', '.join(ENDINGS)}.")
    if source.suffix.lower() != out.suffix.lower():
        raise UserError(f"--out {out}: found the ending `{out.suffix}`, wanted `{source.suffix}` as in --in.")
    if out.resolve() == source.resolve() or (out.exists() and out.samefile(source)):
        raise UserError(f"--out {out}: is the input file. Choose another name; the original is never overwritten.")
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: exists already. Choose another name, or replace it with --overwrite.")
