"""Where an answer ends: at the first stop after its content, for families whose EOS is not what closes a turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.common.schema import Data
from scripts.dataset.chat_format import ChatFormat, closing_token_id, stop_token_ids, user_turn
from scripts.dataset.records import Preference, parse_record
from scripts.dataset.rendering import (
    RenderedPair,
    check_rendered,
    check_rendered_pair,
    render_completion,
    render_pair,
    render_prompt,
)
from scripts.model.base import load_tokenizer
from tests.conftest import tiny_tokenizer
from tests.support.records import one_row
from tests.support.stops import FAMILIES, Family, change_generation_config, family_tokenizer, save_family_model
from tests.support.tokenizers import real_tokenizer

PAIR = Preference("here:1", tuple(user_turn("Hi")), "Hello", "Go away")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_stops_are_closing_token_eos_and_those_of_the_generation_config(family: Family, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_family_model(tmp_path / "model", family))

    assert stop_token_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(sorted(family.stops)))
    assert closing_token_id(tokenizer) == tokenizer.convert_tokens_to_ids(family.closing)


@pytest.mark.parametrize("listed", [None, 3, [3, 4]])
def test_generation_config_names_no_stop_one_or_several(listed: object, tmp_path: Path) -> None:
    folder = save_family_model(tmp_path / "model", FAMILIES["phi3"])
    plain = stop_token_ids(family_tokenizer(FAMILIES["phi3"]))
    change_generation_config(folder, eos_token_id=listed)

    assert stop_token_ids(load_tokenizer(folder)) - plain == ({3, 4} if listed == [3, 4] else {3} if listed else set())
    (folder / "generation_config.json").unlink()
    assert stop_token_ids(load_tokenizer(folder)) == plain


@pytest.mark.parametrize("listed", ["</s>", [3, "</s>"], True, [[3]]])
def test_generation_config_with_other_stops_than_ids_is_refused(listed: object, tmp_path: Path) -> None:
    folder = save_family_model(tmp_path / "model", FAMILIES["phi3"])
    change_generation_config(folder, eos_token_id=listed)

    with pytest.raises(
        UserError, match=r"generation_config\.json: eos_token_id: found .*, wanted an id or a list of ids"
    ):
        load_tokenizer(folder)


def test_generation_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = save_family_model(tmp_path / "model", FAMILIES["phi3"])
    (folder / "generation_config.json").write_text("{")

    with pytest.raises(UserError, match=r"generation_config\.json: cannot be used"):
        load_tokenizer(folder)


def test_answer_is_trained_up_to_its_first_stop(family: Family) -> None:
    """What the template writes after it, a line break or EOS, is never served, so it is not trained."""
    tokenizer = family_tokenizer(family)
    chat = parse_record(
        {"messages": [*user_turn("Hi"), {"role": "assistant", "content": "Hello there."}]}, "here:1", Data()
    )
    prompt_ids = render_prompt(ChatFormat(tokenizer), chat.prompt)

    ids = render_completion(ChatFormat(tokenizer), chat.prompt, prompt_ids, "Hello there.")

    assert tokenizer.decode(ids) == f"Hello there.{family.closing}"
    whole = tokenizer.apply_chat_template(list(chat.messages), tokenize=False)
    assert tokenizer.decode(prompt_ids + ids) + family.after_closing == whole, "the case is the family's"
    rendered = one_row(tokenizer, chat)
    check_rendered(ChatFormat(tokenizer), chat, [rendered])
    assert rendered.input_ids == prompt_ids + ids
    check_rendered_pair(ChatFormat(tokenizer), PAIR, render_pair(ChatFormat(tokenizer), PAIR))


def test_answers_of_several_turns_are_trained_up_to_their_first_stops(family: Family) -> None:
    tokenizer = family_tokenizer(family)
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate("abcd")]
    chat = parse_record({"messages": turns}, "here:1", Data())

    rendered = one_row(tokenizer, chat)

    check_rendered(ChatFormat(tokenizer), chat, [rendered])
    trained = [tokenizer.decode(ids) for trained, ids in rendered.runs() if trained]
    assert trained == [f"b{family.closing}", f"d{family.closing}"]


@pytest.mark.parametrize("where", ["{0}", "a {0}", "{0} a", "a {0}{0} b", "a\n{0}\nb\n"])
def test_stop_typed_in_an_answer_stays_text(family: Family, where: str) -> None:
    tokenizer = family_tokenizer(family)
    for typed in (family.closing, family.eos):
        answer = where.format(typed)
        prompt = user_turn("Hi")
        ids = render_completion(ChatFormat(tokenizer), prompt, render_prompt(ChatFormat(tokenizer), prompt), answer)

        assert sum(token in stop_token_ids(tokenizer) for token in ids) == 1
        assert ids[-1] == tokenizer.convert_tokens_to_ids(family.closing)
        assert "".join(tokenizer.decode(ids[:-1]).split()) == "".join(answer.split())


def test_stop_in_an_answer_that_only_the_generation_config_names_is_not_its_end(tmp_path: Path) -> None:
    """It would end a served answer there, so in a trained one it is text."""
    tokenizer = family_tokenizer(FAMILIES["phi3"])
    tokenizer.add_tokens(["<price>"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        f'{{"eos_token_id": [{tokenizer.convert_tokens_to_ids("<price>")}]}}'
    )
    tokenizer = load_tokenizer(tmp_path)
    pair = Preference("here:1", tuple(user_turn("Hi")), "It is <price> today", "Go away")

    rendered = render_pair(ChatFormat(tokenizer), pair)

    assert tokenizer.decode(rendered.chosen_ids) == "It is <price> today<|end|>"
    assert tokenizer.convert_tokens_to_ids("<price>") not in rendered.chosen_ids
    check_rendered_pair(ChatFormat(tokenizer), pair, rendered)


def test_template_that_closes_nothing_ends_with_eos_although_a_stop_is_typed() -> None:
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    prompt = user_turn("Hi")

    ids = render_completion(ChatFormat(tokenizer), prompt, render_prompt(ChatFormat(tokenizer), prompt), "Hello")

    assert closing_token_id(tokenizer) is None
    assert tokenizer.decode(ids) == "Hello<|end|>"


def test_line_break_that_a_tokenizer_holds_as_an_added_token_closes_nothing() -> None:
    tokenizer = family_tokenizer(FAMILIES["gemma3"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )

    assert closing_token_id(tokenizer) is None
    assert stop_token_ids(tokenizer) == {tokenizer.eos_token_id}


def test_first_token_of_the_vocabulary_may_close_an_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|pad|>")

    assert tokenizer.convert_tokens_to_ids("<|pad|>") == 0
    assert stop_token_ids(tokenizer) == {0, tokenizer.eos_token_id}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_pair_whose_answer_trains_more_than_its_end_is_refused(side: str) -> None:
    tokenizer = family_tokenizer(FAMILIES["phi3"])
    sides = vars(render_pair(ChatFormat(tokenizer), PAIR)).copy()
    sides[f"{side}_ids"] = sides[f"{side}_ids"] + [tokenizer.eos_token_id]

    with pytest.raises(UserError, match=r"here:1: the trained tokens decode to .* with 2 end-of-turn tokens"):
        check_rendered_pair(ChatFormat(tokenizer), PAIR, RenderedPair(**sides))


@pytest.mark.parametrize(
    ("name", "closing", "eos"),
    [("gemma3", "<end_of_turn>", "<end_of_turn>"), ("llama3_1", "<|eot_id|>", "<|eot_id|>"), ("qwen3", "<|im_end|>", "<|im_end|>")],
)  # fmt: skip
def test_real_tokenizers_close_an_answer_with_the_token_of_their_family(name: str, closing: str, eos: str) -> None:
    tokenizer = real_tokenizer(name)

    assert {tokenizer.decode([token]) for token in stop_token_ids(tokenizer)} == {closing, eos}
