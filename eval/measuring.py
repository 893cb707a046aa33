"""Measure base and adapters on the same held-out prompts and pairs: one base in memory, adapters switched."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from eval.checks import passes
from eval.held_out import HeldOut, Question
from scripts.common.artifacts import sha256_json
from scripts.common.schema import Check, Config
from scripts.common.stages import BASE, TRAINING_STAGES
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import Preference, with_system_prompt
from scripts.dataset.rendering import Rendered, render_completion, render_pair, render_prompt
from scripts.model.adapter import switched_to
from scripts.model.generation import Answer, Health, generate_answers, health
from scripts.model.scoring import AnswerScore, mean_kl, score_answers

log = logging.getLogger(__name__)

KL_PROMPTS = 32  # their answers hold thousands of tokens, which fix a mean well enough
# What other models start from: how far a model has moved is measured from these.
ORIGINS = (BASE, *dict.fromkeys(stage.continues for stage in TRAINING_STAGES.values() if stage.continues))


@dataclass
class Measured:
    """Everything measured of one model, item by item."""

    targets: list[AnswerScore] = field(default_factory=list)
    chosen: list[AnswerScore] = field(default_factory=list)
    rejected: list[AnswerScore] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    checks: list[dict[str, bool]] = field(default_factory=list)
    health: Health | None = None
    kl: dict[str, float] = field(default_factory=dict)

    def prefers_chosen(self) -> list[bool]:
        """Decide per pair whether the chosen answer is likelier per token."""
        return [a.logps / a.tokens > b.logps / b.tokens for a, b in zip(self.chosen, self.rejected, strict=True)]

    def chosen_is_longer(self) -> list[bool]:
        """Decide per pair whether the chosen answer has more tokens: the baseline `longer wins`."""
        return [a.tokens > b.tokens for a, b in zip(self.chosen, self.rejected, strict=True)]

    def rewards_chosen(self, reference: Measured) -> list[bool]:
        """Decide per pair whether this model raised the chosen answer more than the rejected one, against a reference."""
        gains = zip(self.chosen, self.rejected, reference.chosen, reference.rejected, strict=True)
        return [(a.logps - c.logps) > (b.logps - d.logps) for a, b, c, d in gains]


class Items:
    """The held-out items as the token ids that one model reads."""

    def __init__(self, chat: ChatFormat, questions: Sequence[Question], preferences: Sequence[Preference]) -> None:
        asked = [with_system_prompt(question.prompt, chat.system_prompt) for question in questions]
        self.prompts = [render_prompt(chat, prompt) for prompt in asked]
        self.targets = [
            Rendered.of(ids, render_completion(chat, prompt, ids, question.target))
            for ids, prompt, question in zip(self.prompts, asked, questions, strict=True)
        ]
        pairs = [
            render_pair(chat, replace(pair, prompt=tuple(with_system_prompt(pair.prompt, chat.system_prompt))))
            for pair in preferences
        ]
        self.chosen = [pair.side(pair.chosen_ids) for pair in pairs]
        self.rejected = [pair.side(pair.rejected_ids) for pair in pairs]

    def own_rows(self, answers: Sequence[Answer]) -> list[Rendered]:
        """Return a model's own answers, evenly spread over the prompts, as rows whose answer tokens are scored."""
        pairs = [pair for pair in zip(self.prompts, answers, strict=True) if pair[1].token_ids]
        step = max(1, len(pairs) // KL_PROMPTS)
        return [Rendered.of(prompt, answer.token_ids) for prompt, answer in pairs[::step]]


class Prepared:
    """The held-out questions and pairs, rendered once for all models that read them alike."""

    def __init__(self, tokenizer: Any, held_out: HeldOut, config: Config) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.questions, self.pairs = held_out.questions(config.eval.max_prompts, config.data.split_seed), held_out.pairs
        self._items: dict[str, Items] = {}

    def items(self, chat: ChatFormat) -> Items:
        """Return the items as a model of this format reads them."""
        key = sha256_json(chat.facts())
        if key not in self._items:
            self._items[key] = Items(chat, self.questions, self.pairs)
        return self._items[key]


def measure_models(
    model: Any,
    adapters: dict[str, str | None],
    prepared: Prepared,
    chats: dict[str, ChatFormat],
    *,
    with_answers: bool = True,
) -> dict[str, Measured]:
    """Measure every model in its own format; `adapters` maps its name to the adapter that makes it, None being the base."""
    measured: dict[str, Measured] = {}
    for name, adapter in adapters.items():
        log.info("measuring %s", name)
        with switched_to(model, adapter):
            items = prepared.items(chats[name])
            measured[name] = _score(model, items, prepared.tokenizer.pad_token_id)
            if with_answers:
                _answer(model, items, prepared, measured[name])
    if with_answers:
        for name in adapters:
            rows = prepared.items(chats[name]).own_rows(measured[name].answers)
            measured[name].kl = _kl_to_origins(model, adapters, name, rows, prepared)
    return measured


def _score(model: Any, items: Items, pad_token_id: int) -> Measured:
    # A pair's chosen answer is also the target answer of its prompt: score no row twice.
    rows = {tuple(row.input_ids): row for row in (*items.targets, *items.chosen, *items.rejected)}
    scores = dict(zip(rows, score_answers(model, list(rows.values()), pad_token_id), strict=True))
    targets, chosen, rejected = (
        [scores[tuple(row.input_ids)] for row in side] for side in (items.targets, items.chosen, items.rejected)
    )
    return Measured(targets, chosen, rejected)


def _answer(model: Any, items: Items, prepared: Prepared, measured: Measured) -> None:
    settings = prepared.config.eval
    measured.answers = generate_answers(
        model, prepared.tokenizer, items.prompts, settings.max_new_tokens, settings.batch_size
    )
    measured.health = health(measured.answers)
    measured.checks = [
        apply_checks(settings.checks, answer.text, question)
        for answer, question in zip(measured.answers, prepared.questions, strict=True)
    ]


def _kl_to_origins(
    model: Any, adapters: dict[str, str | None], name: str, rows: list[Rendered], prepared: Prepared
) -> dict[str, float]:
    names = list(adapters)
    origins = [other for other in names[: names.index(name)] if other in ORIGINS]
    if not rows or not origins:
        return {}
    log.info("measuring %s: KL to %s", name, " and ".join(origins))
    with switched_to(model, adapters[name]):
        switches = {other: partial(switched_to, model, adapters[other]) for other in origins}
        return mean_kl(model, rows, prepared.tokenizer.pad_token_id, switches)


def apply_checks(checks: Sequence[Check], text: str, question: Question) -> dict[str, bool]:
    """Hold one answer against every check."""
    return {check.name: passes(check, text, question.text, question.target) for check in checks}
