"""The recognizers, loaded once for all tests of the room."""

from __future__ import annotations

import pytest

from scripts.common.schema import Deid

KEY = b"k" * 32


@pytest.fixture(scope="session")
def detector():
    """Load the default profile once; Rampart is left out, so that results do not depend on what is installed."""
    from scripts.deid.recognizers import load_detector

    return load_detector(Deid(rampart="off"))


@pytest.fixture
def scrub(detector):
    """Return a function that scrubs rows with any operator."""
    from scripts.deid.replacement import Replacer
    from scripts.deid.scrubbing import scrub_chunk

    def run(*rows, **settings):
        replacer = Replacer(Deid(**settings), seed=0, key=KEY)
        return scrub_chunk([(n, f"f:{n}", row) for n, row in enumerate(rows, 1)], detector, replacer)

    return run
