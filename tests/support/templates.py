"""Chat templates held against what they write by themselves: tiny tokenizers, cases, and an oracle.

Nothing here asks the project how to render. What is right is read off the text of the template: the prompt it gives to a
model, and what it writes around an answer.
"""

from __future__ import annotations

import copy
import datetime
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any
from unittest import mock

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers.utils import chat_template_utils

from scripts.common.errors import UserError
from scripts.dataset.chat_format import ChatFormat, stop_token_ids
from scripts.dataset.records import Message, Preference, Record
from scripts.dataset.rendering import (
    Rendered,
    check_rendered,
    check_rendered_pair,
    render_pair,
    render_prompt,
    render_record,
)
from tests.conftest import tiny_tokenizer
from tests.support.families import MARKERS, NAMED_TOKENS, OTHERS, TAGS, TRL_TEMPLATES, text_templates

DAY = datetime.date(2025, 7, 31)


@functools.cache
def trained_once() -> Any:
    return tiny_tokenizer()


@functools.cache
def family_tokenizer(name: str) -> Any:
    """Return a tiny tokenizer with a template and the added tokens that it writes."""
    if name in OTHERS:
        return tokenizer_for(*OTHERS[name])
    (named,) = [tokens for start, tokens in NAMED_TOKENS.items() if name.startswith(start)]
    return tokenizer_for((TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), *named)


def tokenizer_for(template: str, bos: str | None, eos: str) -> Any:
    """Return a tiny tokenizer that holds each marker of a template as one token."""
    tokenizer = copy.deepcopy(trained_once())
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"eos_token": eos} | ({"bos_token": bos} if bos else {}))
    markers = {marker for text in _texts(tokenizer) for marker in MARKERS.findall(text)} - {bos, eos}
    for tokens, special in ((markers, True), (set(TAGS.findall(template)), False)):
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in sorted(tokens)])
    return tokenizer


def with_template(tokenizer: Any, template: str) -> Any:
    """Return a loaded tokenizer with another template; the loaded one stays as it is."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def _texts(tokenizer: Any) -> Iterator[str]:
    """Write every case in every form, as far as the template takes it."""
    for case in CASES:
        for form in FORMS:
            for turn in (None, *case.answered):
                try:
                    yield Oracle(tokenizer, case, form).written(turn)
                except Refused:
                    continue


# --- cases


@dataclass(frozen=True)
class Case:
    """A conversation, how the template is called, and whether the answers reason."""

    name: str
    turns: tuple[tuple[str, ...], ...]  # role and content; for an answer that reasons role, reasoning and content
    kwargs: dict[str, Any] = field(default_factory=dict)
    thinking: bool = False

    @property
    def answered(self) -> list[int]:
        return [index for index, turn in enumerate(self.turns) if turn[0] == "assistant"]

    @property
    def record(self) -> Record:
        """Return the conversation as a record of a dataset, each answer trained."""
        messages = [{"role": role, "content": _joined(*texts)} for role, *texts in self.turns]
        return Record("here:1", tuple(messages), tuple(self.answered))


SYSTEM = ("system", "You speak plainly.")
FIRST = (("user", "What is a comet?"), ("assistant", "A ball of ice and dust."))
SECOND = (("user", "And an asteroid?"), ("assistant", "It is made of rock."))
REASONED = (("user", "What is a comet?"), ("assistant", "It has a tail, so ice.", "A ball of ice and dust."))
REASONED_AGAIN = (("user", "And an asteroid?"), ("assistant", "No tail, so no ice.", "It is made of rock."))
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}

CASES = (
    Case("one turn", FIRST),
    Case("several turns", FIRST + SECOND),
    Case("system prompt", (SYSTEM, *FIRST)),
    Case("system prompt, several turns", (SYSTEM, *FIRST, *SECOND)),
    Case("thinking off", FIRST, OFF),
    Case("thinking off, several turns", FIRST + SECOND, OFF),
    Case("thinking on", REASONED, ON, thinking=True),
    Case("thinking on, several turns", REASONED + REASONED_AGAIN, ON, thinking=True),
    Case("thinking on, system prompt", (SYSTEM, *REASONED), ON, thinking=True),
    Case("thinking off, reasoning in the data", REASONED, OFF, thinking=True),
)
COLUMNS = ("one turn", "several turns", "system prompt", "thinking off", "thinking on")  # of the table
BY_NAME = {case.name: case for case in CASES}


# --- the oracle

# How an answer with reasoning is handed to a template: in a field that it looks at, in the text, or not at all.
FORMS = ("reasoning_content", "reasoning", "text", "none")
KNOWS_THINKING = re.compile(r"enable_thinking|reasoning_content|\bthinking\b")


class Refused(Exception):
    """Say why a template has no right rendering."""


def _joined(*texts: str) -> str:
    return "<think>\n{}\n</think>\n\n{}".format(*texts) if len(texts) == 2 else texts[0]


@dataclass(frozen=True)
class Oracle:
    """What a template writes by itself for a case, in text."""

    tokenizer: Any
    case: Case
    form: str = "text"

    @classmethod
    def of(cls, tokenizer: Any, case: Case) -> Oracle:
        """Choose the form in which the template keeps reasoning."""
        oracles = [cls(tokenizer, case, form) for form in FORMS]
        return next(oracle for oracle in oracles if oracle.keeps_reasoning)

    @property
    def keeps_reasoning(self) -> bool:
        """Tell whether the first answer is written with its reasoning, in a way that the template means."""
        first = self.case.answered[0]
        if self.form == "none" or len(self.case.turns[first]) == 2:
            return True
        template = self.tokenizer.chat_template
        if self.form == "text" and KNOWS_THINKING.search(template) and "<think>" not in template:
            return False  # its thinking has tags of its own
        written = _split_behind(self.written(first), self.case.turns[first - 1][-1])[1]
        return self.case.turns[first][1] in written and written.count("<think>") < 2

    def message(self, index: int) -> Message:
        role, *texts = self.case.turns[index]
        if len(texts) == 1 or self.form == "text":
            return {"role": role, "content": _joined(*texts)}
        return {"role": role, "content": texts[1]} | ({} if self.form == "none" else {self.form: texts[0]})

    def written(self, turn: int | None) -> str:
        """Return the text up to and with an answer; None: up to the first answer, which is asked for."""
        return self._apply(turn + 1, asks=False) if turn is not None else self._apply(self.case.answered[0], asks=True)

    def expected(self, turn: int) -> tuple[str, str]:
        """Return the prompt of an answer and what is trained behind it."""
        content, question = self.case.turns[turn][-1], self.case.turns[turn - 1][-1]
        asked = self._apply(turn, asks=True)
        if self.case.turns[0][0] == "system" and self.case.turns[0][1] not in asked:
            raise Refused("the model's chat template leaves out the system message")
        before, found, after = self.written(turn).rpartition(content)
        if not found:
            raise Refused("the template does not write the answer")
        # Once an answer follows, a template may write what stands before the question otherwise. What is served counts.
        head, asked_tail = _split_behind(asked, question)
        _, tail = _split_behind(before, question)
        trained = content + self._up_to_first_stop(after)
        if self.case.thinking:
            return asked, self._reasoning(asked_tail, tail, turn) + trained
        if tail.startswith(asked_tail) and not tail[len(asked_tail) :].strip():  # white space is the answer's
            return asked, tail[len(asked_tail) :] + trained
        return head + tail, trained

    def _reasoning(self, asked_tail: str, tail: str, turn: int) -> str:
        """Return what a model writes between its prompt and the content of its answer."""
        reasoning = self.case.turns[turn][1]
        if "</think>" in asked_tail:
            raise Refused("the prompt closes the thinking block")
        if tail.startswith(asked_tail) and reasoning in tail:
            return tail[len(asked_tail) :]
        if asked_tail.rstrip().endswith("<think>"):  # the template drops the reasoning that its prompt asks for
            return f"{reasoning}\n</think>\n\n"
        raise Refused("the chat template drops the reasoning of a last answer")

    def _up_to_first_stop(self, after: str) -> str:
        """Cut what a template writes after an answer behind its first added token; EOS where it writes none."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        ends = [(after.index(token), -len(token)) for token in added if token in after and not token.isspace()]
        if not ends:
            return after + str(self.tokenizer.eos_token)
        place, length = min(ends)
        return after[: place - length]

    def _apply(self, count: int, *, asks: bool) -> str:
        messages = [self.message(index) for index in range(count)]
        try:
            with mock.patch.object(chat_template_utils, "datetime", _OneDay):
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=asks, **self.case.kwargs
                )
        except TemplateError as error:
            raise Refused(" ".join(str(error).split())) from None
        return str(text)


class _OneDay(datetime.datetime):
    """What a template that prints the date takes for now."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(DAY.year, DAY.month, DAY.day)


def _split_behind(text: str, part: str) -> tuple[str, str]:
    place = text.rindex(part) + len(part)
    return text[:place], text[place:]


def trl_masks(oracle: Oracle, template: str) -> list[str]:
    """Return what trl trains of a case: the parts that a training template marks with `{% generation %}`."""
    tokenizer = oracle.tokenizer
    with mock.patch.object(chat_template_utils, "datetime", _OneDay):
        encoded = tokenizer.apply_chat_template(
            [oracle.message(index) for index in range(len(oracle.case.turns))], chat_template=template,
            return_dict=True, return_assistant_tokens_mask=True, **oracle.case.kwargs,
        )  # fmt: skip
    marked = zip(encoded["assistant_masks"], encoded["input_ids"], strict=True)
    runs = [(mask, [token for _, token in run]) for mask, run in groupby(marked, key=itemgetter(0))]
    return [tokenizer.decode(ids) for mask, ids in runs if mask]


# --- the project, held against it


def chat_format(tokenizer: Any, case: Case) -> ChatFormat:
    return ChatFormat(tokenizer, case.kwargs, DAY, thinking=case.thinking)


def trained_pieces(rows: Sequence[Rendered]) -> list[tuple[list[int], list[int]]]:
    """Return for each trained piece the ids before it and its own."""
    pieces = []
    for row in rows:
        place = 0
        for is_trained, ids in row.runs():
            if is_trained:
                pieces.append((row.input_ids[:place], ids))
            place += len(ids)
        assert place == len(row.input_ids)
    return pieces


def compare(tokenizer: Any, case: Case) -> None:
    """Assert that a record is trained and its prompts are served as the template writes them.

    Raises: Refused when the template has no right rendering, and the project refuses it too, for the same reason.
    """
    chat, record = chat_format(tokenizer, case), case.record
    try:
        expected = [Oracle.of(tokenizer, case).expected(turn) for turn in record.trained]
    except Refused as refused:
        with pytest.raises(UserError, match=re.escape(str(refused))):
            render_record(chat, record)
        raise
    rows = render_record(chat, record)
    found = trained_pieces(rows)
    shown = [(tokenizer.decode(before), tokenizer.decode(ids)) for before, ids in found]
    wanted = [(_read_back(tokenizer, prompt), _read_back(tokenizer, trained)) for prompt, trained in expected]
    assert shown == wanted, f"\nfound  {shown}\nwanted {wanted}"
    for turn, (before, ids), (prompt, trained) in zip(record.trained, found, expected, strict=True):
        assert before == render_prompt(chat, record.messages[:turn]), "served and trained prompts differ"
        assert before == tokenizer.encode(prompt, add_special_tokens=False), prompt
        whole = tokenizer.encode(prompt + trained, add_special_tokens=False)
        if whole[: len(before)] == before:
            assert before + ids == whole
        else:  # tokens merge across the boundary, so the answer stands for itself
            assert ids == tokenizer.encode(trained, add_special_tokens=False)
    check_rendered(chat, record, rows)
    worse = _joined("I am lost.", "I do not know.") if case.thinking else "I do not know."
    pair = Preference("here:1", record.prompt, record.answer, worse)
    rendered = render_pair(chat, pair)
    assert (rendered.prompt_ids, rendered.chosen_ids) == found[-1], "DPO renders otherwise than SFT"
    check_rendered_pair(chat, pair, rendered)
    assert rendered.chosen_ids[-1] in stop_token_ids(tokenizer)


def _read_back(tokenizer: Any, text: str) -> str:
    """Return a text as the tokenizer gives it back: some put a space before what they decode, or take one away."""
    return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))


def verdict(tokenizer: Any, case: Case) -> str:
    """Return `right` or why a template has no right rendering of a case."""
    try:
        compare(tokenizer, case)
    except Refused as refused:
        return str(refused)
    return "right"


def table() -> str:
    """Render what is right for each family, and the template's own reason where nothing is."""
    rows = [f"| template | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    for name in (*text_templates(), *OTHERS):
        tokenizer = family_tokenizer(name)
        cells = [verdict(tokenizer, BY_NAME[name]) if _concerns(tokenizer, name) else "–" for name in COLUMNS]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _concerns(tokenizer: Any, column: str) -> bool:
    """Tell whether a template has the switch that turns thinking off, or knows thinking at all."""
    template = tokenizer.chat_template
    if column == "thinking off":
        return "enable_thinking" in template
    return column != "thinking on" or "</think>" in template or bool(KNOWS_THINKING.search(template))
