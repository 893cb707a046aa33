"""The gate of an export: what base + adapter say about fixed and user prompts, and whether another model says the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.common.artifacts import sha256_file
from scripts.common.config import ROOT
from scripts.common.errors import UserError
from scripts.common.generation import generate_answers
from scripts.common.records import Message, is_validation, load_datasets, parse_preference, parse_record
from scripts.common.rendering import render_prompt, user_turn
from scripts.common.schema import Data

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
    """How far one model's predictions are from the reference's, over all scored positions."""

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


def held_out_prompts(manifest: dict[str, Any]) -> list[Sequence[Message]]:
    """Return some of the user's own prompts: held-out ones of the data the adapter was trained on, where it is here."""
    parse = parse_preference if manifest["stage"] == "dpo" else parse_record
    data = Data(**{**manifest["config"]["data"], "on_bad_row": "skip"})
    found: list[Sequence[Message]] = []
    for entry in manifest["datasets"]:
        path = next((path for path in (Path(entry["path"]), ROOT / entry["path"]) if path.is_file()), None)
        if path is None or sha256_file(path) != entry["sha256"]:
            log.info("%s: %s, so its prompts are not compared", entry["path"], "changed" if path else "is not here")
            continue
        prompts = [
            record.prompt for file in load_datasets(str(path), parse, data, "datasets") for record in file.records
        ]
        found += [prompt for prompt in prompts if is_validation(prompt, data)] or prompts
    return found


def build_probes(model: Any, tokenizer: Any, user_prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Render the prompts and let the reference answer them, so that what is compared is what the model would say."""
    own = (render_prompt(tokenizer, prompt) for prompt in user_prompts)
    fitting = [ids for ids in own if len(ids) <= LONGEST_PROMPT_TOKENS][:USER_PROMPTS]
    prompts = [render_prompt(tokenizer, user_turn(prompt)) for prompt in FIXED_PROMPTS] + fitting
    answers = generate_answers(model, tokenizer, prompts, ANSWER_TOKENS, batch_size=4)  # a small cache beside the model
    return [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]


def scored_logits(model: Any, probes: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Yield the logits at the last positions of each probe, (T, V) in fp32; held one by one, so nothing is padded."""
    model.eval()
    for ids in probes:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), logits_to_keep=SCORED_TOKENS, use_cache=False).logits[0]
        yield logits.float()


class Stored:
    """Keep logits on disk, from where they are read again one by one: beside a small model they are a large part."""

    def __init__(self, logits: Iterable[torch.Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        self.files = []
        for number, tensor in enumerate(logits):
            self.files.append(folder / f"{number}.safetensors")
            save_file({"logits": tensor.contiguous()}, self.files[-1])

    def __iter__(self) -> Iterator[torch.Tensor]:
        from safetensors.torch import load

        return (load(file.read_bytes())["logits"] for file in self.files)


def compare(reference: Iterable[torch.Tensor], found: Iterable[torch.Tensor]) -> Parity:
    """Measure how far `found` is from `reference`; NaN stays NaN, so that no gate lets it pass."""
    largest, divergence, agreed, positions = 0.0, 0.0, 0, 0
    for ours, theirs in zip(reference, found, strict=True):
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
            "Nothing was written. If the adapter is no plain LoRA, serve it unmerged."
        )


def check_rounded(found: Parity, dtype: str, what: str) -> None:
    """Refuse a model in a narrower type that chooses other tokens than base + adapter, or with other probabilities."""
    if not (found.greedy_agreement >= LEAST_AGREEMENT[dtype] and found.mean_kl_nats <= LARGEST_KL_NATS):
        raise UserError(
            f"{what} answers differently from base + adapter: {found}; wanted {100 * LEAST_AGREEMENT[dtype]:.0f} % agreement "
            f"and a KL of at most {LARGEST_KL_NATS} nats. Nothing was written. Use a wider --dtype."
        )
