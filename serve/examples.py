"""Example prompts for the playground: prompts of the data that no stage trained on."""

from __future__ import annotations

import logging
from pathlib import Path

from scripts.common.errors import UserError
from scripts.common.paths import resolve
from scripts.common.schema import Config
from scripts.common.stages import TRAINING_STAGES
from scripts.dataset.records import PARSERS, load_datasets, sources_of
from scripts.dataset.split import side_of

log = logging.getLogger(__name__)

MOST = 6
LONGEST = 1500  # characters; longer ones say little at a glance
LARGEST_FILE = 16 * 2**20  # reading a larger one would delay the first answers


def held_out_prompts(config: Config) -> list[str]:
    """Return a few short single-turn prompts of the test side, or none where the data cannot be read."""
    stage = TRAINING_STAGES["sft"]
    path, data = config.sft.dataset_path, config.data.model_copy(update={"on_bad_row": "skip"})
    try:
        sizes = [_size(resolve(source.path)) for source in sources_of(path)]
        if not sizes or max(sizes) > LARGEST_FILE:
            return []
        files = load_datasets(path, PARSERS[stage.records], data, "sft.dataset_path")
    except (UserError, OSError, UnicodeError) as error:
        log.info("the playground has no example prompts: %s", error)
        return []
    held_out = (record.prompt for file in files for record in file.records if side_of(record, data) == "test")
    asked = (prompt[-1]["content"] for prompt in held_out if sum(turn["role"] != "system" for turn in prompt) == 1)
    return list(dict.fromkeys(text for text in asked if len(text) <= LONGEST))[:MOST]


def _size(path: Path) -> int:
    return path.stat().st_size
