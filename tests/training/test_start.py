"""How a run writes conversations: what the template is given, the day that it prints, and what children inherit."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from scripts import train_dpo, train_sft
from scripts.common.artifacts import Manifest, read_manifest
from scripts.common.errors import UserError
from scripts.common.schema import Config
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import Preference, Record
from scripts.training import start
from scripts.training.start import choose_format
from tests.conftest import save_tiny_model, tiny_tokenizer
from tests.support.chain import write_chain
from tests.support.manifests import complete_manifest
from tests.support.training import run_of

TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }} {{ tone | default('calm') }} "
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TODAY = date(2026, 2, 27)


class Calendar(date):
    """The day on which the tests believe to run."""

    @classmethod
    def today(cls) -> date:
        return TODAY


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "date", Calendar)


def chosen(
    tmp_path: Path,
    parent: Manifest | None = None,
    records: Any = (),
    template: str = TEMPLATE,
    *,
    resume: bool = False,
    **data: Any,
) -> ChatFormat:
    run = run_of("sft", Config.model_validate({"data": data}), tmp_path)
    return choose_format(run, tiny_tokenizer(template), records, parent, resume)


def test_the_first_stage_keeps_its_day_and_children_take_their_parents(tmp_path: Path) -> None:
    first = chosen(tmp_path)
    later = chosen(tmp_path, complete_manifest(template_date="2026-01-31", chat_template_kwargs={"tone": "warm"}))

    assert first.date == TODAY
    assert first.facts()["template_date"] == "2026-02-27"
    assert (later.date, later.template_kwargs) == (date(2026, 1, 31), {"tone": "warm"})


def test_a_configured_day_is_taken_and_must_be_the_parents(tmp_path: Path) -> None:
    parent = complete_manifest(template_date="2026-01-31")

    assert chosen(tmp_path, template_date="2020-05-06").date == date(2020, 5, 6)
    assert chosen(tmp_path, parent, template_date=date(2026, 1, 31)).date == date(2026, 1, 31)
    with pytest.raises(UserError, match=r"data\.template_date: found 2020-05-06, .* was made with 2026-01-31"):
        chosen(tmp_path, parent, template_date="2020-05-06")
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs: found {'tone': 'warm'}, .* was made with {}"):
        chosen(tmp_path, parent, chat_template_kwargs={"tone": "warm"})


def test_a_template_without_a_day_notes_none(tmp_path: Path) -> None:
    plain = tiny_tokenizer().chat_template

    assert chosen(tmp_path, template=plain).date is None
    assert chosen(tmp_path, template=plain, template_date="2020-05-06").date is None


def test_a_parent_of_an_earlier_version_leaves_the_day_to_this_one(tmp_path: Path) -> None:
    assert chosen(tmp_path, complete_manifest()).date == TODAY


def test_a_resumed_run_prints_the_day_on_which_it_began(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"template_date": "2026-02-26"}))

    assert chosen(tmp_path, resume=True).date == date(2026, 2, 26)
    assert chosen(tmp_path).date == TODAY, "a fresh start begins today"
    (tmp_path / "state.json").write_text("{}")
    assert chosen(tmp_path, resume=True).date == TODAY, "of an earlier version, which noted none"


def test_an_argument_that_the_template_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.chat_template_kwargs: .* knows no mood"):
        chosen(tmp_path, chat_template_kwargs={"mood": "warm"})


def test_reasoning_in_any_answer_or_in_the_parent_lets_the_model_write_it(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "1+1?"}
    reasoned = "<think>add</think>2"
    record = Record("x:1", (asked, {"role": "assistant", "content": reasoned}), (1,))
    plain = Record("x:2", (asked, {"role": "assistant", "content": "2"}), (1,))

    assert not chosen(tmp_path, records=[plain]).thinking
    assert chosen(tmp_path, records=[plain, record]).thinking
    assert chosen(tmp_path, records=[Preference("x:1", (asked,), "2", reasoned)]).thinking
    assert chosen(tmp_path, complete_manifest(thinking=True), [plain]).thinking


def test_manifests_say_how_a_chain_read_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    tiny_tokenizer(TEMPLATE).save_pretrained(tmp_path / "model")
    given = {"chat_template_kwargs": {"tone": "warm"}, "system_prompt": "Be brief.", "validation_ratio": 0.25}
    config = str(write_chain(tmp_path, data=given))
    short = ["--set", "sft.trainer.max_steps=2", "--set", "dpo.trainer.max_steps=2"]

    assert train_sft.main(["--config", config, *short]) == 0
    monkeypatch.setattr(Calendar, "today", classmethod(lambda cls: date(2026, 2, 28)))
    assert train_dpo.main(["--config", config, *short]) == 0

    for stage in ("sft", "dpo"):
        manifest = read_manifest(tmp_path / f"out/{stage}_adapter")
        assert manifest.chat_template_kwargs == {"tone": "warm"}
        assert (manifest.template_date, manifest.system_prompt, manifest.thinking) == ("2026-02-27", "Be brief.", False)
    finished = (tmp_path / "out/sft_adapter/manifest.json").read_bytes()
    assert train_sft.main(["--config", config, *short, "--resume"]) == 0
    assert (tmp_path / "out/sft_adapter/manifest.json").read_bytes() == finished, "nothing was left to resume"
