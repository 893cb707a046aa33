"""The stages under drill: how each is run, what it leaves, and a folder in which every one has finished once."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from scripts.common.artifacts import MANIFEST, read_manifest, repair_interrupted_publish, sha256_file
from tests.conftest import write_jsonl
from tests.drills.faults import Done, Fault, Running, start
from tests.support.chain import write_chain

CONFIG = ("--config", "config.yaml")
STEPS = {"max_steps": 4, "save_total_limit": 2}


@dataclass(frozen=True)
class Stage:
    """A script, the calls that make its earlier and its new result, and the file that tells them apart."""

    name: str
    module: str
    earlier: tuple[str, ...]
    new: tuple[str, ...]
    result: str
    resumes: bool = False
    tracked: bool = True
    environment: dict[str, str] = field(default_factory=dict)


SFT = Stage(
    "SFT", "scripts.train_sft", CONFIG, (*CONFIG, "--set", "sft.learning_rate=1e-3"),
    "out/sft_adapter/adapter_model.safetensors", resumes=True,
)  # fmt: skip
DPO = Stage(
    "DPO", "scripts.train_dpo", CONFIG, (*CONFIG, "--set", "dpo.learning_rate=1e-3"),
    "out/dpo_adapter/adapter_model.safetensors", resumes=True,
)  # fmt: skip
COMPARE = Stage(
    "comparison", "eval.compare", CONFIG, (*CONFIG, "--set", "eval.max_new_tokens=4"), "out/comparison/samples.jsonl"
)
EXPORT = Stage(
    "export", "scripts.export_lora", (*CONFIG, "--out_dir", "out/merged"),
    (*CONFIG, "--out_dir", "out/merged", "--adapter", "out/sft_adapter"), "out/merged/model.safetensors",
)  # fmt: skip
SCRUB = (*CONFIG, "--in", "personal.jsonl", "--out", "out/scrubbed.jsonl", "--profile", "secrets-only")
DEID = Stage(
    "de-identification", "scripts.deid_presidio", SCRUB, (*SCRUB, "--operator", "redact", "--overwrite"),
    "out/scrubbed.jsonl", tracked=False,
)  # fmt: skip
# In this order they can be run one after the other.
STAGES = (SFT, DPO, COMPARE, EXPORT, DEID)
DEMO_MODEL = Stage(
    "demo model", "scripts.get_demo_model", (), ("--out", "out/demo"), "out/demo/model.safetensors", tracked=False
)


@dataclass
class Workplace:
    """A working folder that can be put back to where every stage has finished once."""

    folder: Path
    template: Path
    log: Path
    # By stage: the events and changes of a whole run, and the hash of the new result.
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)

    def reset(self) -> None:
        """Put everything back."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.template, self.folder, dirs_exist_ok=True)

    def start(self, stage: Stage, arguments: Sequence[str] | None = None, fault: Fault | None = None) -> Running:
        """Start a stage; without arguments, towards its new result."""
        arguments = stage.new if arguments is None else arguments
        return start(stage.module, arguments, self.folder, self.log, fault, **stage.environment)

    def run(self, stage: Stage, arguments: Sequence[str] | None = None, fault: Fault | None = None) -> Done:
        """Run a stage to its end."""
        return self.start(stage, arguments, fault).result()

    def measure(self, stage: Stage) -> None:
        """Make the new result undisturbed, once: every later run must make the same."""
        if stage.name not in self.new:
            self.reset()
            done = self.run(stage)
            assert done.code == 0, done.said
            self.counts[stage.name] = done.events, done.changes
            self.new[stage.name] = sha256_file(self.folder / stage.result)

    def before(self, stage: Stage) -> str | None:
        """Return the hash of the result that stood before the fault."""
        result = self.template / stage.result
        return sha256_file(result) if result.exists() else None

    def standing(self, stage: Stage) -> str | None:
        """Return the hash of the result that stands now, as a reader of it finds it.

        Raises: UserError when it, or any other artifact that calls itself finished, is not whole.
        """
        repair_interrupted_publish((self.folder / stage.result).parent)  # as every reader does
        for path in self.folder.glob(f"out/*/{MANIFEST}"):
            if path.parent.suffix != ".old":  # no reader looks there once the new one stands
                read_manifest(path.parent)
        result = self.folder / stage.result
        return sha256_file(result) if result.exists() else None

    def left_over(self) -> list[str]:
        """Name what an interrupted run left and a finished one must have cleared."""
        found = [path for name in ("*.old", "*.part", "checkpoint-*", "finished") for path in self.folder.rglob(name)]
        return [str(path.relative_to(self.folder)) for path in found if "mlruns" not in path.parts]

    def run_states(self) -> list[str]:
        """Return the states of all MLflow runs, oldest first."""
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as connection:
            return [row[0] for row in connection.execute("SELECT status FROM runs ORDER BY start_time")]


def prepare(folder: Path, template: Path, log: Path, store: Path) -> Workplace:
    """Make the model and the data, run every stage once, and remember what stands there."""
    folder.mkdir()
    write_chain(folder, sft={"trainer": STEPS}, dpo={"trainer": STEPS})
    shutil.copy(store, folder / "mlflow.db")
    rows = [{"text": f"note {n}: password: hunter{n}two and nothing else"} for n in range(400)]
    write_jsonl(folder / "personal.jsonl", rows)
    workplace = Workplace(folder, template, log)
    for stage in STAGES:
        done = workplace.run(stage, stage.earlier)
        assert done.code == 0, done.said
        workplace.counts[stage.name] = done.events, done.changes
    shutil.copytree(folder, template)
    return workplace
