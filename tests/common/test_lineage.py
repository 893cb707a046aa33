"""Lineage: which artifacts one was made from, and whether any of them may know what is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.artifacts import Manifest, read_manifest
from scripts.common.errors import UserError
from scripts.common.lineage import ancestors, check_split
from scripts.common.schema import Data
from tests.support.manifests import complete_manifest, finish_folder

DATA = Data(split_seed=3, validation_ratio=0.2)


def finished(folder: Path, split: tuple[int, float], stage: str = "sft", parent: Path | None = None) -> Manifest:
    """Finish a folder whose files no other one has."""
    folder.mkdir()
    (folder / "weights").write_text(folder.name)
    made_from = parent and read_manifest(parent).as_parent(parent)
    return finish_folder(folder, stage, split={"seed": split[0], "ratio": split[1]}, parent=made_from)


@pytest.mark.parametrize("split", [(3, 0.2), (3, 0.5), (3, 1.0)])
def test_what_held_out_as_much_or_more_is_taken(tmp_path: Path, split: tuple[int, float]) -> None:
    """A lower ratio takes a part of the prompts that a higher one takes."""
    check_split("a", finished(tmp_path / "a", split), DATA)


@pytest.mark.parametrize("split", [(0, 0.2), (3, 0.1), (4, 1.0), (3, 0.0)])
def test_what_may_have_seen_a_held_out_prompt_is_refused_with_both_splits_and_what_to_do(
    tmp_path: Path, split: tuple[int, float]
) -> None:
    with pytest.raises(UserError) as refused:
        check_split("a", finished(tmp_path / "a", split), DATA, "dpo.init_from")

    assert str(refused.value) == (
        f"dpo.init_from: a: was trained with the split of seed {split[0]} and ratio {split[1]}, but the configuration "
        "holds out by seed 3 and ratio 0.2, so it may have seen these prompts. "
        f"Set data.split_seed: {split[0]} and data.validation_ratio: {split[1]}, or train it again."
    )


def test_nothing_held_out_was_seen_by_nobody(tmp_path: Path) -> None:
    check_split("a", finished(tmp_path / "a", (8, 0.1)), Data(validation_ratio=0))


def test_what_an_adapter_continues_is_checked_too(tmp_path: Path) -> None:
    finished(tmp_path / "first", (4, 0.2))
    finished(tmp_path / "second", (3, 0.2), "dpo", tmp_path / "first")
    third = finished(tmp_path / "third", (3, 0.2), "dpo", tmp_path / "second")

    assert [folder.name for folder, _ in ancestors(third)] == ["second", "first"]
    with pytest.raises(UserError, match=r"third: continues .*/first, which was trained with the split of seed 4"):
        check_split(tmp_path / "third", third, DATA)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_an_ancestor_that_lies_there_no_more_is_not_mistaken_for_another(tmp_path: Path, how: str) -> None:
    finished(tmp_path / "first", (4, 0.2))
    second = finished(tmp_path / "second", (3, 0.2), "dpo", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    if how == "replaced":
        finished(tmp_path / "first", (3, 0.2))
        (tmp_path / "first/weights").write_text("of another training")
        finish_folder(tmp_path / "first", split={"seed": 3, "ratio": 0.2})

    assert list(ancestors(second)) == []
    check_split("second", second, DATA)


def test_an_artifact_that_names_itself_has_an_end(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    made = finished(folder, (3, 0.2))
    again = finish_folder(folder, split={"seed": 3, "ratio": 0.2}, parent=made.as_parent(folder))

    assert len(list(ancestors(again))) == 1
    assert list(ancestors(complete_manifest())) == []
