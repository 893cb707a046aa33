"""Look at your own files and write a configuration for them, with the next commands to type.

Reads tables (csv, tsv, xlsx, jsonl, json, parquet), documents and chat logs (txt, md); asks what they do not say. Writes a
commented configuration, and for documents and chat logs a file of records below data/sft; overwrites nothing. Needs requirements.txt.

    python -m scripts.start data/sft/sample_sft.jsonl --yes --out configs/mydata.yaml
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: sys.path[0] is this folder; put the repository root in its place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.common.config import LoadedConfig, load_config
from scripts.common.errors import UserError, entry_point
from scripts.common.schema import Data
from scripts.common.stages import DPO, KTO, SFT
from scripts.dataset.split import Split
from scripts.starting.asking import Asker, head, note, say, write
from scripts.starting.bases import choose_base
from scripts.starting.minutes import Speed, measure_speed
from scripts.starting.settings import (
    answer_limit,
    choose_prompts,
    choose_rhythm,
    choose_sides,
    count_too_long,
    split_all,
    training_tokens,
)
from scripts.starting.sources import Source, better_answers_of, look_at
from scripts.starting.writing import Proposal, write_yaml

RECORDS_FOLDER = Path("data/sft")
LONGEST_SHOWN_PROMPT = 240
MANY_RECORDS = 1000  # with more, the search for near-duplicates takes seconds


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="your examples, preferences, documents or chat logs")
    parser.add_argument("--yes", action="store_true", help="ask nothing: assume what would be proposed, and show it")
    parser.add_argument(
        "--out", default="configs/mydata.yaml", metavar="FILE", help="configuration to write (default: %(default)s)"
    )
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Look, choose, write, and say what comes next."""
    arguments = build_parser().parse_args(argv)
    out = Path(arguments.out)
    check_out(out)
    asker = Asker(arguments.yes)
    found = look_at(arguments.files, asker, RECORDS_FOLDER, out.stem)
    sources = {stage.name: [each for each in found if each.stage is stage] for stage in (SFT, DPO, KTO)}
    better = [better_answers_of(source) for source in sources[DPO.name]] if not sources[SFT.name] else []
    if chosen_as_answers := bool(better) and None not in better:
        sources[SFT.name] = [source for source in better if source]
    if sum(len(source.file.records) for source in found) > MANY_RECORDS:
        say("  looking for prompts that say nearly the same, and counting tokens …")
    data, splits = split_all(sources, choose_sides(found))
    speed = measure_speed()
    proposal = propose(out.stem, sources, splits, data, speed, asker, chosen_as_answers)
    write_new(out, write_yaml(proposal, [shlex.quote(name) for name in arguments.files]))
    show_advice(load_config(out), sources, splits)
    show_next(out, proposal, splits, speed)
    return 0


def check_out(out: Path) -> None:
    """Refuse a name that is taken, or that is no configuration's."""
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: found the ending `{out.suffix}`, wanted .yaml.")
    if out.exists():
        raise UserError(
            f"--out {out}: exists already, and nothing is overwritten. Choose another name, such as --out {out.with_stem(f'{out.stem}2')}"
        )


def write_new(path: Path, text: str) -> None:
    """Write a file that must not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)


def propose(
    stem: str,
    sources: Mapping[str, list[Source]],
    splits: Mapping[str, Split],
    data: Data,
    speed: Speed,
    asker: Asker,
    chosen_as_answers: bool,
) -> Proposal:
    """Choose base, steps, lengths and checks."""
    from eval.drafting import draft_checks

    records = {name: [record for source in sources[name] for record in source.file.records] for name in splits}
    first = next(iter(splits))  # whose answers the model learns to write
    good = [record for record in records[first] if getattr(record, "liked", True)]
    base = choose_base(training_tokens(splits[first].train), speed, asker)
    if too_long := sum(count_too_long(base, each) for each in records.values()):
        note(
            f"up to {too_long} records are longer than the {base.positions} tokens that {base.id} reads, and are left out"
        )
        data = data.model_copy(update={"on_bad_row": "skip"})
    rhythms = {
        name: choose_rhythm(base, records[name], len(split.train), preferences=name != SFT.name)
        for name, split in splits.items()
    }
    to_learn = {id(record) for record in splits[first].train}
    checks = draft_checks([record for record in good if id(record) in to_learn], good)
    limit = answer_limit(base, [record.answer for record in good])
    return Proposal(
        stem, base, data, sources, rhythms, checks, limit, choose_prompts(splits), chosen_as_answers
    )  # fmt: skip


def show_advice(config: LoadedConfig, sources: Mapping[str, list[Source]], splits: Mapping[str, Split]) -> None:
    """Say what the data can show and what in them is probably a mistake."""
    from eval.planning import describe_plainly, sizes_of
    from scripts.dataset.records import count_duplicates
    from scripts.training.advice import FEWEST_TESTED, advise_on_steps, describe_styles

    head("what is learnt and what is held out")
    for name, split in splits.items():
        sides = (
            f"{len(split.train)} to learn from, {len(split.validation)} for validation, {len(split.test)} for the test"
        )
        near = f", {len(split.near_duplicates)} left out as near-duplicates" if split.near_duplicates else ""
        say(f"  {name}: {sides}{near}")
        records = [record for source in sources[name] for record in source.file.records]
        if duplicates := count_duplicates(records):
            note(f"{duplicates} records repeat an earlier one word for word, and weigh that much more")
        for advice in [
            *describe_styles([record.answer for record in split.train], "your files"),
            *advise_on_steps(getattr(config.values, name), name, len(split.train)),
        ]:
            note(advice)
        if len(split.test) < FEWEST_TESTED:
            note(f"{len(split.test)} test records can show only large differences; more examples help most")
    try:
        lines = describe_plainly(*sizes_of(config))
    except UserError as error:
        lines = [f"nothing: {error}"]
    head("what the report can show")
    for line in lines:
        say(f"  {line}")


def show_next(out: Path, proposal: Proposal, splits: Mapping[str, Split], speed: Speed) -> None:
    """Say what was chosen, how long it takes, and the next three commands."""
    base, flags = proposal.base, f"--config {shlex.quote(str(out))}"
    if proposal.checks:
        head("rules that your answers keep; the report checks them (eval.checks)")
    for draft in proposal.checks:
        say(f"  {draft.kept} of {draft.total}: {draft.check['name']}")
    head("how it is learnt")
    say(
        f"  base: {base.id}, {base.parameters / 1e6:,.0f} M parameters"
        + ("" if base.folder else ", which is not here: the first run downloads it")
    )
    if not base.folder:
        say("  without a model hub: python -m scripts.get_demo_model, then start again with another --out")
    if not base.chats:
        say("  it brings no chat template, so a plain one is used and stored with the adapter")
    tested = [record for split in splits.values() for record in split.test]
    commands = []
    for stage in proposal.stages:
        rhythm, split = proposal.rhythms[stage.name], splits[stage.name]
        sequences = 2 if stage is DPO else 1
        say(
            f"  {stage.name}: {rhythm.epochs} time{'s' * (rhythm.epochs > 1)} through {len(split.train)} records, {rhythm.batch} at a time: {rhythm.steps} steps"
        )
        tokens = sequences * rhythm.epochs * training_tokens(split.train)(base)
        said = speed.training(base.parameters, tokens, read=4 * sequences * training_tokens(split.validation)(base))
        commands.append((f"python -m {stage.script} {flags}", said))
    prompts = min(len(tested), proposal.max_prompts or len(tested))
    answers = sum(base.count_texts([record.answer for record in tested])) / max(len(tested), 1)
    if tested:
        said = speed.comparing(base.parameters, prompts, answers, 1 + len(proposal.stages))
        commands.append((f"python -m eval.compare {flags}", said))
    if len(commands) < 3:
        commands.append((f"python -m serve.ask {shlex.quote(_question(tested))} {flags}", ""))
    head(f"written: {out}, with every choice explained")
    head("next")
    for command, said in commands[:3]:
        write(f"  {command}" + (f"    # {said}" if said else ""))
    say(f"  ({speed.how})")


def _question(tested: Sequence[Any]) -> str:
    """Return a question to try out, the shortest that is held out, in one line."""
    asked = [" ".join(record.prompt[-1]["content"].split()) for record in tested]
    shortest = min(asked, key=len, default="a question of yours")
    return (
        shortest if len(shortest) <= LONGEST_SHOWN_PROMPT else f"{shortest[:LONGEST_SHOWN_PROMPT].rpartition(' ')[0]} …"
    )


if __name__ == "__main__":
    sys.exit(main())
