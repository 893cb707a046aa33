"""Keep what a reference model says about pairs: runs that differ only in how they train, or resume, need not ask again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.common.artifacts import git_state, package_versions, sha256_json, write_text_durably
from scripts.common.distributed import broadcast_from_rank_0, is_main_process

log = logging.getLogger(__name__)

LOGPS_FOLDER = ".reference_logps"  # beside the adapter
# TRL's arguments that change what a model says of a pair: its formula, or how it computes.
LOGPS_ARGUMENTS = ("ld_alpha", "tf32", "torch_compile", "use_liger_kernel", "liger_kernel_config")
Logps = list[tuple[float, float]]  # of the chosen and of the rejected answer of each pair


@dataclass(frozen=True)
class KeptLogps:
    """A folder of files named after all that their numbers depend on, `basis` being what adapter and pairs do not tell."""

    folder: Path
    basis: dict[str, Any]
    unproven: dict[Path, Logps] = field(default_factory=dict)

    def of(self, adapter: dict[str, Any], pairs: list[list[list[int]]], ask: Callable[[], Logps]) -> Logps:
        """Return the numbers for pairs of token ids, asking the reference only where they are not kept.

        `adapter` is the reference's, by name; empty where the bare base is the reference.
        """
        weights = {
            name: [list(value.shape), hashlib.sha256(value.numpy()).hexdigest()] for name, value in adapter.items()
        }
        made_by = [package_versions(), git_state().commit]
        file = self.folder / f"{sha256_json([self.basis, made_by, weights, pairs])}.json"
        kept = broadcast_from_rank_0(lambda: _read(file, len(pairs)))
        if kept is not None:
            log.info("reference: what it says about %d pairs is taken from %s", len(pairs), file)
            return kept
        self.unproven[file] = ask()
        return self.unproven[file]

    def keep(self) -> None:
        """Write what the reference was asked, for other runs; call it once the numbers are proven."""
        for file, logps in self.unproven.items():
            if is_main_process() and all(math.isfinite(value) for pair in logps for value in pair):
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_text_durably(file, json.dumps(logps))
                except OSError as error:
                    log.warning("reference: its numbers cannot be kept for another run (%s)", error)
        self.unproven.clear()


def _read(file: Path, count: int) -> Logps | None:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        logps = [(float(chosen), float(rejected)) for chosen, rejected in rows]
    except (OSError, ValueError, TypeError):  # none, or not as it was written: the reference knows
        return None
    return logps if len(logps) == count else None
