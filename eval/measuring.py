"""Measure base, SFT and DPO on the same held-out prompts and pairs: one base in memory, adapters switched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from eval.checks import passes
from eval.held_out import HeldOut
from scripts.common.generation import Answer, Health, generate_answers, health
from scripts.common.modeling import switched_to
from scripts.common.rendering import IGNORED, Rendered, render_completion, render_pair, render_prompt
from scripts.common.schema import Check, Config
from scripts.common.scoring import AnswerScore, mean_kl, score_answers

log = logging.getLogger(__name__)

KL_PROMPTS = 32  # their answers hold thousands of tokens, which fix a mean well enough


@dataclass
class Measured:
    """Everything measured of one model, item by item."""

    answers: list[Answer] = field(default_factory=list)
    references: list[AnswerScore] = field(default_factory=list)
    chosen: list[AnswerScore] = field(default_factory=list)
    rejected: list[AnswerScore] = field(default_factory=list)
    checks: list[dict[str, bool]] = field(default_factory=list)
    health: Health | None = None
    kl: dict[str, float] = field(default_factory=dict)

    def prefers_chosen(self) -> list[bool]:
        """Tell per pair whether the chosen answer is likelier per token."""
        return [a.logps / a.tokens > b.logps / b.tokens for a, b in zip(self.chosen, self.rejected, strict=True)]

    def rewards_chosen(self, reference: Measured) -> list[bool]:
        """Tell per pair whether this model raised the chosen answer more than the rejected one, against a reference."""
        gains = zip(self.chosen, self.rejected, reference.chosen, reference.rejected, strict=True)
        return [(a.logps - c.logps) > (b.logps - d.logps) for a, b, c, d in gains]


class Prepared:
    """The held-out items as token ids, rendered once for all models."""

    def __init__(self, tokenizer: Any, held_out: HeldOut, config: Config) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.questions = held_out.questions(config.eval.max_prompts)
        self.prompts = [render_prompt(tokenizer, prompt) for _, prompt, _ in self.questions]
        self.references = [
            self._row(ids, render_completion(tokenizer, prompt, ids, reference))
            for ids, (_, prompt, reference) in zip(self.prompts, self.questions, strict=True)
        ]
        pairs = [render_pair(tokenizer, pair) for pair in held_out.pairs]
        self.chosen = [pair.side(pair.chosen_ids) for pair in pairs]
        self.rejected = [pair.side(pair.rejected_ids) for pair in pairs]

    def chosen_is_longer(self) -> list[bool]:
        """Tell per pair whether the chosen answer has more tokens: the baseline `longer wins`."""
        return [a.trained_tokens > b.trained_tokens for a, b in zip(self.chosen, self.rejected, strict=True)]

    @staticmethod
    def _row(prompt_ids: list[int], answer_ids: list[int]) -> Rendered:
        return Rendered(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)

    def own_rows(self, answers: Sequence[Answer]) -> list[Rendered]:
        """Return a model's own answers, evenly spread over the prompts, as rows whose answer tokens are scored."""
        pairs = [pair for pair in zip(self.prompts, answers, strict=True) if pair[1].token_ids]
        step = max(1, len(pairs) // KL_PROMPTS)
        return [self._row(prompt, answer.token_ids) for prompt, answer in pairs[::step]]


def measure_models(
    model: Any,
    adapters: dict[str, str | None],
    prepared: Prepared,
    progress: Callable[[str], object],
    *,
    with_answers: bool = True,
) -> dict[str, Measured]:
    """Measure every model; `adapters` maps its name to the adapter that makes it, None being the base."""
    found: dict[str, Measured] = {}
    for name, adapter in adapters.items():
        with switched_to(model, adapter):
            found[name] = _measure(model, prepared, partial(progress, name), with_answers)
    if with_answers:
        for place, (name, adapter) in enumerate(adapters.items()):
            rows = prepared.own_rows(found[name].answers)
            earlier = [other for other in list(adapters)[:place] if other in ("base", "sft")]
            if rows and earlier:
                progress(f"{name}: KL to {' and '.join(earlier)}")
                references = {other: partial(switched_to, model, adapters[other]) for other in earlier}
                with switched_to(model, adapter):
                    found[name].kl = mean_kl(model, rows, prepared.tokenizer.pad_token_id, references)
    return found


def _measure(model: Any, prepared: Prepared, progress: Callable[[], object], with_answers: bool) -> Measured:
    pad, measured = prepared.tokenizer.pad_token_id, Measured()
    progress()
    # A pair's chosen answer is also the reference answer of its prompt: score no row twice.
    rows = {tuple(row.input_ids): row for row in (*prepared.references, *prepared.chosen, *prepared.rejected)}
    scores = dict(zip(rows, score_answers(model, list(rows.values()), pad), strict=True))
    for side in ("references", "chosen", "rejected"):
        setattr(measured, side, [scores[tuple(row.input_ids)] for row in getattr(prepared, side)])
    if with_answers:
        settings = prepared.config.eval
        measured.answers = generate_answers(
            model, prepared.tokenizer, prepared.prompts, settings.max_new_tokens, settings.batch_size
        )
        measured.health = health(measured.answers)
        measured.checks = [
            apply_checks(settings.checks, answer.text, prompt, reference)
            for answer, (_, prompt, reference) in zip(measured.answers, prepared.questions, strict=True)
        ]
    return measured


def apply_checks(
    checks: Sequence[Check], text: str, prompt: Sequence[dict[str, str]], reference: str
) -> dict[str, bool]:
    """Hold one answer against every check."""
    asked = "\n".join(message["content"] for message in prompt if message["role"] != "assistant")
    return {check.name: passes(check, text, asked, reference) for check in checks}
