"""Put models under lm-eval: one base in memory, adapters switched and proved, our token ids where we rendered."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from eval.lmeval_candidates import Candidate
from eval.lmeval_tasks import Ids
from scripts.common.errors import UserError
from scripts.common.fast_path import speed_up
from scripts.common.modeling import check_adapter_fits, load_adapter, load_base, switched_to
from scripts.common.rendering import render_prompt, user_turn
from scripts.common.runtime import Machine
from scripts.common.schema import Config

log = logging.getLogger(__name__)

PROOF_PROMPTS = ("What is the capital of France?", "Write one sentence about the weather.")


class RenderedLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """Give a model the token ids that it was trained on and is served with, where lm-eval would tokenise anew."""

    def __init__(self, *args: Any, ids: Ids, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ids = ids

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Look a rendered prompt up; other texts, such as stop sequences, are tokenised."""
        return self.ids[string] if string in self.ids else list(super().tok_encode(string, *args, **kwargs))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        pair = self.ids[context], self.ids[context, continuation]
        self._refuse_cut(pair[0] + pair[1], self.max_length + 1)
        return pair

    def tok_batch_encode(
        self, strings: Sequence[str], *args: Any, left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad a batch of rendered prompts on the left."""
        rows = [self.ids[string] for string in strings]
        width = max(map(len, rows))
        for row in rows:
            self._refuse_cut(row, left_truncate_len or width)
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            input_ids[place, width - len(row) :], attention_mask[place, width - len(row) :] = torch.tensor(row), 1
        return input_ids, attention_mask

    def _refuse_cut(self, ids: list[int], most: int) -> None:
        if len(ids) > most:
            shown = self.tokenizer.decode(ids[:40])
            raise UserError(
                f"task domain: a held-out record has {len(ids)} tokens and the model takes {most}, so its beginning would "
                f"be cut: {shown!r}… Lower eval.max_new_tokens, or shorten the record."
            )


def load_candidates(
    candidates: Sequence[Candidate], base_folder: Path, tokenizer: Any, config: Config, machine: Machine
) -> tuple[Any, dict[str, float]]:
    """Load the base once with every adapter beside the others, each proved to change the base's logits.

    Returns: the model and, by label, the largest change of a logit. PEFT's name of an adapter is its label.
    """
    adapters = [candidate for candidate in candidates if candidate.is_adapter]
    for candidate in adapters:
        check_adapter_fits(candidate.folder, base_folder, tokenizer)
    model = load_base(base_folder, config, machine)
    for candidate in adapters:
        model = load_adapter(model, candidate.folder, name=adapter_name(candidate.label))
    if adapters and config.performance.fast_path:
        speed_up(model)
    model.eval()
    return model, {candidate.label: prove_adapter(model, candidate, tokenizer) for candidate in adapters}


def adapter_name(label: str) -> str:
    """Return a label as a name that PyTorch accepts for a module."""
    return label.replace(".", "_").replace("/", "_")


@torch.inference_mode()
def prove_adapter(model: Any, candidate: Candidate, tokenizer: Any) -> float:
    """Return the largest change of a logit that an adapter makes.

    Raises: UserError when it makes none: its scores would be the base's under another name.
    """
    largest = 0.0
    for prompt in PROOF_PROMPTS:
        ids = torch.tensor([render_prompt(tokenizer, user_turn(prompt))], device=next(model.parameters()).device)
        with switched_to(model, adapter_name(candidate.label)):
            changed = model(input_ids=ids).logits.float()
        with switched_to(model, None):
            plain = model(input_ids=ids).logits.float()
        if not torch.isfinite(changed).all():
            raise UserError(f"{candidate.folder}: gives NaN or infinite logits. Train it again.")
        largest = max(largest, float((changed - plain).abs().max()))
    if largest == 0:
        raise UserError(
            f"{candidate.folder}: changes no logit of its base, so its scores would be the base's. Was it trained at all?"
        )
    log.info("%s changes the base's logits by up to %.3g", candidate.label, largest)
    return largest


@contextmanager
def active(model: Any, candidate: Candidate) -> Iterator[None]:
    """Compute as one of the candidates of a loaded model."""
    if not hasattr(model, "peft_config"):
        yield
        return
    with switched_to(model, adapter_name(candidate.label) if candidate.is_adapter else None):
        yield


def wrap(model: Any, tokenizer: Any, batch_size: int, ids: Ids | None) -> HFLM:
    """Hand a loaded model to lm-eval."""
    library = logging.getLogger("lm_eval.models.huggingface")
    library.setLevel(logging.ERROR)  # it warns that a loaded model is no path; its later warnings, of cut texts, matter
    try:
        if ids is not None:
            return RenderedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, ids=ids)
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        library.setLevel(logging.NOTSET)
