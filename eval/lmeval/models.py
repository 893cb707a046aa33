"""Put models under lm-eval: one base in memory, adapters switched and proved, our token ids where we rendered."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from eval.lmeval.candidates import Candidate
from eval.lmeval.tasks import Ids
from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config
from scripts.dataset.chat_format import ChatFormat, stop_token_ids, without_marks
from scripts.dataset.records import with_system_prompt
from scripts.dataset.rendering import render_prompt
from scripts.model.adapter import check_adapter_fits, largest_logit_change, load_adapter, switched_to
from scripts.model.base import load_base
from scripts.model.batch import left_padded_batch, reads_padding
from scripts.model.forward import PaddedForward, forward_of
from scripts.model.generation import decoding_greedily

log = logging.getLogger(__name__)

PROOF_PROMPTS = ("What is the capital of France?", "Write one sentence about the weather.")

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, then token ids, of a context and what may follow it


class SharedContextLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """Read a context once for all its choices and project only what is scored; lm-eval reads it again for each.

    A row is a context with its choices behind one another, each of which sees the context and itself alone.
    Answers are generated greedily up to the stops of the server, unless a task says otherwise.
    """

    def __init__(self, *args: Any, chat: ChatFormat, **kwargs: Any) -> None:
        super().__init__(*args, tokenizer=chat.tokenizer, **kwargs)
        self.chat = chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as the model was trained to read it."""
        if not add_generation_prompt:
            return str(super().apply_chat_template(chat_history, add_generation_prompt))
        return without_marks(self.chat.write_prompt(with_system_prompt(chat_history, self.chat.system_prompt)))

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with decoding_greedily(self.model, self.tokenizer):
            output: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        # lm-eval leaves out special tokens only, and a stop need not be one.
        answers = output[:, context.shape[1] :]
        stops = torch.tensor(sorted(stop_token_ids(self.tokenizer)), device=answers.device)
        answers[torch.isin(answers, stops)] = self.tokenizer.pad_token_id
        return output

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding would write it."""
        rows = _share_contexts(requests)
        longest = max((len(context) + len(answer) for _, context, answer in requests), default=0)
        if not rows or longest > self.max_length + 1 or not self._proves(requests, rows):
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))  # it cuts what is too long
        scores: dict[int, tuple[float, bool]] = {}
        size = override_bs or self.batch_size
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                found = self._score([[requests[index] for index in row] for row in batch])
                scores.update(zip((index for row in batch for index in row), found, strict=True))
                bar.update(sum(map(len, batch)))
        return [scores[index] for index in range(len(requests))]

    def _proves(self, requests: list[Request], rows: list[list[int]]) -> bool:
        """Score the longest row and the fullest in lm-eval's own way too, as not every architecture honours such a mask."""
        tried = [[requests[index] for index in row] for row in (rows[0], max(rows, key=len))]
        theirs = super()._loglikelihood_tokens([request for row in tried for request in row], disable_tqdm=True)
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.05
        try:
            ours = self._score(tried)
        except (RuntimeError, TypeError, ValueError) as error:
            log.info("a context is read again for each choice: %s", str(error).partition("\n")[0])
            return False
        alike = all(
            math.isclose(a, b, rel_tol=tolerance, abs_tol=5 * tolerance)
            for (a, _), (b, _) in zip(ours, theirs, strict=True)
        )
        if not alike:
            log.info("a context is read again for each choice, as this architecture needs it")
        return alike

    @torch.inference_mode()
    def _score(self, rows: Sequence[Sequence[Request]]) -> list[tuple[float, bool]]:
        """Score the continuations of some contexts in one pass; each row is of one context, padded on the left."""
        forward = forward_of(self.model, self.tokenizer.pad_token_id)
        if not isinstance(forward, PaddedForward):  # it computes what rows share once by itself
            asked = [(context, answer) for row in rows for _, context, answer in row]
            places = [range(len(context) - 1, len(context) + len(answer) - 1) for context, answer in asked]
            logits = forward.logits([[*context, *answer[:-1]] for context, answer in asked], places)
            of_answers = torch.split(logits, [len(answer) for _, answer in asked])
            return [_scored(each, answer) for each, (_, answer) in zip(of_answers, asked, strict=True)]
        # Nothing follows the last token of a continuation, so it is not read.
        packed = [(row[0][1], [answer[:-1] for _, _, answer in row]) for row in rows]
        width = max(len(context) + sum(map(len, read)) for context, read in packed)
        input_ids, position_ids, parts = (torch.zeros((len(rows), width), dtype=torch.long) for _ in range(3))
        parts -= 1  # -1 is padding, 0 the context, from 1 on its continuations
        for number, (context, read) in enumerate(packed):
            column = width - len(context) - sum(map(len, read))
            for part, ids in enumerate([context, *read]):
                here = number, slice(column, column + len(ids))
                input_ids[here] = torch.tensor(ids, dtype=torch.long)
                position_ids[here] = torch.arange(len(ids)) + (len(context) if part else 0)
                parts[here] = part
                column += len(ids)
        seen = ((parts[:, None] == 0) | (parts[:, None] == parts[:, :, None])) & torch.ones(width, width).bool().tril()
        mask = torch.zeros(seen.shape, dtype=self.model.dtype).masked_fill(~seen, torch.finfo(self.model.dtype).min)
        logits_to_keep = max(sum(map(len, read)) for _, read in packed) + 1
        logits = self.model(
            input_ids.to(self.device),
            attention_mask=mask[:, None].to(self.device),
            position_ids=position_ids.to(self.device),
            logits_to_keep=logits_to_keep,
            use_cache=False,
        ).logits
        scores = []
        for row, (_, read), answers in zip(logits, packed, rows, strict=True):
            last_of_context = logits_to_keep - sum(map(len, read)) - 1
            column = last_of_context + 1
            for _, _, answer in answers:
                columns = [last_of_context, *range(column, column + len(answer) - 1)]
                scores.append(_scored(row[columns], answer))
                column += len(answer) - 1
        return scores


def _scored(logits: torch.Tensor, answer: Sequence[int]) -> tuple[float, bool]:
    """Return the log-probability of an answer under logits (T, V), and whether greedy decoding would write it."""
    answer_ids, logps = torch.tensor(answer), torch.log_softmax(logits.float(), -1).cpu()
    return float(logps.gather(-1, answer_ids[:, None]).sum()), bool((logps.argmax(-1) == answer_ids).all())


def _share_contexts(requests: Sequence[Request]) -> list[list[int]]:
    """Return the indices of each row, the longest first; a row grows to twice its first request, as attention is square."""
    rows: dict[tuple[int, ...], list[list[int]]] = {}
    lengths: dict[int, int] = {}
    for index, (_, context, answer) in enumerate(requests):
        of_context = rows.setdefault(tuple(context), [])
        if not of_context or lengths[of_context[-1][0]] + len(answer) > 2 * (len(context) + len(answer)):
            of_context.append([])
        row = of_context[-1]
        row.append(index)
        lengths[row[0]] = lengths.get(row[0], len(context)) + len(answer)
    return sorted((row for found in rows.values() for row in found), key=lambda row: -lengths[row[0]])


class RenderedLM(SharedContextLM):
    """Give a model the token ids that it was trained on and is served with, where lm-eval would tokenise again."""

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
        longest = max(rows, key=len)
        self._refuse_cut(longest, left_truncate_len or len(longest))
        return left_padded_batch(rows, self.tokenizer.pad_token_id)

    def _refuse_cut(self, ids: list[int], most: int) -> None:
        if len(ids) > most:
            shown = self.tokenizer.decode(ids[:40])
            raise UserError(
                f"task domain: a held-out record has {len(ids)} tokens and the model takes {most}, so its beginning would "
                f"be cut: {shown!r}… Lower eval.max_new_tokens, or shorten the record."
            )


def load_candidates(
    candidates: Sequence[Candidate], base_folder: Path, chats: dict[str, ChatFormat], config: Config, machine: Machine
) -> tuple[Any, dict[str, float]]:
    """Load the base once with every adapter beside the others, each proved to change the base's logits.

    Returns: the model and, by label, the largest change of a logit. PEFT's name of an adapter is its label.
    """
    adapters = [candidate for candidate in candidates if candidate.is_adapter]
    for candidate in adapters:
        check_adapter_fits(candidate.folder, base_folder, chats[candidate.label].tokenizer)
    model = load_base(base_folder, config, machine)
    for candidate in adapters:
        model = load_adapter(model, candidate.folder, name=adapter_name(candidate.label))
    if adapters and config.performance.fast_path:
        from scripts.speed.speed_up import speed_up

        speed_up(model)
    model.eval()
    return model, {candidate.label: prove_adapter(model, candidate, chats[candidate.label]) for candidate in adapters}


def adapter_name(label: str) -> str:
    """Return a label as a name that PyTorch accepts for a module."""
    return label.replace(".", "_").replace("/", "_")


@torch.inference_mode()
def prove_adapter(model: Any, candidate: Candidate, chat: ChatFormat) -> float:
    """Return the largest change of a logit that an adapter makes.

    Raises: UserError when it makes none: its scores would be the base's under another name.
    """
    prompts = [render_prompt(chat, chat.user_turn(prompt)) for prompt in PROOF_PROMPTS]
    plain = _logits(model, None, prompts)
    changed = _logits(model, adapter_name(candidate.label), prompts)
    largest = largest_logit_change(changed, plain, str(candidate.folder), "its scores would be the base's")
    log.info("%s changes the base's logits by up to %.3g", candidate.label, largest)
    return largest


def _logits(model: Any, adapter: str | None, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Return the logits at every position of all prompts under an adapter, (T, V)."""
    device = next(model.parameters()).device
    with switched_to(model, adapter):
        return torch.cat([model(input_ids=torch.tensor([ids], device=device)).logits[0] for ids in prompts])


@contextmanager
def active(model: Any, candidate: Candidate) -> Iterator[None]:
    """Compute as one of the candidates of a loaded model."""
    if not hasattr(model, "peft_config"):
        yield
        return
    with switched_to(model, adapter_name(candidate.label) if candidate.is_adapter else None):
        yield


def wrap(model: Any, chat: ChatFormat, batch_size: int, ids: Ids | None) -> HFLM:
    """Hand a loaded model to lm-eval."""
    size = 1 if reads_padding(model) else batch_size
    library = logging.getLogger("lm_eval.models.huggingface")
    library.setLevel(
        logging.ERROR
    )  # it warns that a loaded model is not a path; its later warnings, about cut texts, matter
    try:
        if ids is not None:
            return RenderedLM(pretrained=model, chat=chat, batch_size=size, ids=ids)
        return SharedContextLM(pretrained=model, chat=chat, batch_size=size)
    finally:
        library.setLevel(logging.NOTSET)
