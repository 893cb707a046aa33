"""Turn conversations into token ids: the one function that training, comparison and serving share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Self

from scripts.common.errors import UserError
from scripts.dataset.records import Message, Preference, Record, with_system_prompt

IGNORED = -100

# For base models that bring no chat template, such as gpt2. Stored with the adapter like any other template.
BOS_FIRST = "{{ bos_token }}"
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

MARK = "the answer stands here"  # in place of an answer, to see what a template writes after it


def plain_template(tokenizer: Any) -> str:
    """Return the template for a base without one; it begins with BOS where the tokenizer puts BOS before a text.

    A template is encoded without the tokenizer's own special tokens, so the base would never see the BOS it knows.
    gpt2's tokenizer puts none there.
    """
    bos = tokenizer.bos_token_id
    return (BOS_FIRST if bos is not None and tokenizer.encode("a")[:1] == [bos] else "") + PLAIN_TEMPLATE


class UnfitRow(UserError):
    """Say why one record cannot be trained on; others may well be."""


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


def user_turn(prompt: str, system_prompt: str | None = None) -> list[Message]:
    """Make a plain prompt the one user turn it stands for."""
    return with_system_prompt([{"role": "user", "content": prompt}], system_prompt)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the ids a model is asked to continue, up to where its answer begins.

    Control tokens typed inside a message are encoded as ordinary text.
    """
    return _ids(tokenizer, messages, add_generation_prompt=True)


def render_completion(tokenizer: Any, prompt: Sequence[Message], prompt_ids: Sequence[int], answer: str) -> list[int]:
    """Return the ids of an answer as they follow `prompt_ids`, ending exactly at the first stop after its content.

    Raises: UserError when the template cannot be split there.
    """
    whole = _ids(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    stops = stop_token_ids(tokenizer)
    if whole[: len(prompt_ids)] == list(prompt_ids):
        ids = whole[len(prompt_ids) :]
    else:
        # Tokens merge across the boundary; a model continues from the prompt's own ids, so the answer starts afresh.
        shown, full = tokenizer.decode(prompt_ids), tokenizer.decode(whole)
        if not full.startswith(shown):
            raise UserError(
                "the chat template renders a prompt differently once an answer follows, so what is trained would not be "
                f"what is served. The prompt alone ends with {shown[-40:]!r}. Use a base model with another template."
            )
        ids = tokenizer.encode(full[len(shown) :], add_special_tokens=False)
    # A stop may also stand in the content, so those that the template writes are counted from the end.
    ends = [index for index, token in enumerate(ids) if token in stops]
    written = sum(token in stops for token in _ids_after_answer(tokenizer, prompt))
    if not 0 < written <= len(ends):
        return [*ids, tokenizer.eos_token_id]
    return ids[: ends[-written] + 1]


def render_record(tokenizer: Any, record: Record) -> Rendered:
    """Render a record; each trained answer carries labels up to and with its end-of-turn token.

    The sequence ends at the last trained token: what a template writes after it is never trained nor served.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for turn in record.trained:
        prompt = record.messages[:turn]
        prompt_ids = render_prompt(tokenizer, prompt)
        if prompt_ids[: len(input_ids)] != input_ids:
            raise UserError(
                f"{record.source}: the chat template rewrites earlier turns, so the answers of one chat cannot be trained "
                "together. Set data.train_on: last."
            )
        answer_ids = render_completion(tokenizer, prompt, prompt_ids, record.messages[turn]["content"])
        labels += [IGNORED] * (len(prompt_ids) - len(labels)) + answer_ids
        input_ids = prompt_ids + answer_ids
    return Rendered(input_ids, labels)


def render_pair(tokenizer: Any, pair: Preference) -> RenderedPair:
    """Render a preference; both answers follow the very prompt ids that are served."""
    prompt_ids = render_prompt(tokenizer, pair.prompt)
    chosen, rejected = (
        render_completion(tokenizer, pair.prompt, prompt_ids, answer) for answer in (pair.chosen, pair.rejected)
    )
    if chosen == rejected:
        raise UnfitRow(
            f"{pair.source}: chosen and rejected become the same tokens, so there is nothing to prefer. Remove the pair."
        )
    return RenderedPair(prompt_ids, chosen, rejected)


def stop_token_ids(tokenizer: Any) -> set[int]:
    """Return the ids that end an answer: EOS, what the template closes an answer with, and the stops of the base."""
    stops = {tokenizer.eos_token_id, closing_token_id(tokenizer), *getattr(tokenizer, "_stops_of_base", ())}
    return stops - {None}


def set_stops_of_base(tokenizer: Any, ids: Sequence[int]) -> None:
    """Note the stops that a base names beside its tokenizer, in its generation_config.json."""
    tokenizer._stops_of_base = tuple(ids)


def closing_token_id(tokenizer: Any) -> int | None:
    """Return the first added token that the template writes after an answer; None when it writes none.

    It need not be marked as special. Some tokenizers hold line breaks as added tokens, which close nothing.
    """
    if not hasattr(tokenizer, "_closing_token_id"):
        after = _ids_after_answer(tokenizer, user_turn("a"))
        added = tokenizer.added_tokens_decoder
        closing = (token for token in after if token in added and not added[token].content.isspace())
        tokenizer._closing_token_id = next(closing, None)
    closing_id: int | None = tokenizer._closing_token_id
    return closing_id


def check_rendered(tokenizer: Any, record: Record, rendered: Rendered) -> None:
    """Prove on one record that the trained tokens are exactly the answers and their end-of-turn tokens."""
    trained = [label for label in rendered.labels if label != IGNORED]
    _check_trained(tokenizer, record.source, trained, [record.messages[turn]["content"] for turn in record.trained])


def check_rendered_pair(tokenizer: Any, pair: Preference, rendered: RenderedPair) -> None:
    """Prove on one pair that the scored tokens are exactly the two answers, each with its end-of-turn token."""
    _check_trained(tokenizer, pair.source, rendered.chosen_ids, [pair.chosen])
    _check_trained(tokenizer, pair.source, rendered.rejected_ids, [pair.rejected])


def _check_trained(tokenizer: Any, source: str, trained: Sequence[int], answers: Sequence[str]) -> None:
    stops = stop_token_ids(tokenizer)
    text = tokenizer.decode([token for token in trained if token not in stops], skip_special_tokens=False)
    wanted = "".join(answers)
    ends = sum(token in stops for token in trained)
    same = _normalized(tokenizer, text) == _normalized(tokenizer, wanted)
    if not same or ends != len(answers) or trained[-1] not in stops:
        raise UnfitRow(
            f"{source}: the trained tokens decode to {text[:200]!r} with {ends} end-of-turn tokens; wanted the "
            f"answer {wanted[:200]!r} and one. The tokenizer or its chat template cannot be used for training."
        )


def _normalized(tokenizer: Any, text: str) -> str:
    """Return a text as the tokenizer takes it, without white space: one of Qwen, say, composes an e and its accent."""
    packed = "".join(text.split())
    normalizer = tokenizer.backend_tokenizer.normalizer
    return str(normalizer.normalize_str(packed)) if normalizer else packed


def template_sha256(tokenizer: Any) -> str:
    """Identify the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Identify the vocabulary, merges and special tokens, independent of the folder they were read from."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _ids_after_answer(tokenizer: Any, prompt: Sequence[Message]) -> list[int]:
    """Return the ids of what the template writes after the content of an answer."""
    text = _apply_template(tokenizer, [*prompt, {"role": "assistant", "content": MARK}], tokenize=False)
    _, mark, after = text.rpartition(MARK)
    return list(tokenizer.encode(after, add_special_tokens=False)) if mark else []


def _ids(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
    rendered = _apply_template(
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        sanitize_control_tokens=True,
        return_dict=True,
    )
    return list(rendered["input_ids"])


def _apply_template(tokenizer: Any, messages: Sequence[Message], **settings: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **settings)
    except Exception as error:  # a template is a program of the base model's; it can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the model's chat template refuses this conversation: {reason}. Its turns: "
            f"{', '.join(message['role'] for message in messages)}; change the data (data.system_prompt), or the base model."
        ) from None
