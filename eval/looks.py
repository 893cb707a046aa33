"""How often the same test side was looked at: each look at it makes a lucky difference likelier."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.held_out import HeldOut
from scripts.common.artifacts import SplitFacts, private, sha256_json
from scripts.common.errors import UserError
from scripts.common.schema import Data


class Looks:
    """The reports that were made, a line each, in a file beside their folder, which a new report replaces."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir.with_name(output_dir.name + ".looks.jsonl")
        self.lines: list[Mapping[str, Any]] = []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self.lines.append({"split": str(entry["split"]), "data": [str(digest) for digest in entry["data"]]})
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{self.path}:{number}: not a line of this project, which counts here how often a test side was looked "
                    "at. Remove the line."
                ) from None

    def count(self, side: Mapping[str, Any]) -> int:
        """Return how many reports were made of a side or of a part of it, the one in the making included."""
        same_split = [line for line in self.lines if line["split"] == side["split"]]
        return 1 + len([line for line in same_split if {*line["data"]} & {*side["data"]}])

    def add(self, side: Mapping[str, Any], models: Sequence[str]) -> None:
        """Write down a report on these models, by their hashes."""
        line = {"created": datetime.now(UTC).isoformat(timespec="seconds"), **side, "models": list(models)}
        with open(self.path, "a", encoding="utf-8", newline="\n", opener=private) as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def side_of(held_out: HeldOut, data: Data) -> dict[str, Any]:
    """Identify a test side: what splits the records, and the hashes of the files that hold them."""
    digests = {digest for files in held_out.files.values() for digest in files.values()}
    return {"split": sha256_json(SplitFacts.of(data).model_dump()), "data": sorted(digests)}
