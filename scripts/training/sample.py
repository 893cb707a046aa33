"""One held-out prompt at the end of training: how the base answers it, and how the new adapter does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from scripts.common.paths import portable_path
from scripts.common.run import Run
from scripts.common.stages import BASE, TRAINING_STAGES
from scripts.common.terminal import shown
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import Preference, Record, load_rest_of_chain, with_system_prompt
from scripts.dataset.rendering import render_prompt
from scripts.dataset.split import side_of
from scripts.model.adapter import switched_to
from scripts.model.generation import generate_answers
from scripts.model.shape import ModelShape

log = logging.getLogger(__name__)

LONGEST = 128  # tokens of an answer, and four times as many characters of the prompt


def show_answers(trainer: Any, run: Run, chat: ChatFormat, validation: Sequence[Record | Preference]) -> None:
    """Answer the first prompt of the validation side without and with the adapter that was trained."""
    record = next(iter(validation or held_out_before(run)), None)
    if record is None:
        return
    prompt = with_system_prompt(record.prompt, chat.system_prompt)
    ids = render_prompt(chat, prompt)
    positions = ModelShape.of(trainer.model.config).positions
    room = min(LONGEST, positions - len(ids)) if positions else LONGEST
    if room < 1:
        return
    texts = {}
    for name, adapter in ((BASE, None), (run.stage, "default")):
        with switched_to(trainer.model, adapter):
            [answer] = generate_answers(trainer.model, chat.tokenizer, [ids], room)
        texts[name] = answer.text if answer.ended else f"{answer.text} …"
    asked = prompt[-1]["content"]
    question = asked if len(asked) <= 4 * LONGEST else f"{asked[: 4 * LONGEST]} …"
    log.info("a prompt that was held out, from %s\n%s", portable_path(record.source), shown(question, texts))


def held_out_before(run: Run) -> Iterator[Record | Preference]:
    """Yield what the stage that this one continues holds out: pairs made of training prompts leave nothing else to ask."""
    continued = TRAINING_STAGES[run.stage].continues
    for file in load_rest_of_chain(run.values, [name for name in TRAINING_STAGES if name != continued]):
        yield from (record for record in file.records if side_of(record, run.values.data) == "validation")
