"""Look at files: which stage each is for, what its columns are, and how many of its rows can be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from scripts.common.errors import UserError, did_you_mean
from scripts.common.paths import ROOT, portable_path, resolve
from scripts.common.schema import Data, RecordField, WeightedDataset
from scripts.common.stages import DPO, KTO, SFT, TrainingStage
from scripts.dataset.columns import (
    ANSWERS,
    ASSISTANT,
    PAIR,
    Layout,
    Row,
    RowError,
    describe_missing_layout,
    find_layout,
    is_verdict,
    rename,
    thumb_of,
)
from scripts.dataset.files import BadRow, read_rows
from scripts.dataset.records import PARSERS, DatasetFile, Feedback, Preference, Record, describe_reading, load_datasets
from scripts.dataset.turns import read_turns
from scripts.starting.asking import Asker, say
from scripts.starting.documents import (
    ENDINGS,
    Document,
    conversations_in,
    read_log,
    read_text_file,
    split_documents,
    title_of,
    turns_in,
    write_conversations,
    write_prompts,
    write_records,
)
from scripts.starting.guessing import SHARE, Guess, cells_of, guess_columns, kind_of

OFFICE = (".docx", ".doc", ".odt", ".rtf", ".pdf", ".html", ".htm", ".pages")
SHOWN = 3
# What our fields are called to a person.
NAMES = {
    "instruction": "question", "prompt": "question", "input": "question", "output": "answer", "completion": "answer",
    "chosen": "better answer", "rejected": "worse answer", "label": "thumb",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One file as a source of a stage, with what was read from it."""

    stage: TrainingStage
    dataset: WeightedDataset
    file: DatasetFile
    merges_turns: bool = False


def look_at(names: Sequence[str], asker: Asker, folder: Path, stem: str) -> list[Source]:
    """Read every file, asking for what it does not say itself; documents and chat logs become files of records in `folder`.

    Raises: UserError naming the file, and the line where there is one.
    """
    paths = [_find(name) for name in names]
    texts = [path for path in paths if path.suffix.lower() in ENDINGS]
    sources = [_look_at_table(path, asker, folder) for path in paths if path not in texts]
    documents: list[Document] = []
    for path in texts:
        text = read_text_file(path)
        log = read_log(text)
        if log is None:
            documents += split_documents(text)
            continue
        say(f"{path}: {len(log.messages)} messages")
        records = folder / f"{path.stem}.jsonl"
        write_records(write_conversations(log, asker, path), records)
        sources.append(_load(records, {}, SFT))
    if documents:
        say(listed(map(str, texts)))
        sources.append(_from_documents(documents, asker, folder / f"{stem}.jsonl"))
    return sources


def better_answers_of(source: Source) -> Source | None:
    """Return the better answers of preference pairs as examples for SFT, which starts DPO best (arXiv:2305.18290, section 4).

    None where they cannot be read so.
    """
    mapped = {field or "": column for column, field in source.dataset.columns.items()}
    row = next(row for _, row in read_rows(resolve(source.dataset.path)) if not isinstance(row, BadRow))
    layout = find_layout(rename(row, source.dataset.columns))
    if layout is None:
        return None
    chosen, rejected = (mapped.get(side, layout.columns[side]) for side in ("chosen", "rejected"))
    turns = read_turns(row[chosen], chosen, ASSISTANT)
    columns = {chosen: "completion" if len(turns) == 1 else "messages", rejected: None}
    if "prompt" in mapped:
        columns[mapped["prompt"]] = "prompt"
    say(f"{source.dataset.path}: SFT first trains the better answers")
    try:
        return _load(resolve(source.dataset.path), columns, SFT)
    except UserError as error:
        say(f"  not possible, so DPO starts from the base: {str(error).partition(chr(10))[0]}")
        return None


def _find(name: str) -> Path:
    path = resolve(name)
    if path.is_dir():
        raise UserError(f"{name}: is a folder, wanted files. Name them, such as {name.rstrip('/')}/*.csv")
    if not path.is_file():
        raise UserError(
            f"{name}: no such file.{did_you_mean(name) or did_you_mean(ROOT / name) or ' Correct the path.'}"
        )
    if path.suffix.lower() in OFFICE:
        raise UserError(
            f"{name}: found the ending `{path.suffix}`, wanted text. Save it as .txt (UTF-8), a table as .csv or .xlsx."
        )
    return path


def _from_documents(documents: Sequence[Document], asker: Asker, records: Path) -> Source:
    write_records(write_prompts(documents, asker), records)
    return _load(records, {}, SFT)


def _look_at_table(path: Path, asker: Asker, folder: Path) -> Source:
    rows = [row for _, row in read_rows(path) if not isinstance(row, BadRow)]
    if not rows:
        list(_load(path, {}, SFT).file.records)  # says what is wrong with the first ones
    say(f"{path}: {len(rows)} rows")
    layout = _layout_of(rows)
    if layout is None:
        if talks := conversations_in(rows):
            records = folder / f"{path.stem}.jsonl"
            write_records([{"messages": turns} for turns in talks], records)
            return _load(records, {}, SFT)
        guess = _ask_for_columns(path, rows, asker)
        if guess.document:
            return _from_texts(rows, guess.document, guess.title, asker, folder / f"{path.stem}.jsonl")
        return _load(path, guess.columns, _stage_of(guess.columns))
    if layout.name == PAIR:
        pairs = guess_columns(rows)
        asked = {"prompt", "instruction", "input"} & {*layout.columns}
        columns = pairs.columns if pairs and not asked and "chosen" in pairs.columns.values() else {}
        try:
            return _load(path, columns, DPO)
        except UserError as error:
            if "prompt: null" not in str(error) or "prompt" not in layout.columns:
                raise
        say("  the prompt stands in both answers too, and not quite the same there: it is taken from them")
        return _load(path, {**columns, layout.columns["prompt"]: None}, DPO)
    if any(is_verdict(row, layout) for row in rows if layout.columns.keys() <= {*row}):
        return _load(path, _as_feedback(layout, layout.columns["label"]), KTO)
    thumb = _thumb_column(rows, layout)
    return _load(path, _as_feedback(layout, thumb), KTO) if thumb else _load(path, {}, SFT)


def _from_texts(rows: Sequence[Row], column: str, title: str | None, asker: Asker, records: Path) -> Source:
    """Make records of a column of texts: conversations where they hold question and answer, else documents."""
    named = [(row, text) for row in rows if isinstance(text := row.get(column), str) and text.strip()]
    if len(named) < len(rows):
        say(f"  {len(rows) - len(named)} rows have no text in {column} and are left out")
    talks = [turns for _, text in named if (turns := turns_in(text))]
    if len(talks) >= SHARE * len(named):
        say(f"  {column} holds question and answer in one text, which are put apart")
        if len(talks) < len(named):
            say(f"  {len(named) - len(talks)} texts hold no question and answer and are left out")
        write_records([{"messages": turns} for turns in talks], records)
        return _load(records, {}, SFT)
    others = [name for name in cells_of(rows) if name not in (column, title)]
    if others:
        say(f"  not used: {', '.join(others)}")
    documents = [Document(text, str(row[title]) if title and row.get(title) else title_of(text)) for row, text in named]
    return _from_documents(documents, asker, records)


def _layout_of(rows: Sequence[Row]) -> Layout | None:
    """Return the layout that most rows have by the names of their columns; None where these could be several."""
    found: Counter[str] = Counter()
    first: dict[str, Layout] = {}
    for row in rows:
        try:
            layout = find_layout(row)
        except RowError:
            return None
        if layout:
            found[layout.name] += 1
            first.setdefault(layout.name, layout)
    return first[found.most_common(1)[0][0]] if found else None


def _thumb_column(rows: Sequence[Row], layout: Layout) -> str | None:
    """Return a column that calls answers good and bad under a name of its own."""
    for name, values in cells_of(rows).items():
        if name in layout.columns.values() or kind_of(name) != "label":
            continue
        if {thumb_of(value) for value in values} == {True, False}:
            return name
    return None


def _as_feedback(layout: Layout, label: str) -> dict[str, str]:
    """Map the columns of a layout to those that KTO reads."""
    answer = (
        next(layout.columns[field] for field in ANSWERS if field in layout.columns)
        if {*ANSWERS} & {*layout.columns}
        else None
    )
    question = layout.columns.get("prompt") or layout.columns.get("instruction") or layout.columns.get("input")
    wanted = {question: "prompt", answer: "completion", label: "label"}
    return {name: field for name, field in wanted.items() if name and name != field}


def _stage_of(columns: dict[str, str]) -> TrainingStage:
    fields = {*columns.values()}
    return DPO if "chosen" in fields else KTO if "label" in fields else SFT


def _ask_for_columns(path: Path, rows: Sequence[Row], asker: Asker) -> Guess:
    """Guess what the columns are, and let the user confirm or name what their names do not say.

    Raises: UserError where there is nobody to ask and nothing to guess by.
    """
    cells = cells_of(rows)
    guess = guess_columns(rows)
    if guess is None and (asker.assume or len(cells) < 2):
        error = describe_missing_layout(rows[0], pairs=False)
        raise UserError(
            f"{path}: {error.field_name}: {error.reason}\nStart again without --yes to be asked, or rename the columns in the file."
        )
    if guess and guess.sure:
        return guess
    if guess and guess.document:
        return guess
    names = list(cells)
    for name in names:
        say(f"  {name}: for example {_shorten(cells[name][0])}")
    if guess and asker.choose(f"  {describe_columns(guess.columns)}; is that right?", ("yes", "no"), "yes") == "yes":
        return guess
    question = asker.choose("  which column is the question, or what came in?", names, names[0])
    rest = [name for name in names if name != question]
    answer = asker.choose("  which column is the answer that the model should learn?", rest, rest[-1])
    return Guess({question: "instruction", answer: "output"})


def describe_columns(columns: dict[str, Any]) -> str:
    """Say what columns are, in words."""
    return ", ".join(f"{name} → {NAMES.get(field, field) if field else 'not used'}" for name, field in columns.items())


def listed(names: Iterable[str]) -> str:
    """Name some files: all of a few, of many the first."""
    every = list(names)
    return ", ".join(every) if len(every) <= 2 * SHOWN else f"{', '.join(every[:SHOWN])} and {len(every) - SHOWN} more"


def _shorten(value: Any) -> str:
    text = " ".join(str(value).split())
    return text[:60] + ("…" if len(text) > 60 else "")


def _load(path: Path, columns: Mapping[str, str | None], stage: TrainingStage) -> Source:
    """Read the records as training will, and say what is not used.

    Raises: UserError with the reasons where no row can be used.
    """
    written = portable_path(path) if path.resolve().is_relative_to(ROOT) else str(path.resolve())
    dataset = WeightedDataset(path=written, columns=cast(dict[str, RecordField | None], dict(columns)))
    key = f"{stage.name}.dataset_path"

    def read(data: Data) -> DatasetFile:
        (file,) = load_datasets([dataset], PARSERS[stage.records], data, key)
        return file

    try:
        file = read(Data(on_bad_row="skip"))
    except UserError:
        merged = Data(on_bad_row="skip", merge_turns=True)
        try:
            file = read(merged)
        except UserError:
            read(Data())  # which raises with the reason of each row
            raise
        return _show(Source(stage, dataset, file, merges_turns=True))
    if any("data.merge_turns" in row.reason for row in file.bad_rows):
        return _show(Source(stage, dataset, read(Data(on_bad_row="skip", merge_turns=True)), merges_turns=True))
    return _show(Source(stage, dataset, file))


def _show_example(record: Record | Preference) -> None:
    say(f"  for example  {_shorten(record.prompt[-1]['content'])}")
    thumb = f"  (thumb {'up' if record.liked else 'down'})" if isinstance(record, Feedback) else ""
    say(f"            →  {_shorten(record.answer)}{thumb}")
    if isinstance(record, Preference):
        say(f"     and not   {_shorten(record.rejected)}")


def _show(source: Source) -> Source:
    file, stage = source.file, source.stage
    if source.dataset.columns:
        say(f"  columns: {describe_columns(dict(source.dataset.columns))}")
    what = {
        "conversations": "examples",
        "preferences": "pairs of a better and a worse answer",
        "feedback": "answers with a thumb",
    }
    say(f"  usable: {len(file.records)} {what[stage.records]}, for {stage.title}")
    _show_example(file.records[0])
    if source.merges_turns:
        say("  consecutive messages of one speaker are joined (data.merge_turns)")
    for row in file.bad_rows[:SHOWN]:
        say(f"  cannot be used: {row}")
    if len(file.bad_rows) > SHOWN:
        say(f"  cannot be used: {len(file.bad_rows) - SHOWN} more")
    for line in describe_reading(file):
        say(f"  {line.removeprefix(f'{file.path}: ')}")
    return source
