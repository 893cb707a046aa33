"""Lineage: which artifacts one was made from, and whether any of them may know what is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.common.artifacts import SPLIT_KEY_VERSION, Manifest, SplitFacts, read_manifest
from scripts.common.errors import UserError
from scripts.common.lineage import ancestors, check_split
from scripts.common.schema import Data
from tests.support.manifests import complete_manifest, finish_folder

DATA = Data(split_seed=3, validation_ratio=0.1, test_ratio=0.2)
OLD = {"seed": 3, "ratio": 0.5}  # as earlier versions, with two sides, wrote it


def split(seed: int = 3, validation: float = 0.1, test: float = 0.2, **changes: Any) -> dict[str, Any]:
    """Write a split as a manifest holds it."""
    facts = {"seed": seed, "validation_ratio": validation, "test_ratio": test, "key_version": SPLIT_KEY_VERSION}
    return {**facts, "group_field": None, **changes}


def finished(folder: Path, made_with: dict[str, Any], stage: str = "sft", parent: Path | None = None) -> Manifest:
    """Finish a folder whose files no other one has."""
    folder.mkdir()
    (folder / "weights").write_text(folder.name)
    made_from = parent and read_manifest(parent).as_parent(parent)
    return finish_folder(folder, stage, split=made_with, parent=made_from)


@pytest.mark.parametrize("made_with", [split(), split(validation=0.4, test=0.5)])
def test_what_held_out_as_much_or_more_is_taken(tmp_path: Path, made_with: dict[str, Any]) -> None:
    """A lower ratio takes a part of the prompts that a higher one takes."""
    check_split("a", finished(tmp_path / "a", made_with), DATA, sides=("validation", "test"))


@pytest.mark.parametrize(
    ("made_with", "named"),
    [
        (split(seed=0), "data.split_seed: 0"),
        (split(test=0.1), "data.test_ratio: 0.1"),
        (split(seed=4, test=0.5), "data.split_seed: 4 and data.test_ratio: 0.5"),
        (split(group_field="customer"), 'data.group_field: "customer"'),
    ],
)
def test_what_may_have_seen_a_test_prompt_is_refused_with_both_splits_and_what_to_do(
    tmp_path: Path, made_with: dict[str, Any], named: str
) -> None:
    made = finished(tmp_path / "a", made_with)
    with pytest.raises(UserError) as refused:
        check_split("a", made, DATA, "dpo.init_from")

    assert str(refused.value) == (
        f"dpo.init_from: a: was trained with another split ({made.split}) than the configuration's (seed 3, validation "
        f"0.1, test 0.2), so it may have seen the prompts that are held out now. Set {named}, or train again: "
        "`python -m scripts.train_sft`."
    )


def test_what_trained_on_a_validation_prompt_may_be_measured_but_not_continued(tmp_path: Path) -> None:
    """The report reads the test side alone; training would choose its checkpoint by prompts that were learnt before."""
    made = finished(tmp_path / "a", split(validation=0.05))

    check_split("a", made, DATA)
    with pytest.raises(UserError, match=r"Set data.validation_ratio: 0.05, or train again"):
        check_split("a", made, DATA, sides=("validation", "test"))


@pytest.mark.parametrize("sides", [("test",), ("validation", "test")])
def test_the_two_sided_split_of_earlier_versions_is_refused_however_much_it_held_out(
    tmp_path: Path, sides: tuple[Any, ...]
) -> None:
    old = finished(tmp_path / "a", OLD, "dpo")

    with pytest.raises(UserError) as refused:
        check_split("a", old, DATA, "dpo.init_from", sides=sides)

    assert old.split == SplitFacts(seed=3, validation_ratio=0.5, test_ratio=0.0, key_version=0)
    assert str(refused.value) == (
        "dpo.init_from: a: was trained by an earlier version, whose split had no test side, so it may have seen the "
        "prompts that are held out now. Train again: `python -m scripts.train_sft`, then `python -m scripts.train_dpo`. "
        "It can still be served and exported."
    )


def test_another_way_to_read_prompts_is_another_split_which_no_setting_leads_to(tmp_path: Path) -> None:
    made = finished(tmp_path / "a", split(key_version=SPLIT_KEY_VERSION + 1))

    with pytest.raises(UserError, match=r"held out now. Train again: `python -m scripts.train_sft`."):
        check_split("a", made, DATA)


@pytest.mark.parametrize("made_with", [OLD, split(seed=8, test=0.1)])
def test_nothing_held_out_was_seen_by_nobody(tmp_path: Path, made_with: dict[str, Any]) -> None:
    nothing = Data(validation_ratio=0, test_ratio=0)

    check_split("a", finished(tmp_path / "a", made_with), nothing, sides=("validation", "test"))


def test_what_an_adapter_continues_is_checked_too(tmp_path: Path) -> None:
    finished(tmp_path / "first", split(seed=4))
    finished(tmp_path / "second", split(), "dpo", tmp_path / "first")
    third = finished(tmp_path / "third", split(), "dpo", tmp_path / "second")

    assert [folder.name for folder, _ in ancestors(third)] == ["second", "first"]
    with pytest.raises(UserError, match=r"third: continues .*/first, which was trained with another split .seed 4"):
        check_split(tmp_path / "third", third, DATA)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_an_ancestor_that_lies_there_no_more_is_not_mistaken_for_another(tmp_path: Path, how: str) -> None:
    finished(tmp_path / "first", split(seed=4))
    second = finished(tmp_path / "second", split(), "dpo", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    if how == "replaced":
        finished(tmp_path / "first", split())
        (tmp_path / "first/weights").write_text("of another training")
        finish_folder(tmp_path / "first", split=split())

    assert list(ancestors(second)) == []
    check_split("second", second, DATA)


def test_an_artifact_that_names_itself_has_an_end(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    made = finished(folder, split())
    again = finish_folder(folder, split=split(), parent=made.as_parent(folder))

    assert len(list(ancestors(again))) == 1
    assert list(ancestors(complete_manifest())) == []
