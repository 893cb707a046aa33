"""The gate of an export: the logits of base + adapter for fixed and user prompts, and how far another model is from them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.common.artifacts import Manifest, sha256_file
from scripts.common.errors import UserError
from scripts.common.paths import resolve
from scripts.common.schema import Data
from scripts.common.stages import TRAINING_STAGES
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import PARSERS, Message, load_datasets
from scripts.dataset.rendering import render_prompt
from scripts.dataset.split import side_of
from scripts.model.generation import generate_answers

log = logging.getLogger(__name__)

FIXED_PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short e-mail that moves a meeting to Thursday.",
    "Name three uses of a paper clip.",
    "Translate into German: the train is late.",
    "What is 17 + 25? Show your steps.",
    "Complete this function:\n\ndef add(a, b):",
    "Summarise: the update shipped, two bugs remain, the next review is on Monday.",
)
USER_PROMPTS = 8
ANSWER_TOKENS = 24
SCORED_TOKENS = 24  # per prompt, at its end; bounds the memory that logits of a large vocabulary take
LONGEST_PROMPT_TOKENS = 384

# fp32 rounding of a real model stays well below this; a lost layer or scale is far above it.
EXACT_LOGIT_DIFF = 1e-3
LEAST_AGREEMENT = {"bf16": 0.98, "fp16": 0.98, "f16": 0.98, "q8_0": 0.95}
LARGEST_KL_NATS = 0.01  # rounding to bf16 costs a ten-thousandth, to q8_0 a thousandth


@dataclass(frozen=True)
class Parity:
    """How far one model's predictions are from another's, over all scored positions."""

    max_abs_logit_diff: float
    mean_kl_nats: float
    greedy_agreement: float
    positions: int

    def __str__(self) -> str:
        return (
            f"max |Δlogit| {self.max_abs_logit_diff:.2g}, mean KL {self.mean_kl_nats:.2g} nats, "
            f"greedy agreement {100 * self.greedy_agreement:.1f} % of {self.positions} positions"
        )

    def as_metrics(self) -> dict[str, float]:
        """Return the figures for manifest and tracker."""
        return asdict(self)


def held_out_prompts(manifest: Manifest) -> list[Sequence[Message]]:
    """Return the user's own held-out prompts, from those files of the adapter's training data that are here."""
    parse = PARSERS[TRAINING_STAGES[manifest.stage].records]
    data = Data(**{**manifest.config["data"], "on_bad_row": "skip"})
    prompts: list[Sequence[Message]] = []
    for entry in manifest.datasets:
        path = resolve(entry.path)
        here = path.is_file()
        if not here or sha256_file(path) != entry.sha256:
            log.info("%s: %s, so its prompts are not compared", entry.path, "changed" if here else "is not here")
            continue
        files = load_datasets(str(path), parse, data, "datasets")
        records = [record for file in files for record in file.records]
        prompts += [record.prompt for record in [r for r in records if side_of(r, data) != "train"] or records]
    return prompts


def build_probes(model: Any, chat: ChatFormat, user_prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Render the prompts and append base + adapter's own answers, so that the positions compared are those it would visit."""
    own = (render_prompt(chat, prompt) for prompt in user_prompts)
    fitting = [ids for ids in own if len(ids) <= LONGEST_PROMPT_TOKENS][:USER_PROMPTS]
    prompts = [render_prompt(chat, chat.user_turn(prompt)) for prompt in FIXED_PROMPTS] + fitting
    answers = generate_answers(
        model, chat.tokenizer, prompts, ANSWER_TOKENS, batch_size=4
    )  # a small cache beside the model
    return [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]


def scored_logits(model: Any, probes: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Yield the logits at the last positions of each probe, (T, V) in fp32; scored one by one, so nothing is padded."""
    model.eval()
    for ids in probes:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), logits_to_keep=SCORED_TOKENS, use_cache=False).logits[0]
        yield logits.float()


class Stored:
    """Logits in an empty folder, read again one by one: beside a small model they are a large part of the memory."""

    def __init__(self, logits: Iterable[torch.Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        self.files = []
        for number, tensor in enumerate(logits):
            self.files.append(folder / f"{number}.safetensors")
            save_file({"logits": tensor.contiguous()}, self.files[-1])

    def __iter__(self) -> Iterator[torch.Tensor]:
        from safetensors.torch import load

        return (load(file.read_bytes())["logits"] for file in self.files)


def compare(before: Iterable[torch.Tensor], after: Iterable[torch.Tensor]) -> Parity:
    """Measure how far logits (T, V) are from those before, KL(before || after); NaN stays NaN, so no gate lets it pass."""
    largest, divergence, agreed, positions = 0.0, 0.0, 0, 0
    for ours, theirs in zip(before, after, strict=True):
        largest = float(torch.maximum(torch.tensor(largest), (ours - theirs).abs().max()))
        logps = torch.log_softmax(ours, -1)
        divergence += float((logps.exp() * (logps - torch.log_softmax(theirs, -1))).sum())
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        positions += len(ours)
    return Parity(largest, divergence / positions, agreed / positions, positions)


def check_effect(effect: Parity, adapter: Path) -> None:
    """Refuse an adapter that a merge could lose without anyone seeing it."""
    if not effect.max_abs_logit_diff > EXACT_LOGIT_DIFF:
        raise UserError(
            f"{adapter}: has no effect: it changes no logit of the base by more than {effect.max_abs_logit_diff:.2g}. "
            "Was it trained at all? Train it again, longer or with a higher learning rate."
        )


def check_exact(found: Parity, effect: Parity, what: str) -> None:
    """Refuse an fp32 model whose logits are not those of base + adapter.

    A weak adapter is held to a twentieth of its own effect, as the fixed bound alone would let it be lost.
    """
    tolerance = min(EXACT_LOGIT_DIFF, effect.max_abs_logit_diff / 20)
    if not found.max_abs_logit_diff <= tolerance:
        raise UserError(
            f"{what} does not compute what base + adapter compute: {found}; wanted max |Δlogit| ≤ {tolerance:.2g}. "
            "Nothing was written. If the adapter is not a plain LoRA, serve it unmerged."
        )


def check_rounded(found: Parity, dtype: str, what: str) -> None:
    """Refuse a model in a narrower type that chooses other tokens than base + adapter, or with other probabilities."""
    if not (found.greedy_agreement >= LEAST_AGREEMENT[dtype] and found.mean_kl_nats <= LARGEST_KL_NATS):
        raise UserError(
            f"{what} answers differently from base + adapter: {found}; wanted {100 * LEAST_AGREEMENT[dtype]:.0f} % agreement "
            f"and a KL of at most {LARGEST_KL_NATS} nats. Nothing was written. Use a wider --dtype."
        )
