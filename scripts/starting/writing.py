"""Write the configuration that `scripts.start` proposes, with each key explained to somebody who trains a first model."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.common.schema import Data, Serve
from scripts.common.stages import DPO, KTO, SFT, TrainingStage
from scripts.starting.bases import Base
from scripts.starting.settings import Rhythm
from scripts.starting.sources import Source, describe_columns

FILES_NAMED = 6
WHAT = {
    SFT.name: "SFT (supervised fine-tuning): the model learns to answer as your examples do.",
    DPO.name: "DPO (direct preference optimisation): the model learns which of two answers you prefer.",
    KTO.name: "KTO: the model learns from thumbs up and thumbs down on single answers.",
}


@dataclass(frozen=True)
class Draft:
    """A check as the configuration writes it, and how many of one's own answers keep it."""

    check: dict[str, Any]
    kept: int
    total: int


@dataclass(frozen=True)
class Proposal:
    """Everything that the configuration will say."""

    stem: str  # of its file, and the name of the folder of its results
    base: Base
    data: Data
    sources: Mapping[str, list[Source]]  # by stage
    rhythms: Mapping[str, Rhythm]
    checks: list[Draft]
    max_new_tokens: int
    max_prompts: int | None
    chosen_as_answers: bool  # SFT trains the better answers of the preference pairs

    @property
    def outputs(self) -> str:
        """Return the folder of all results, apart from those of other configurations."""
        return f"outputs/{self.stem}"

    @property
    def stages(self) -> list[TrainingStage]:
        """Return the stages that will be trained, in order."""
        return [stage for stage in (SFT, DPO, KTO) if stage.name in self.rhythms]


def write_yaml(proposal: Proposal, given: Sequence[str]) -> str:
    """Return the text of the configuration."""
    base, data = proposal.base, proposal.data
    lines = [
        *_comment(
            f"Written by `python -m scripts.start {' '.join(given[:FILES_NAMED])}{' …' * (len(given) > FILES_NAMED)}`; "
            "change what you like. configs/README.md has every key."
        ),
        "",
        *_comment(
            "The model that training starts from. It stays as it is: what is learnt goes into a small adapter beside it."
        ),
        f"base_model_id: {_value(base.id)}",
    ]
    if base.folder:
        lines += [*_comment("Nothing is downloaded: the base is on this machine."), "offline: true"]
    lines += ["", *_data_lines(data)]
    for stage in (SFT, DPO, KTO):
        lines += ["", *_stage_lines(proposal, stage)]
    lines += ["", *_eval_lines(proposal)]
    last = proposal.stages[-1].name
    lines += [
        "",
        *_comment("What python -m serve.fastapi_server and python -m serve.ask answer with, beside the base."),
        "serve:",
        f"  adapter_path: {proposal.outputs}/{last}_adapter",
    ]
    if proposal.max_new_tokens > Serve().default_max_new_tokens:
        lines += [
            *_comment("Room for answers as long as yours, in tokens.", "  "),
            f"  default_max_new_tokens: {proposal.max_new_tokens}",
        ]
    if len(proposal.stages) > 1:
        lines += ["  adapters:"] + [f"    {s.name}: {proposal.outputs}/{s.name}_adapter" for s in proposal.stages[:-1]]
    return "\n".join(lines) + "\n"


def _data_lines(data: Data) -> list[str]:
    lines = [
        *_comment(
            "Some records are held out: training never learns from them. Those for validation choose the best moment to stop, and "
            "those for the test are kept for the report, because a model should be judged by questions it has not seen."
        ),
        "data:",
        f"  validation_ratio: {data.validation_ratio:g}",
        f"  test_ratio: {data.test_ratio:g}",
    ]
    if data.split_seed:
        lines += [
            *_comment("Which records are held out is drawn by lot; this draw comes closest to the shares above.", "  "),
            f"  split_seed: {data.split_seed}",
        ]
    if data.merge_turns:
        lines += [*_comment("Consecutive messages of one speaker are joined.", "  "), "  merge_turns: true"]
    if data.on_bad_row == "skip":
        lines += [
            *_comment(
                "Rows that cannot be used are set aside, with the reason, in rejects.jsonl beside the adapter; `stop` would refuse the file.",
                "  ",
            ),
            "  on_bad_row: skip",
        ]
    return lines


def _stage_lines(proposal: Proposal, stage: TrainingStage) -> list[str]:
    name, rhythm = stage.name, proposal.rhythms.get(stage.name)
    lines = [*_comment(WHAT[name]), f"{name}:"]
    if rhythm is None:
        why = {
            SFT.name: "No examples of whole answers were given.",
            DPO.name: "No pairs of a better and a worse answer were given. python -m scripts.make_pairs makes some of the adapter's own answers.",
            KTO.name: "No answers with a thumb were given.",
        }  # fmt: skip
        lines += [
            *_comment(f"{why[name]} A file named here is trained on by python -m {stage.script}.", "  "),
            "  dataset_path: null",
        ]
    else:
        lines += _dataset_lines(proposal, stage)
    lines += [f"  output_dir: {proposal.outputs}/{name}_adapter"]
    if stage.continues:
        starts = SFT.name in proposal.rhythms
        if starts:
            lines += [
                *_comment("It continues the adapter of SFT, and stays close to it.", "  "),
                f"  init_from: {proposal.outputs}/{stage.continues}_adapter",
            ]
        else:
            lines += [
                *_comment("It starts from the base, as there is no SFT before it.", "  "),
                "  init_from: null",
                "  reference: base",
            ]
        lines += [
            *_comment(
                "How strongly it is held to where it started: larger changes less. 0.1 is the usual start.", "  "
            ),
            "  beta: 0.1",
        ]
    if rhythm:
        lines += [
            *_comment(
                f"One epoch shows the model every training record once, a batch at a time; after each batch it takes one step. These make "
                f"about {rhythm.steps} steps. More epochs teach more firmly, and too many teach by heart.",
                "  ",
            ),
            f"  num_train_epochs: {rhythm.epochs}",
            f"  per_device_train_batch_size: {rhythm.batch}",
            *_comment("How far each step goes. If the loss jumps about, halve it; if little changes, double it.", "  "),
            f"  learning_rate: {rhythm.learning_rate:.0e}".replace("e-0", "e-"),
            *_comment(
                "The limit for a record, in tokens, which are pieces of words; a longer one is "
                f"{'left out' if proposal.data.on_bad_row == 'skip' else 'refused'}, never cut.",
                "  ",
            ),
            f"  max_length: {rhythm.max_length}",
        ]
    return lines


def _dataset_lines(proposal: Proposal, stage: TrainingStage) -> list[str]:
    lines = []
    if stage is SFT and proposal.chosen_as_answers:
        lines += _comment(
            "No examples were given, so SFT trains the better answers of your pairs: DPO starts best from a model that writes like them.",
            "  ",
        )
    lines += ["  dataset_path:"]
    for source in proposal.sources[stage.name]:
        lines += [f"    - path: {_value(source.dataset.path)}"]
        if source.dataset.columns:
            lines += [
                *_comment(f"What your columns are: {describe_columns(dict(source.dataset.columns))}.", "      "),
                f"      columns: {json.dumps(source.dataset.columns, ensure_ascii=False)}",
            ]
        if source.file.unused:
            lines += _comment(f"Not used: {', '.join(source.file.unused)}.", "      ")
    return lines


def _eval_lines(proposal: Proposal) -> list[str]:
    lines = [
        *_comment(
            "The report of python -m eval.compare: base and adapters answer the test questions, and every answer is held against the checks."
        ),
        "eval:",
        f"  output_dir: {proposal.outputs}/comparison",
        *_comment("The longest answer in tokens, a little more than your own need.", "  "),
        f"  max_new_tokens: {proposal.max_new_tokens}",
    ]
    if proposal.max_prompts:
        lines += [
            *_comment("Of the many test questions, so many are answered.", "  "),
            f"  max_prompts: {proposal.max_prompts}",
        ]
    if not proposal.checks:
        return [
            *lines,
            *_comment(
                "Rules for answers, such as {name: short, max_words: 80}. Yours had nothing in common that a rule could say.",
                "  ",
            ),
            "  checks: []",
        ]
    lines += [
        *_comment(
            f"Rules that your own {proposal.checks[0].total} answers keep, all of them where no number stands. Remove what is chance, "
            "and add what matters to you: configs/README.md.",
            "  ",
        ),
        "  checks:",
    ]
    for draft in proposal.checks:
        if draft.kept < draft.total:
            lines += _comment(f"{draft.kept} of {draft.total} of your own answers keep it.", "    ")
        first, *rest = [f"{key}: {_value(value)}" for key, value in draft.check.items()]
        lines += [f"    - {first}", *(f"      {line}" for line in rest)]
    return lines


def _value(value: Any) -> str:
    """Write a value so that YAML reads it as it is."""
    if isinstance(value, str) and value.isprintable():
        return "'" + value.replace("'", "''") + "'" if "\\" in value or '"' in value else f'"{value}"'
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        110,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
