"""Prefer what the user wrote: the answers of the data over the model's samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from scripts.pairs.choosing import Candidate, Labelled, Option, by_closeness, usable
from scripts.pairs.prompts import Prompt
from scripts.pairs.sampling import Sample


def label_by_demonstrations(
    prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]], counts: Counter[str]
) -> list[Labelled]:
    """Return each prompt's own answer as preferred to each different sample (DITTO, Shaikh et al. 2024, arXiv:2406.00888)."""
    labelled = []
    for prompt, of_prompt in zip(prompts, samples, strict=True):
        own = Option(prompt.answer)
        others = [option for option in usable(of_prompt, counts) if option.text.strip() != own.text.strip()]
        candidates = [Candidate(a, b, "own answer") for a, b in by_closeness([own], others)]
        labelled.append(Labelled(prompt.source, prompt.messages, prompt.group, prompt.seed, candidates))
    return labelled
