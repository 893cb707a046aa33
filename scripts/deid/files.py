"""The scrubber's input and output: paths that lose nothing, and rows named without their folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError, did_you_mean
from scripts.dataset.files import SHEETS, BadRow, read_rows

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
# Read, and written as JSONL: a compressed file and a sheet.
UNPACKED = (".gz", *SHEETS)
LINES = (".jsonl", ".csv", ".tsv", ".txt")


def check_paths(source: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse paths that would lose or mix something up."""
    if not source.is_file():
        raise UserError(f"--in {source}: no such file.{did_you_mean(source)}")
    ending, written = source.suffix.lower(), out.suffix.lower()
    if ending not in (*ENDINGS, *UNPACKED):
        raise UserError(
            f"--in {source}: found the ending `{source.suffix}`, wanted one of {', '.join([*ENDINGS, *UNPACKED])}."
        )
    wanted = ".jsonl" if ending in UNPACKED else ending
    if written != wanted:
        why = "; a compressed file or a sheet is written as JSONL" if ending in UNPACKED else " as in --in"
        raise UserError(f"--out {out}: found the ending `{out.suffix}`, wanted `{wanted}`{why}.")
    if out.resolve() == source.resolve() or (out.exists() and out.samefile(source)):
        raise UserError(f"--out {out}: is the input file. Choose another name; the original is never overwritten.")
    _check_encoding(source)
    if out.exists() and not overwrite:
        raise UserError(f"--out {out}: exists already. Choose another name, or replace it with --overwrite.")


def _check_encoding(source: Path) -> None:
    """Refuse UTF-16 and UTF-32, with a byte order mark or without: read as UTF-8 they are one bad line after the other."""
    if source.suffix.lower() in (".parquet", *UNPACKED):
        return
    with source.open("rb") as file:
        start = file.read(4096)
    if b"\0" not in start and start[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return
    raise UserError(
        f"--in {source}: holds zero bytes as UTF-16 and UTF-32 do, wanted UTF-8. Save the file as UTF-8: in Excel as "
        "`CSV UTF-8`, in an editor under Encoding, or `iconv -f UTF-16 -t UTF-8 OLD > NEW`."
    )


def read_input(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file:line, row or BadRow); a line of plain text is a row with the one field `text`.

    The file is named without its folder, whose name may be a person's.
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
