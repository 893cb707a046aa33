"""Measure base and adapters on the same held-out prompts and pairs: one base in memory, adapters switched."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from eval.checks import passes
from eval.held_out import HeldOut, Question
from scripts.common.schema import Check, Config
from scripts.common.stages import BASE, TRAINING_STAGES
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

    def rewards_chosen(self, reference: Measured) -> list[bool]:
        """Decide per pair whether this model raised the chosen answer more than the rejected one, against a reference."""
        gains = zip(self.chosen, self.rejected, reference.chosen, reference.rejected, strict=True)
        return [(a.logps - c.logps) > (b.logps - d.logps) for a, b, c, d in gains]


class Prepared:
    """The held-out items as token ids, rendered once for all models."""

    def __init__(self, tokenizer: Any, held_out: HeldOut, config: Config) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.questions = held_out.questions(config.eval.max_prompts)
        self.prompts = [render_prompt(tokenizer, question.prompt) for question in self.questions]
        self.targets = [
            Rendered.of(ids, render_completion(tokenizer, question.prompt, ids, question.target))
            for ids, question in zip(self.prompts, self.questions, strict=True)
        ]
        pairs = [render_pair(tokenizer, pair) for pair in held_out.pairs]
        self.chosen = [pair.side(pair.chosen_ids) for pair in pairs]
        self.rejected = [pair.side(pair.rejected_ids) for pair in pairs]

    def chosen_is_longer(self) -> list[bool]:
        """Decide per pair whether the chosen answer has more tokens: the baseline `longer wins`."""
        return [a.trained_tokens > b.trained_tokens for a, b in zip(self.chosen, self.rejected, strict=True)]

    def own_rows(self, answers: Sequence[Answer]) -> list[Rendered]:
        """Return a model's own answers, evenly spread over the prompts, as rows whose answer tokens are scored."""
        pairs = [pair for pair in zip(self.prompts, answers, strict=True) if pair[1].token_ids]
        step = max(1, len(pairs) // KL_PROMPTS)
        return [Rendered.of(prompt, answer.token_ids) for prompt, answer in pairs[::step]]


def measure_models(
    model: Any, adapters: dict[str, str | None], prepared: Prepared, *, with_answers: bool = True
) -> dict[str, Measured]:
    """Measure every model; `adapters` maps its name to the adapter that makes it, None being the base."""
    measured: dict[str, Measured] = {}
    for name, adapter in adapters.items():
        log.info("measuring %s", name)
        with switched_to(model, adapter):
            measured[name] = _score(model, prepared)
            if with_answers:
                _answer(model, prepared, measured[name])
    if with_answers:
        for name in adapters:
            measured[name].kl = _kl_to_origins(
                model, adapters, name, prepared.own_rows(measured[name].answers), prepared
            )
    return measured


def _score(model: Any, prepared: Prepared) -> Measured:
    # A pair's chosen answer is also the target answer of its prompt: score no row twice.
    rows = {tuple(row.input_ids): row for row in (*prepared.targets, *prepared.chosen, *prepared.rejected)}
    scores = dict(zip(rows, score_answers(model, list(rows.values()), prepared.tokenizer.pad_token_id), strict=True))
    targets, chosen, rejected = (
        [scores[tuple(row.input_ids)] for row in side]
        for side in (prepared.targets, prepared.chosen, prepared.rejected)
    )
    return Measured(targets, chosen, rejected)


def _answer(model: Any, prepared: Prepared, measured: Measured) -> None:
    settings = prepared.config.eval
    measured.answers = generate_answers(
        model, prepared.tokenizer, prepared.prompts, settings.max_new_tokens, settings.batch_size
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
