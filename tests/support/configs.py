"""Configurations that are refused, and the message."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.config import load_config
from scripts.common.errors import UserError

HEADING = "the configuration is not valid\n  "


def refusal(path: Path, *overrides: str) -> str:
    """Return the message that the user sees."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)
