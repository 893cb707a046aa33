"""Rendering: the prompt is served as it was trained, and exactly answer and end of turn carry the loss."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from scripts.common.errors import UserError
from scripts.common.schema import Data
from scripts.dataset.chat_format import (
    ChatFormat,
    UnfitRow,
    stop_token_ids,
    template_sha256,
    tokenizer_sha256,
    user_turn,
)
from scripts.dataset.records import Preference, Record, parse_preference, parse_record
from scripts.dataset.rendering import (
    IGNORED,
    Rendered,
    check_rendered,
    check_rendered_pair,
    render_and_check,
    render_completion,
    render_pair,
    render_prompt,
    render_record,
)
from tests.conftest import ROOT, tiny_tokenizer
from tests.support.records import one_row


def record(*contents: str, train_on: str = "all", system: str | None = None) -> Record:
    """Make a conversation of alternating turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return parse_record({"messages": turns}, "here:1", Data(train_on=train_on, system_prompt=system))


@pytest.fixture(scope="module", params=["chatml", "gpt2", "demo"])
def tokenizer(request: pytest.FixtureRequest, tiny_llama: Path, tiny_gpt2: Path):
    """Return a tokenizer with a template of its own, one with the project's plain template, and a real one."""
    from scripts.model.base import load_tokenizer

    if request.param == "demo":
        return load_tokenizer(request.getfixturevalue("demo_model"))
    return load_tokenizer(tiny_llama if request.param == "chatml" else tiny_gpt2)


PLAIN_SHA256 = "f34101b8fc5af6f7659a32a3cfe59fff2e329d68b3c6dda58afde85d2d8f89e7"


def trained_text(tokenizer, rendered: Rendered) -> list[str]:
    """Decode each run of trained tokens."""
    return [tokenizer.decode(ids) for trained, ids in rendered.runs() if trained]


def end_of_turn(tokenizer) -> str:
    """Return the token that closes an answer."""
    return tokenizer.eos_token


ANSWERS = [
    "Yes.",
    "two\nlines",
    "ends with a newline\n",
    " leading space",
    "\nleading newline",
    "  ",
    "ünïcode 漢字 🙂",
    "tab\t",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_prompt_ids_are_a_prefix_and_the_rest_is_answer_and_end_of_turn(tokenizer, answer: str) -> None:
    """An answer of white space only is refused by the reader; rendering must still be exact about it."""
    messages = user_turn("What is it?")
    conversation = Record("here:1", (*messages, {"role": "assistant", "content": answer}), (1,))

    prompt_ids = render_prompt(ChatFormat(tokenizer), messages)
    rendered = one_row(tokenizer, conversation)

    assert rendered.input_ids[: len(prompt_ids)] == prompt_ids
    assert rendered.labels[: len(prompt_ids)] == [IGNORED] * len(prompt_ids)
    assert rendered.labels[len(prompt_ids) :] == rendered.input_ids[len(prompt_ids) :]
    assert rendered.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(rendered.input_ids[len(prompt_ids) : -1]) == answer


def test_nothing_after_the_end_of_turn_is_trained(tokenizer) -> None:
    """Templates write a newline after the closing token; a server stops before it, so it must not be learnt."""
    rendered = one_row(tokenizer, record("Hi", "Hello"))

    assert trained_text(tokenizer, rendered) == ["Hello" + end_of_turn(tokenizer)]
    assert rendered.labels[-1] == tokenizer.eos_token_id


def test_training_on_all_turns_labels_each_answer_and_its_end(tokenizer) -> None:
    rendered = one_row(tokenizer, record("a", "one", "b", "two"))
    end = end_of_turn(tokenizer)

    assert trained_text(tokenizer, rendered) == ["one" + end, "two" + end]
    assert "b" in tokenizer.decode(rendered.runs()[2][1])


def test_training_on_the_last_turn_leaves_earlier_answers_unlabelled(tokenizer) -> None:
    rendered = one_row(tokenizer, record("a", "one", "b", "two", train_on="last"))

    assert trained_text(tokenizer, rendered) == ["two" + end_of_turn(tokenizer)]
    assert rendered.input_ids == one_row(tokenizer, record("a", "one", "b", "two")).input_ids


def test_a_later_turn_is_trained_after_the_prompt_that_is_served(tokenizer) -> None:
    chat = record("a", "one", "b", "two")

    served = render_prompt(ChatFormat(tokenizer), chat.prompt)

    assert one_row(tokenizer, chat).input_ids[: len(served)] == served


def test_system_prompt_is_rendered_and_never_trained(tokenizer) -> None:
    rendered = one_row(tokenizer, record("Hi", "Hello", system="Be very brief."))

    assert "Be very brief." in tokenizer.decode(rendered.input_ids)
    assert trained_text(tokenizer, rendered) == ["Hello" + end_of_turn(tokenizer)]


@pytest.mark.parametrize("place", ["prompt", "answer"])
def test_control_tokens_typed_by_a_user_stay_text(tokenizer, place: str) -> None:
    """Otherwise a message could close its own turn and open another one."""
    typed = f"x{tokenizer.eos_token}y"
    chat = record(typed, "Hello") if place == "prompt" else record("Hi", typed)
    plain = record("x y", "Hello") if place == "prompt" else record("Hi", "x y")

    rendered = one_row(tokenizer, chat)

    assert rendered.input_ids.count(tokenizer.eos_token_id) == one_row(tokenizer, plain).input_ids.count(
        tokenizer.eos_token_id
    )
    assert typed in tokenizer.decode(rendered.input_ids)


def test_every_sample_record_renders_to_exactly_its_answer(tokenizer) -> None:
    from scripts.dataset.records import load_datasets

    files = load_datasets(str(ROOT / "data/sft/sample_sft.jsonl"), parse_record, Data(), "sft.dataset_path")
    for sample in files[0].records[:60]:
        rendered = one_row(tokenizer, sample)
        check_rendered(ChatFormat(tokenizer), sample, [rendered])
        assert trained_text(tokenizer, rendered) == [sample.answer + end_of_turn(tokenizer)], sample.source


def test_a_pair_is_two_answers_after_the_very_prompt_that_is_served(tokenizer) -> None:
    pair = Preference("here:1", tuple(user_turn("Hi")), "Hello", "Go away and never come back")

    rendered = render_pair(ChatFormat(tokenizer), pair)

    assert rendered.prompt_ids == render_prompt(ChatFormat(tokenizer), pair.prompt)
    assert rendered.side(rendered.chosen_ids) == one_row(tokenizer, record("Hi", pair.chosen))
    assert rendered.side(rendered.rejected_ids) == one_row(tokenizer, record("Hi", pair.rejected))
    assert rendered.input_ids == one_row(tokenizer, record("Hi", pair.rejected)).input_ids, "the longer one"
    assert rendered.trained_tokens == len(rendered.chosen_ids) + len(rendered.rejected_ids)


def test_a_pair_of_equal_answers_is_refused(tokenizer) -> None:
    with pytest.raises(UserError) as caught:
        render_pair(ChatFormat(tokenizer), Preference("here:1", tuple(user_turn("Hi")), "Hello", "Hello"))

    assert str(caught.value) == (
        "here:1: chosen and rejected become the same tokens, so there is nothing to prefer. Remove the pair."
    )


def test_ids_without_labels_are_never_taken_for_whole() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Rendered([1, 2], [1]).runs()


# --- the check that stops a run


def test_check_passes_what_rendering_gives(tokenizer) -> None:
    for chat in (record("a", "one", "b", "two"), record("a", "one", "b", "two", train_on="last")):
        check_rendered(ChatFormat(tokenizer), chat, [one_row(tokenizer, chat)])


def test_check_wants_the_end_of_every_answer(tokenizer) -> None:
    chat = record("a", "one", "b", "two")
    good = one_row(tokenizer, chat)
    labels = list(good.labels)
    labels[labels.index(tokenizer.eos_token_id)] = IGNORED

    with pytest.raises(UserError, match="here:1: the trained tokens decode to 'one' with 0 end-of-turn tokens"):
        check_rendered(ChatFormat(tokenizer), chat, [dataclasses.replace(good, labels=labels)])


def test_check_shows_the_first_200_characters_of_both_sides(tokenizer) -> None:
    chat = record("Hi", "y" * 300)
    good = one_row(tokenizer, chat)

    with pytest.raises(UserError) as caught:
        check_rendered(ChatFormat(tokenizer), chat, [dataclasses.replace(good, labels=[*good.labels[:-1], IGNORED])])

    assert str(caught.value) == (
        f"here:1: the trained tokens decode to {'y' * 200!r} with 0 end-of-turn tokens; wanted the answer {'y' * 200!r} and "
        "one. The tokenizer or its chat template cannot be used for training."
    )


@pytest.mark.parametrize("kind", ["conversation", "pair"])
def test_a_record_that_the_tokenizer_does_not_keep_is_refused_where_it_is_rendered(kind: str) -> None:
    from tokenizers import decoders

    tokenizer = tiny_tokenizer()
    sample = (
        record("Hi", "yes") if kind == "conversation" else Preference("here:1", tuple(user_turn("Hi")), "yes", "no")
    )
    assert len(render_and_check(ChatFormat(tokenizer), sample)) == 1
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Replace("y", "?")])

    with pytest.raises(UnfitRow, match=r"here:1: the trained tokens decode to '\?es'"):
        render_and_check(ChatFormat(tokenizer), sample)


@pytest.mark.parametrize(
    "fault", ["prompt trained too", "end missing", "answer cut", "one token early", "control token trained", "nothing"]
)
def test_check_refuses_a_wrong_mask(tokenizer, fault: str) -> None:
    chat = record("What colour is the sky?", "It is blue today")
    good = one_row(tokenizer, chat)
    first = next(index for index, label in enumerate(good.labels) if label != IGNORED)
    labels = list(good.labels)
    if fault == "prompt trained too":
        labels = list(good.input_ids)
    elif fault == "end missing":
        labels[-1] = IGNORED
    elif fault == "answer cut":
        labels[first] = IGNORED
    elif fault == "one token early":
        labels[first - 6 : first] = good.input_ids[first - 6 : first]
    elif fault == "control token trained":
        labels[first - 1] = next(t for t in tokenizer.all_special_ids if t not in stop_token_ids(tokenizer))
    else:
        labels = [IGNORED] * len(labels)

    with pytest.raises(UserError, match="here:1: the trained tokens decode to"):
        check_rendered(ChatFormat(tokenizer), chat, [dataclasses.replace(good, labels=labels)])


# --- templates


def test_template_and_tokenizer_are_known_by_their_content() -> None:
    first, again, other = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer("{{ messages }}")

    assert template_sha256(first) == hashlib.sha256(first.chat_template.encode()).hexdigest()
    assert template_sha256(other) != template_sha256(first)
    assert tokenizer_sha256(first) == tokenizer_sha256(again) == tokenizer_sha256(other)
    other.add_special_tokens({"additional_special_tokens": ["<|close|>"]})
    assert tokenizer_sha256(other) != tokenizer_sha256(first)


def test_plain_template_is_the_documented_one(tiny_gpt2: Path) -> None:
    from scripts.model.base import load_tokenizer

    tokenizer = load_tokenizer(tiny_gpt2)

    assert user_turn("Hi") == [{"role": "user", "content": "Hi"}]
    assert tokenizer.decode(render_prompt(ChatFormat(tokenizer), user_turn("Hi", "Be brief."))) == (
        "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n"
    )


def save_with_bos(folder: Path, single: str, *, bos: bool = True) -> Path:
    """Save a tokenizer without chat template that encodes a text as `single` says, with `<|start|>` as its BOS."""
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"} if bos else {"additional_special_tokens": ["<|start|>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single,
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|start|>", "<|end|>")],
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("single", "bos", "starts"),
    [
        ("<|start|> $A", True, 1),
        ("<|start|> $A <|end|>", True, 1),
        ("$A", True, 0),
        ("$A <|start|>", True, 0),
        ("<|start|> $A", False, 0),
    ],
)
def test_plain_template_begins_with_bos_once_where_the_tokenizer_does(
    tmp_path: Path, single: str, bos: bool, starts: int
) -> None:
    from scripts.model.base import load_tokenizer

    tokenizer = load_tokenizer(save_with_bos(tmp_path, single, bos=bos))
    start = tokenizer.convert_tokens_to_ids("<|start|>")
    pair = Preference("here:1", tuple(user_turn("Hi")), "Yes", "No")
    chat = record("a", "one", "b", "two", system="Be brief.")

    prompts = [
        render_prompt(ChatFormat(tokenizer), user_turn("Hi")),
        one_row(tokenizer, chat).input_ids,
        render_pair(ChatFormat(tokenizer), pair).prompt_ids,
    ]

    check_rendered(ChatFormat(tokenizer), chat, [one_row(tokenizer, chat)])
    assert [ids[0] == start for ids in prompts] == [bool(starts)] * 3
    assert [ids.count(start) for ids in prompts] == [starts] * 3
    tokenizer.save_pretrained(tmp_path / "adapter")
    stored = load_tokenizer(tmp_path / "adapter")
    assert template_sha256(stored) == template_sha256(tokenizer)
    assert render_prompt(ChatFormat(stored), user_turn("Hi")) == prompts[0]


def test_typed_bos_stays_text(tmp_path: Path) -> None:
    from scripts.model.base import load_tokenizer

    tokenizer = load_tokenizer(save_with_bos(tmp_path, "<|start|> $A"))

    assert render_prompt(ChatFormat(tokenizer), user_turn("<|start|>Hi")).count(tokenizer.bos_token_id) == 1


def test_plain_template_of_a_tokenizer_without_bos_is_that_of_adapters_before(tiny_gpt2: Path) -> None:
    """Their manifests hold its hash, so another template would refuse every one of them."""
    from scripts.model.base import load_tokenizer

    assert template_sha256(load_tokenizer(tiny_gpt2)) == PLAIN_SHA256


def test_demo_model_prompts_are_those_of_its_own_chat_template(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    messages = [*user_turn("Hello", "Be brief."), {"role": "assistant", "content": "Hi."}, *user_turn("And?")]

    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    assert render_prompt(ChatFormat(tokenizer), messages) == list(wanted)


def test_answers_behind_rewritten_turns_are_rows_of_their_own_each_trained_once() -> None:
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m['role'] + ':' }}"
        "{% if m['role'] == 'assistant' and not loop.last %}{{ '(thoughts removed)' }}{% else %}{{ m['content'] }}{% endif %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )

    chat = record("a", "one", "b", "two", "c", "three")

    rows = render_record(ChatFormat(tokenizer), chat)

    check_rendered(ChatFormat(tokenizer), chat, rows)
    end = tokenizer.eos_token
    assert [trained_text(tokenizer, row) for row in rows] == [["one" + end], ["two" + end], ["three" + end]]
    for row, turn in zip(rows, chat.trained, strict=True):
        served = render_prompt(ChatFormat(tokenizer), chat.messages[:turn])
        assert row.input_ids[: len(served)] == served
    last = one_row(tokenizer, record("a", "one", "b", "two", train_on="last"))
    assert trained_text(tokenizer, last) == ["two" + tokenizer.eos_token]


def test_prompt_that_changes_once_answered_is_served_as_it_is_trained() -> None:
    tokenizer = tiny_tokenizer(
        "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )

    rendered = one_row(tokenizer, record("Hi", "Hello"))

    served = render_prompt(ChatFormat(tokenizer), user_turn("Hi"))
    assert tokenizer.decode(served) == "1Hi<|end|>"
    assert rendered.input_ids[: len(served)] == served
    assert trained_text(tokenizer, rendered) == ["Hello<|end|>"]


def test_template_without_an_end_still_trains_eos() -> None:
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )

    rendered = one_row(tokenizer, record("Hi", "Hello"))

    assert rendered.labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([label for label in rendered.labels if label != IGNORED][:-1]).strip() == "Hello"


def test_template_that_closes_with_another_token_than_eos_ends_there() -> None:
    """Many instruct models close a turn with <|im_end|> while their EOS is <|endoftext|>."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|close|>", "<|assistant|>", "<|next|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ '<|close|><|next|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    close = tokenizer.convert_tokens_to_ids("<|close|>")

    rendered = one_row(tokenizer, record("Hi", "Hello"))

    assert stop_token_ids(tokenizer) == {close, tokenizer.eos_token_id}
    assert rendered.labels[-1] == close


def test_answer_tokens_do_not_merge_into_the_prompt(tiny_gpt2: Path) -> None:
    """The plain template ends a prompt with a newline; an answer that begins with one must not change it."""
    from scripts.model.base import load_tokenizer

    tokenizer = load_tokenizer(tiny_gpt2)
    prompt = user_turn("Hi")
    prompt_ids = render_prompt(ChatFormat(tokenizer), prompt)

    ids = render_completion(ChatFormat(tokenizer), prompt, prompt_ids, "\n\nHello")

    assert tokenizer.decode(prompt_ids + ids).startswith("### User:\nHi\n\n### Assistant:\n\n\nHello")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.convert_tokens_to_ids("<|system|>"))]
    )
    assert render_completion(ChatFormat(tokenizer), prompt, prompt_ids, "\n\nHello") == ids, (
        "a text's own start stands only at its start"
    )


@pytest.mark.parametrize(
    ("says", "message"),
    [("roles must   alternate", "roles must alternate"), ("x" * 300, "x" * 200), ("", "TemplateError")],
)
def test_a_conversation_that_the_template_refuses_is_reported_with_its_turns_and_the_fix(
    says: str, message: str
) -> None:
    strict = tiny_tokenizer(f"{{{{ raise_exception('{says}') }}}}")

    with pytest.raises(UserError) as caught:
        render_prompt(ChatFormat(strict), [{"role": "system", "content": "Be brief."}, *user_turn("Hello")])

    assert str(caught.value) == (
        f"the model's chat template refuses this conversation: {message}. Its turns: system, user; "
        "change the data (data.system_prompt), or the base model."
    )


def normalizing_tokenizer() -> Any:
    """Return a tokenizer that composes letters and accents, as those of Qwen and OLMo do."""
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("text", ["Voila\u0300 le cafe\u0301", "\u092a\u0947\u095c", "plain"])
def test_a_text_that_the_tokenizer_normalizes_is_trained(text: str) -> None:
    """A composed e is other bytes than an e and its accent; a nukta of Hindi is taken apart by NFC."""
    tokenizer = normalizing_tokenizer()
    record = parse_record({"instruction": text, "output": text}, "here:1", Data())
    pair = parse_preference({"prompt": text, "chosen": text, "rejected": text + "!"}, "here:1", Data())

    check_rendered(ChatFormat(tokenizer), record, [one_row(tokenizer, record)])
    check_rendered_pair(ChatFormat(tokenizer), pair, render_pair(ChatFormat(tokenizer), pair))


def test_a_text_that_a_normalizer_does_not_explain_is_refused() -> None:
    tokenizer = normalizing_tokenizer()
    record = parse_record({"instruction": "a", "output": "cafe\u0301"}, "here:1", Data())
    other = dataclasses.replace(record, messages=(record.messages[0], {"role": "assistant", "content": "cafe"}))

    with pytest.raises(UnfitRow, match="here:1: the trained tokens decode to"):
        check_rendered(ChatFormat(tokenizer), other, [one_row(tokenizer, record)])
