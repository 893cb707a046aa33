"""Turn conversations into token ids: the one way that training, comparison and serving share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any, ClassVar, Self, overload

from scripts.dataset.chat_format import ChatFormat, UnfitRow, Written, stop_token_ids
from scripts.dataset.records import Feedback, Message, Preference, Record

IGNORED = -100


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation and their labels; -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    sequences: ClassVar[int] = 1  # that one forward pass takes for it

    @classmethod
    def of(cls, prompt_ids: list[int], answer_ids: list[int]) -> Self:
        """Return a prompt with an answer that alone carries labels."""
        return cls(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)

    def in_one_row(self) -> Rendered:
        """Return the row itself; a pair becomes one."""
        return self

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    def runs(self) -> list[tuple[bool, list[int]]]:
        """Return the ids in runs of trained and untrained ones."""
        pairs = zip(self.input_ids, self.labels, strict=True)
        grouped = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
        return [(trained, [token for token, _ in run]) for trained, run in grouped]


@dataclass(frozen=True)
class RenderedFeedback(Rendered):
    """Token ids of a conversation whose last answer was liked or not; that answer alone carries labels."""

    liked: bool

    @property
    def answer_ids(self) -> list[int]:
        return [label for label in self.labels if label != IGNORED]

    @property
    def prompt_ids(self) -> list[int]:
        return self.input_ids[: -self.trained_tokens]

    @property
    def chosen_ids(self) -> list[int]:
        """Return the answer if it was liked."""
        return self.answer_ids if self.liked else []


@dataclass(frozen=True)
class RenderedPair:
    """Token ids of a prompt and of the two answers that may follow it."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    sequences: ClassVar[int] = 2

    @property
    def input_ids(self) -> list[int]:
        """Return the longer of the two sequences: what decides whether the pair fits."""
        return self.prompt_ids + max(self.chosen_ids, self.rejected_ids, key=len)

    @property
    def trained_tokens(self) -> int:
        return len(self.chosen_ids) + len(self.rejected_ids)

    def in_one_row(self) -> Rendered:
        """Return both answers behind the one prompt."""
        return Rendered.of(self.prompt_ids, self.chosen_ids + self.rejected_ids)

    def side(self, answer_ids: list[int]) -> Rendered:
        """Return the prompt with one answer, whose tokens are scored."""
        return Rendered.of(self.prompt_ids, answer_ids)


def render_prompt(chat: ChatFormat, messages: Sequence[Message]) -> list[int]:
    """Return the ids a model is asked to continue, up to where its answer begins."""
    return chat.encode(chat.write_prompt(messages))


def render_completion(chat: ChatFormat, prompt: Sequence[Message], prompt_ids: Sequence[int], answer: str) -> list[int]:
    """Return the ids of an answer as they follow `prompt_ids`, ending exactly at the first stop after its content.

    Raises: UnfitRow when the template has no place for it there.
    """
    written = chat.write_answer(prompt, answer)
    ids = _encode_behind(chat, chat.write_prompt(prompt), written, prompt_ids)
    stops = stop_token_ids(chat.tokenizer)
    ends = [index for index, token in enumerate(ids) if token in stops]
    in_ending = sum(token in stops for token in chat.encode(written.ending))
    if len(ends) > in_ending:
        stop = ids[ends[0]]
        # Of what the answer says, added tokens that end answers are text; ordinary ones cannot be.
        writer = "chat template itself writes" if stop in chat.tokenizer.added_tokens_decoder else "answer holds"
        raise UnfitRow(
            f"the {writer} {chat.tokenizer.decode(stop)!r}, which ends answers, before the end of this one, so the server "
            "would end there."
        )
    return ids[: ends[0] + 1] if ends else [*ids, chat.tokenizer.eos_token_id]


def _encode_behind(chat: ChatFormat, prompt_text: str, written: Written, prompt_ids: Sequence[int]) -> list[int]:
    """Encode an answer and its ending behind the prompt's own ids, from which a model continues."""
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START as BREAK

    rest = written.answer + written.ending
    whole = chat.encode(prompt_text + rest)
    if whole[: len(prompt_ids)] != list(prompt_ids):  # tokens merge across the boundary, so the answer starts afresh
        whole = chat.encode(prompt_text + BREAK + rest)
    return whole[len(prompt_ids) :]


def render_record(chat: ChatFormat, record: Record) -> list[Rendered]:
    """Render a record; each trained answer carries labels up to and with its end-of-turn token.

    Answers share a row as long as a later prompt begins with the row so far. Where the template writes earlier turns
    otherwise than the last one, an answer begins a row of its own. A row ends at its last trained token: what a template
    writes after it is never trained nor served.
    """
    rows: list[Rendered] = []
    for turn in record.trained:
        prompt = record.messages[:turn]
        prompt_ids = render_prompt(chat, prompt)
        with _named(record.source):
            answer_ids = render_completion(chat, prompt, prompt_ids, record.messages[turn]["content"])
        row = Rendered.of(prompt_ids, answer_ids)
        if rows and prompt_ids[: len(rows[-1].input_ids)] == rows[-1].input_ids:
            before = rows.pop().labels
            row = Rendered(row.input_ids, before + row.labels[len(before) :])
        rows.append(row)
    return rows


def render_pair(chat: ChatFormat, pair: Preference) -> RenderedPair:
    """Render a preference; both answers follow the very prompt ids that are served."""
    prompt_ids = render_prompt(chat, pair.prompt)
    with _named(pair.source):
        chosen, rejected = (render_completion(chat, pair.prompt, prompt_ids, answer) for answer in pair.answers)
        if chosen == rejected:
            raise UnfitRow(
                "chosen and rejected become the same tokens, so there is nothing to prefer. Remove the pair."
            )
    return RenderedPair(prompt_ids, chosen, rejected)


@overload
def render_and_check(chat: ChatFormat, record: Record) -> list[Rendered]: ...
@overload
def render_and_check(chat: ChatFormat, record: Preference) -> list[RenderedPair]: ...
def render_and_check(chat: ChatFormat, record: Record | Preference) -> list[Rendered] | list[RenderedPair]:
    """Return the rows of a record, proven to train exactly its answers and their end-of-turn tokens.

    Raises: UnfitRow when it does not survive tokenizer and template.
    """
    if isinstance(record, Preference):
        pair = render_pair(chat, record)
        check_rendered_pair(chat, record, pair)
        return [pair]
    rows = render_record(chat, record)
    check_rendered(chat, record, rows)
    if isinstance(record, Feedback):
        rows = [RenderedFeedback(row.input_ids, row.labels, record.liked) for row in rows]
    return rows


def check_rendered(chat: ChatFormat, record: Record, rows: Sequence[Rendered]) -> None:
    """Prove on one record that the trained tokens are exactly the answers and their end-of-turn tokens."""
    runs = (groupby(row.labels, key=lambda label: label != IGNORED) for row in rows)
    trained = [list(labels) for row in runs for is_trained, labels in row if is_trained]
    with _named(record.source):
        for ids, answer in zip_longest(trained, record.answers):
            _check_trained(chat, ids or [], answer or "")


def check_rendered_pair(chat: ChatFormat, pair: Preference, rendered: RenderedPair) -> None:
    """Prove on one pair that the scored tokens are exactly the two answers, each with its end-of-turn token."""
    with _named(pair.source):
        _check_trained(chat, rendered.chosen_ids, pair.chosen)
        _check_trained(chat, rendered.rejected_ids, pair.rejected)


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Say in a refusal which record it is about."""
    try:
        yield
    except UnfitRow as error:
        raise UnfitRow(f"{source}: {error}") from None


def _check_trained(chat: ChatFormat, trained: Sequence[int], answer: str) -> None:
    tokenizer = chat.tokenizer
    stops = stop_token_ids(tokenizer)
    text = tokenizer.decode([token for token in trained if token not in stops], skip_special_tokens=False)
    ends = sum(token in stops for token in trained)
    packed = _normalized(tokenizer, text)
    if chat.thinking:
        reasoning, content = chat.split(answer)
        # Some tokenizers put a space before every text, so before each part too.
        wanted = [_normalized(tokenizer, part).removeprefix("▁") for part in (reasoning or "", content)]
        same = packed.endswith(wanted[1]) and wanted[0] in packed.removesuffix(wanted[1])
    else:
        same = packed == _normalized(tokenizer, answer)
    if not same or ends != 1 or trained[-1] not in stops:
        raise UnfitRow(
            f"the trained tokens decode to {text[:200]!r} with {ends} end-of-turn tokens; wanted the answer "
            f"{answer[:200]!r} and one. The tokenizer or its chat template cannot be used for training."
        )


def _normalized(tokenizer: Any, text: str) -> str:
    """Return a text as the tokenizer takes it, without white space: one of Qwen, say, composes an e and its accent."""
    packed = "".join(text.split())
    normalizer = tokenizer.backend_tokenizer.normalizer
    return str(normalizer.normalize_str(packed)) if normalizer else packed
