"""Watch answers to held-out prompts while preferences are trained, and say when they degenerate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from scripts.dataset.rendering import Rendered, RenderedFeedback, RenderedPair
from scripts.model.adapter import switched_to
from scripts.model.generation import Health, generate_answers, health
from scripts.model.scoring import mean_kl
from scripts.model.shape import ModelShape
from scripts.training.reference import FrozenReference

log = logging.getLogger(__name__)

WATCHED_PROMPTS = 8
WATCHED_TOKENS = 128
# A run degenerates when its answers cross one of these lines, seen from where it started.
REPETITION_RISE, EOS_FALL, LENGTH_GROWTH = 0.15, 0.25, 1.6
CHOSEN_FALL_NATS = 0.5  # per token of the chosen answers


class DegenerationWatch(TrainerCallback):
    """Answer fixed held-out prompts at each evaluation and compare with how the run started."""

    def __init__(
        self, trainer: FrozenReference, tracker: Any, pairs: Sequence[RenderedPair | RenderedFeedback], stop: bool
    ) -> None:
        self.trainer, self.tracker, self.stop = trainer, tracker, stop
        self.pairs = list(pairs[:WATCHED_PROMPTS])
        if stop and not pairs:
            log.warning(
                "dpo.stop_on_degeneration has no effect: there is no held-out prompt whose answer could be watched"
            )
        positions = ModelShape.of(trainer.model.config).positions
        longest = max((len(pair.prompt_ids) for pair in self.pairs), default=0)
        self.tokens = max(1, min(WATCHED_TOKENS, positions - longest)) if positions else WATCHED_TOKENS
        chosen = [len(pair.chosen_ids) for pair in pairs if pair.chosen_ids]
        self.chosen_tokens = sum(chosen) / max(len(chosen), 1)
        self.start: Health | None = None
        self.start_chosen: float | None = None
        self.last: dict[str, float] = {}
        self.warned: set[str] = set()
        trainer.add_callback(self)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what was measured last, for the manifest."""
        return {"answers": self.last} if self.last else {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Measure, record, warn, and stop where that was asked for."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        answers = generate_answers(model, tokenizer, [pair.prompt_ids for pair in self.pairs], self.tokens)
        now = health(answers)
        own = [
            Rendered.of(pair.prompt_ids, answer.token_ids)
            for pair, answer in zip(self.pairs, answers, strict=True)
            if answer.token_ids
        ]
        reference = self.trainer.reference_adapter
        references = {"reference": lambda: switched_to(model, reference)}
        kl = mean_kl(model, own, tokenizer.pad_token_id, references)["reference"] if own else 0.0
        chosen = (metrics or {}).get("eval_logps/chosen", 0.0) / max(self.chosen_tokens, 1)
        if self.start is None or self.start_chosen is None:
            self.start, self.start_chosen = now, chosen
        self.last = {**vars(now), "kl_to_reference": kl, "chosen_logps_drift": chosen - self.start_chosen}
        self.tracker.log_metrics(
            {f"validation/answers/{key}": value for key, value in self.last.items()}, state.global_step
        )
        signs = [sign for sign in self._signs(now, chosen - self.start_chosen) if sign not in self.warned]
        if signs:
            self.warned.update(signs)
            log.warning("step %d: answers degenerate: %s. %s", state.global_step, "; ".join(signs), self.trainer.remedy)
            if self.stop:
                log.warning("stopping here (%s.stop_on_degeneration)", self.trainer.stage)
                control.should_training_stop = True

    def _signs(self, now: Health, drift: float) -> list[str]:
        assert self.start is not None
        signs = {
            f"repetition above {self.start.repetition + REPETITION_RISE:.2f}": now.repetition
            > self.start.repetition + REPETITION_RISE,
            f"fewer than {self.start.eos_rate - EOS_FALL:.0%} of answers end by themselves": now.eos_rate
            < self.start.eos_rate - EOS_FALL,
            f"answers over {LENGTH_GROWTH} times as long as at the start": now.mean_tokens
            > LENGTH_GROWTH * max(self.start.mean_tokens, 1),
            f"chosen answers lost over {CHOSEN_FALL_NATS} nats per token": drift < -CHOSEN_FALL_NATS,
        }
        return [sign for sign, true in signs.items() if true]
