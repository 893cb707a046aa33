"""No installed package lies in the range of a listed advisory, unless the list says why that does not concern us."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

LIST = yaml.safe_load(Path(__file__).with_name("advisories.yaml").read_text(encoding="utf-8"))
KEYS = {"package", "affected", "id", "about"}


def is_affected(entry: dict, installed: str) -> bool:
    """Tell whether a version lies in an advisory's range."""
    return SpecifierSet(entry["affected"], prereleases=True).contains(installed)


def test_versions_are_compared_as_pip_does() -> None:
    entry = {"affected": ">=4.9.0,<5.0.0rc3"}
    assert [v for v in ("4.8", "4.9", "4.56.1", "5.0.0rc2", "5.0.0rc3", "5.0", "10.0") if is_affected(entry, v)] == [
        "4.9", "4.56.1", "5.0.0rc2",
    ]  # fmt: skip
    assert is_affected({"affected": "<2.6.0"}, "2.5.1+cpu")


def test_the_list_says_when_it_was_made() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(LIST["checked"]))


@pytest.mark.parametrize("entry", LIST["advisories"], ids=lambda entry: f"{entry['package']} {entry['id']}")
def test_installed_package_is_not_affected(entry: dict) -> None:
    assert entry.keys() >= KEYS
    assert entry.keys() <= KEYS | {"accepted"}
    assert re.fullmatch(r"CVE-\d{4}-\d{4,}", entry["id"])
    installed = version(entry["package"])

    assert "accepted" in entry or not is_affected(entry, installed), (
        f"{entry['package']} {installed}: {entry['id']}: {entry['about']}"
    )
