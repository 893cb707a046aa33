"""Answers from int8 weights: the full ones are let go once it was measured what their rounding changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config
from scripts.dataset.rendering import render_prompt
from scripts.model.int8 import check_int8, keep_in_int8
from serve.adapters import Models
from serve.cache import CachedForward, prove_cache
from serve.stacking import stacks_of

log = logging.getLogger(__name__)

KEY = "serve.weights: int8"
QUESTIONS = (
    "Name three fruits.", "Why is the sky blue?", "Write a polite reply to a customer whose parcel is late.",
    "What is 17 plus 25?", "Schreibe einen kurzen Satz über den Regen.", "Write a Python function that adds two numbers.",
)  # fmt: skip
TOGETHER = 2  # questions; every forward pass has room for so many rows
NEW_TOKENS = 16


@dataclass(frozen=True)
class Effect:
    """What rounding changes in the default model's greedy answers to a few questions, token by token."""

    tokens: int
    agreement: float  # share of tokens that stay the likeliest
    kl: float  # nats per token, from the full weights to the rounded ones


def check_settings(config: Config, machine: Machine) -> None:
    """Refuse int8 weights beside what does without them.

    Raises: UserError naming the key.
    """
    check_int8(config, machine, KEY)
    if config.serve.queue_path is not None:
        raise UserError(
            f"{KEY}: the page of votes (serve.queue_path) orders prompts by log-probabilities, which only full weights give. "
            "Set serve.weights: full, or serve.queue_path: null."
        )


@torch.inference_mode()
def answer_in_int8(models: Models, forward: CachedForward, context: int) -> Effect:
    """Keep only int8 weights from now on, and measure what that changes.

    Raises: UserError when this base cannot be rounded, or computes no numbers then.
    """
    name = models.served[models.default].adapter
    chat = models.chats[name]
    count = max(1, min(NEW_TOKENS, context // 2))
    longest = max(1, context - count)
    prompts = [render_prompt(chat, chat.user_turn(question))[-longest:] for question in QUESTIONS]
    pairs = [prompts[start : start + TOGETHER] for start in range(0, len(prompts), TOGETHER)]
    full = [_answers(forward, name, pair, count) for pair in pairs]
    keep_in_int8(models.network, KEY)
    for stack in stacks_of(models.network):
        stack.keep_in_int8()
    prove_cache(models, forward, context)
    ours = [_answers(forward, name, pair, count, tokens)[1] for pair, (tokens, _) in zip(pairs, full, strict=True)]
    before, after = torch.cat([logits for _, logits in full]).float(), torch.cat(ours).float()
    if not torch.isfinite(after).all():
        raise UserError(f"{KEY}: the logits of {models.source} are no numbers then. Set serve.weights: full.")
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    agreement = (p.argmax(-1) == q.argmax(-1)).float().mean()
    effect = Effect(len(p), float(agreement), float((p.exp() * (p - q)).sum(-1).mean()))
    log.info(
        "%s: %.1f %% of %d answer tokens stay the likeliest, and the KL to the full weights is %.4f nats per token "
        "(%s, %d built-in questions)",
        KEY, 100 * effect.agreement, effect.tokens, effect.kl, models.default, len(QUESTIONS),
    )  # fmt: skip
    return effect


def _answers(
    forward: CachedForward,
    name: str,
    prompts: Sequence[Sequence[int]],
    count: int,
    given: Sequence[Sequence[int]] | None = None,
) -> tuple[list[list[int]], torch.Tensor]:
    """Answer prompts greedily, or with given tokens; return for each step the tokens of all rows, and all logits (T B, V)."""
    names, lengths = [name] * len(prompts), list(map(len, prompts))
    read = forward.read(0, names, prompts, 0, [[length - 1] for length in lengths])
    logits, steps = [torch.cat(read)], []
    for step in range(count):
        tokens = list(given[step]) if given else logits[-1].argmax(-1).tolist()
        steps.append(tokens)
        if step < count - 1:
            logits.append(forward.step(names, tokens, [length + step for length in lengths]))
    for slot in reversed(range(len(prompts))):
        forward.release(slot)
    return steps, torch.cat(logits)
