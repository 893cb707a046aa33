"""How a model writes a conversation: its tokenizer and chat template, and what the template is given."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

from scripts.common.artifacts import Manifest
from scripts.common.errors import UserError, listing
from scripts.common.schema import Data
from scripts.dataset.columns import REASONING_KEYS
from scripts.dataset.records import Message, with_system_prompt
from scripts.dataset.turns import END_THINK, THINK

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

# In place of texts, to see what a template writes around them.
ASKED, REASONED, ANSWERED = "\ue000question\ue001", "\ue000reasoning\ue001", "\ue000answer\ue001"
REASONING_FIRST = re.compile(rf"\s*{THINK}(?P<reasoning>.*?){END_THINK}(?P<content>.*)", re.DOTALL)
TAKES_REASONING = re.compile(r"reasoning_content|\.thinking\b|\.reasoning\b|['\"](thinking|reasoning)['\"]")
KNOWS_THINKING = re.compile(r"enable_thinking|\bthinking\b")


MOST_FRAMES = 256  # to keep, as clients of the server write system messages of their own


class UnfitRow(UserError):
    """Say why one record cannot be trained on; others may well be."""


class Written(NamedTuple):
    """An answer and what ends it, as the template writes them behind a prompt.

    Control tokens that someone typed are marked, so that `ChatFormat.encode` takes them as text.
    """

    answer: str
    ending: str


class _Frame(NamedTuple):
    """What a template writes around an answer, which depends on the roles before it and on a system message only."""

    opening: str  # between the last question and where the model begins, as in a prompt
    before: str  # between the last question and an answer's content
    ending: str  # after the content

    @property
    def is_plain(self) -> bool:
        """Tell whether a prompt leads right to the content, but for white space.

        That stays with the content: " Paris" behind [/INST] may begin with a single token.
        """
        return self.before.startswith(self.opening) and not self.before[len(self.opening) :].strip()


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """One way to write conversations; an adapter is served and measured in the one it was trained in.

    `date` is today's date for a template that prints it; None is the day on which it is rendered. With `thinking`, a
    prompt ends where the template lets the model begin, and the model writes its reasoning, be it empty. Without,
    all that the template writes before an answer's content belongs to the prompt.
    """

    tokenizer: Any
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: date | None = None
    system_prompt: str | None = None
    thinking: bool = False

    @classmethod
    def of(cls, tokenizer: Any, manifest: Manifest) -> Self:
        """Return the format in which an artifact was trained."""
        day = date.fromisoformat(manifest.template_date) if manifest.template_date else None
        return cls(tokenizer, manifest.chat_template_kwargs, day, manifest.system_prompt, manifest.thinking)

    @classmethod
    def of_base(cls, tokenizer: Any, data: Data) -> Self:
        """Return the format for a model as its makers left it, which begins its answers as it sees fit."""
        return cls(tokenizer, data.chat_template_kwargs or {}, data.template_date, data.system_prompt, thinking=True)

    def facts(self) -> dict[str, Any]:
        """Return what a manifest notes of it."""
        return {
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            "chat_template_sha256": template_sha256(self.tokenizer),
            "chat_template_kwargs": dict(self.template_kwargs),
            "template_date": self.date and self.date.isoformat(),
            "system_prompt": self.system_prompt,
            "thinking": self.thinking,
        }

    def user_turn(self, prompt: str) -> list[Message]:
        """Make a plain prompt the one user turn it stands for."""
        return user_turn(prompt, self.system_prompt)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a written text; marked control tokens become the ids of ordinary text."""
        from transformers.utils.chat_template_utils import encode_marked_chat

        return list(encode_marked_chat(self.tokenizer, text))

    def write_prompt(self, messages: Sequence[Message]) -> str:
        """Write what a model is asked to continue."""
        prompt = self.write(messages, add_generation_prompt=True)
        if messages[0]["role"] == "system" and self.leaves_out_system_messages:
            raise UserError(
                "the model's chat template leaves out the system message. Put its text into the first user turn, and set "
                "data.system_prompt: null."
            )
        frame = self._frame(messages)
        if self.thinking or frame.is_plain:
            return prompt
        if not prompt.endswith(frame.opening):
            raise UnfitRow(
                f"the chat template writes {prompt[-40:]!r} behind this prompt, and {frame.opening[-40:]!r} behind others, "
                "so where the answer begins is not known."
            )
        return prompt[: len(prompt) - len(frame.opening)] + frame.before

    def write_answer(self, prompt: Sequence[Message], text: str) -> Written:
        """Write an answer behind its prompt.

        Raises: UnfitRow when the template has no place for it there.
        """
        frame = self._frame(prompt)
        opening = frame.opening if self.thinking or frame.is_plain else frame.before
        reasoning, content = self.split(text)
        if reasoning is not None:
            self._check_place(opening)
        if self.thinking and self.place_of_reasoning == "prompt":
            marked = map(self._as_answered, (reasoning or "", content))
            return Written(f"\n{END_THINK}\n\n".join(marked), frame.ending)
        written = self._behind_question(prompt, self._prepared({"role": "assistant", "content": text}))
        if not written.startswith(opening) or not written.endswith(frame.ending):
            raise UnfitRow(
                "the chat template writes something else before or after this answer than around others, so what is "
                f"trained would not be what is served: behind the question stands {written[:60]!r}, and the prompt that "
                f"is served ends with {opening[-60:]!r}."
            )
        return Written(written[len(opening) : len(written) - len(frame.ending)], frame.ending)

    def split(self, text: str) -> tuple[str | None, str]:
        """Return the reasoning of an answer, None where it has none, and its content."""
        match = REASONING_FIRST.fullmatch(text)
        if match:
            return match["reasoning"].strip("\n"), match["content"].lstrip("\n")
        if self.opens_thinking and END_THINK in text:  # as such a model answers: the opening tag stands in the prompt
            reasoning, _, content = text.partition(END_THINK)
            return reasoning.strip("\n"), content.lstrip("\n")
        return None, text

    def reasons(self, text: str) -> bool:
        """Tell whether an answer holds reasoning that the template keeps apart from its content."""
        return self.split(text)[0] is not None and self.place_of_reasoning in ("field", "prompt")

    @cached_property
    def place_of_reasoning(self) -> Literal["field", "prompt", "text", "nowhere"]:
        """Say where the reasoning of a last answer goes.

        `field`: the template takes it apart from the content. `prompt`: the template drops it, but its prompt opens the
        thinking block that the answer continues. `text`: in the content, as the template takes it nowhere else.
        `nowhere`: the template knows thinking, but writes no reasoning of a last answer.
        """
        if REASONED in self._probe(_answered(REASONED)):
            return "field"
        if self.opens_thinking:
            return "prompt"
        has_tags_of_its_own = KNOWS_THINKING.search(self._template) and THINK not in self._template
        return "nowhere" if has_tags_of_its_own or TAKES_REASONING.search(self._template) else "text"

    @cached_property
    def opens_thinking(self) -> bool:
        """Tell whether the template's prompt ends within a thinking block."""
        return self._probe(add_generation_prompt=True).rstrip().endswith(THINK)

    @cached_property
    def leaves_out_system_messages(self) -> bool:
        """Tell whether the template writes nothing of a system message, without refusing it."""
        turns = [{"role": "system", "content": REASONED}, {"role": "user", "content": ASKED}]
        with suppress(UserError):
            return REASONED not in self._apply(turns, add_generation_prompt=True)
        return False

    def prints_date(self) -> bool:
        """Tell whether what the template writes depends on the day."""
        days = (date(2001, 2, 3), date(2014, 11, 25))
        early, late = (ChatFormat(self.tokenizer, self.template_kwargs, day)._probe() for day in days)
        return early != late

    def check_kwargs(self, key: str) -> None:
        """Refuse an argument that the template does not know.

        Raises: UserError naming those it knows.
        """
        from transformers.utils.chat_template_utils import _get_template_variables

        given_by_us = {"messages", "add_generation_prompt", "tools", "documents", "strftime_now", "raise_exception"}
        own = set(_get_template_variables(self._template)) - given_by_us
        known = sorted(own - set(self.tokenizer.special_tokens_map))
        if unknown := [name for name in self.template_kwargs if name not in known]:
            names = ", ".join(known) or "none"
            raise UserError(
                listing(
                    f"{key}: the chat template of this base knows no {' and no '.join(unknown)}",
                    [f"what it knows: {names}"],
                    "Correct the name, or remove it.",
                )
            )

    def added_tokens_in(self, ids: Iterable[int]) -> list[str]:
        """Name the added tokens among the ids of an answer that stand for themselves, such as `<tool_call>`."""
        added = self.tokenizer.added_tokens_decoder
        texts = (added[token].content for token in ids if token in added)
        return [text for text in texts if not text.isspace() and text not in self._building_turns]

    def _frame(self, prompt: Sequence[Message]) -> _Frame:
        # A system message may say `/no_think`, which some templates read.
        key = (*(message["role"] for message in prompt), prompt[0]["content"] if prompt[0]["role"] == "system" else "")
        if key not in self._frames:
            before, mark, ending = self._behind_question(prompt, _answered()).partition(ANSWERED)
            if not mark:
                raise UserError("the chat template does not write the content of an answer. Use another base model.")
            if len(self._frames) >= MOST_FRAMES:
                self._frames.clear()
            self._frames[key] = _Frame(self._behind_question(prompt), before, ending)
        return self._frames[key]

    def _behind_question(self, prompt: Sequence[Message], *answer: dict[str, str]) -> str:
        """Return what the template writes behind the last question; of a prompt, or of an answer to it.

        What it writes before that is what is served: some templates put the system message before the last question, and
        write none once an answer follows.
        """
        turns = [
            message if message["role"] == "system" else {"role": message["role"], "content": "text"}
            for message in prompt[:-1]
        ]
        turns += [{"role": prompt[-1]["role"], "content": ASKED}, *answer]
        _, mark, behind = self._apply(turns, add_generation_prompt=not answer).partition(ASKED)
        if not mark:
            raise UserError("the chat template does not write the content of a question. Use another base model.")
        return behind

    @cached_property
    def _frames(self) -> dict[tuple[str, ...], _Frame]:
        return {}

    def _check_place(self, opening: str) -> None:
        problem = None
        if not self.thinking and self.place_of_reasoning in ("field", "prompt"):
            problem = "this is the format of an adapter that was trained without reasoning"
        elif opening.rstrip().endswith(END_THINK):
            problem = (
                "the prompt closes the thinking block before it; see data.chat_template_kwargs (enable_thinking: false?) "
                "and the system prompt"
            )
        elif self.place_of_reasoning == "nowhere":
            problem = "the chat template drops the reasoning of a last answer; use a base with another version of it"
        if problem:
            raise UnfitRow(f"the answer begins with reasoning, but {problem}.")

    def write(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Write a conversation; control tokens that someone typed are marked."""
        prepared = [self._prepared(message) for message in messages]
        return self._apply(prepared, add_generation_prompt=add_generation_prompt)

    def _prepared(self, message: Message) -> dict[str, str]:
        """Mark what is text though it looks like a control token, and hand reasoning over where the template takes it."""
        text = message["content"]
        if message["role"] != "assistant":
            return {**message, "content": _marked(text, self._never_typed)}
        reasoning, content = self.split(text)
        if reasoning is None:
            return {**message, "content": self._as_answered(text)}
        if self.place_of_reasoning == "text":
            start, opened, rest = text.partition(THINK)
            inside, closed, behind = rest.partition(END_THINK)
            written = start + opened + self._as_answered(inside) + closed + self._as_answered(behind)
            return {**message, "content": written}
        places = dict.fromkeys(REASONING_KEYS, self._as_answered(reasoning))
        return {**message, "content": self._as_answered(content), **places}

    def _as_answered(self, text: str) -> str:
        return _marked(text, self._never_in_answers)

    @cached_property
    def _never_typed(self) -> re.Pattern[str]:
        """Match what is text when a user or a system prompt says it: all special tokens and those in the template."""
        tokenizer = self.tokenizer
        return _any_of({*tokenizer._get_control_tokens(self._template), *self._building_turns})

    @cached_property
    def _never_in_answers(self) -> re.Pattern[str]:
        """Match what is text in an answer too: what ends an answer and what builds turns. A `<tool_call>` is itself."""
        return _any_of(self._building_turns)

    @cached_property
    def _building_turns(self) -> set[str]:
        tokenizer = self.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        ids = stop_token_ids(tokenizer) | {getattr(tokenizer, f"{name}_id", None) for name in names}
        for written in (self._probe(_answered(REASONED)), self._probe(add_generation_prompt=True)):
            ids |= set(tokenizer.encode(written.partition(ASKED)[2], add_special_tokens=False))
        added = tokenizer.added_tokens_decoder
        return {added[token].content for token in ids if token in added and not added[token].content.isspace()}

    @cached_property
    def _template(self) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            template = str(self.tokenizer.get_chat_template())
            _compile_jinja_template(template)
        except Exception as error:  # of a tokenizer with several templates and no default, or of jinja's parser
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the model's chat template cannot be read: {reason}. Use another base model.") from None
        return template

    def _probe(self, *answer: dict[str, str], add_generation_prompt: bool = False) -> str:
        """Write a question, with an answer or without; nothing where the template refuses it with a system prompt too.

        Then the conversation at hand will be refused, for the reason that holds for it.
        """
        system, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED}
        for before in ([], [system]):
            with suppress(UserError):
                return self._apply([*before, asked, *answer], add_generation_prompt=add_generation_prompt)
        return ""

    def _apply(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        """Run the template. The library's own method would hand it no function, and so no other date than today's."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        def strftime_now(form: str) -> str:
            return (datetime.combine(self.date, time()) if self.date else datetime.now()).strftime(form)

        given = {**self.tokenizer.special_tokens_map, **self.template_kwargs, "strftime_now": strftime_now}
        try:
            return str(
                _compile_jinja_template(self._template).render(
                    messages=list(messages),
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **given,
                )
            )
        except Exception as error:  # a template is a program of the base model's; it can raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"the model's chat template refuses this conversation: {reason}. Its turns: "
                f"{', '.join(message['role'] for message in messages)}; change the data (data.system_prompt), or the base model."
            ) from None


def _answered(reasoning: str | None = None) -> dict[str, str]:
    keys = REASONING_KEYS if reasoning is not None else ()
    return {"role": "assistant", "content": ANSWERED, **dict.fromkeys(keys, reasoning or "")}


def user_turn(prompt: str, system_prompt: str | None = None) -> list[Message]:
    """Make a plain prompt the one user turn it stands for."""
    return with_system_prompt([{"role": "user", "content": prompt}], system_prompt)


def plain_template(tokenizer: Any) -> str:
    """Return the template for a base without one; it begins with BOS where the tokenizer puts BOS before a text.

    A template is encoded without the tokenizer's own special tokens, so the base would never see the BOS it knows.
    gpt2's tokenizer puts none there.
    """
    bos = tokenizer.bos_token_id
    return (BOS_FIRST if bos is not None and tokenizer.encode("a")[:1] == [bos] else "") + PLAIN_TEMPLATE


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
        after = ChatFormat(tokenizer)._probe(_answered()).partition(ANSWERED)[2]
        added = tokenizer.added_tokens_decoder
        ids = tokenizer.encode(after, add_special_tokens=False)
        closing = (token for token in ids if token in added and not added[token].content.isspace())
        tokenizer._closing_token_id = next(closing, None)
    closing_id: int | None = tokenizer._closing_token_id
    return closing_id


def template_sha256(tokenizer: Any) -> str:
    """Identify the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Identify the vocabulary, merges and special tokens, independent of the folder they were read from."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def without_marks(text: str) -> str:
    """Return a written text as it reads, for those who encode it themselves."""
    return _marked(text, _any_of(set()))


def _marked(text: str, tokens: re.Pattern[str]) -> str:
    """Mark these tokens in a text, and none that was marked before."""
    from transformers.utils.chat_template_utils import mark_control_tokens

    return str(mark_control_tokens(text, tokens))


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Match any of these texts, a longer one before those that it contains."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
