"""The training systems that are compared: the same task as each one's command line, and how a run of it is watched."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from scripts.common.errors import UserError
from scripts.common.machine import available_cores, bf16_support
from scripts.common.paths import ROOT
from scripts.common.schema import Data, Lora
from scripts.common.stages import ADAPTER_STAGES, TRAINING_STAGES
from scripts.dataset.records import PARSERS, load_datasets

BATCH = {"sft": 8, "dpo": 4}
EPOCHS = {"sft": 1, "dpo": 2}
LEARNING_RATE = {"sft": 2e-4, "dpo": 5e-5}
# Least work per weight and token: forward and the gradient of the activations; DPO also asks the reference once per pair.
FLOP = {"sft": 4.0, "dpo": 4.0 + 2.0 / EPOCHS["dpo"]}
BETA = 0.1
LORA = Lora()
POLL_SECONDS = 0.1
WARM_UP = 0.25  # of a run: what is not counted as speed
# The bar of transformers' Trainer and of this project; bars with a description before them count something else.
STEP = re.compile(r"[\r\n]\s*\d+%\|[^|\r\n]*\|\s*(\d+)/(\d+) \[")
# The reference is asked before training: by this project always, by TRL where a flag says so.
REFERENCE = re.compile(r"[\r\n](?:reference,|Computing reference log probs) [^\r\n|]*?(\d+)%\|")


@dataclass(frozen=True)
class Task:
    """One training run, the same for every system. `data` is a JSONL file; the adapter goes into `output`."""

    stage: str
    model: Path
    data: Path
    output: Path
    batch: int
    epochs: int
    max_length: int
    learning_rate: float
    seed: int = 0
    save_steps: int | None = None


@dataclass(frozen=True)
class System:
    """A way to train, as the command a user would type."""

    name: str
    command: Callable[[Task], list[str]]
    stages: tuple[str, ...] = ADAPTER_STAGES
    order: Callable[[str, list[Row], int], list[int]] | None = None  # of records, where it is known and not random
    own_folder: bool = True  # whether it starts in a folder of its own; a user's command starts where the user is

    @property
    def folder(self) -> str:
        """Return the name of the folder its runs write to."""
        return re.sub(r"\W+", "-", self.name)


def our_command(task: Task, **settings: object) -> list[str]:
    """Return this project's command; `settings` go to the stage's section."""
    section: dict[str, object] = {
        "dataset_path": task.data, "output_dir": task.output, "num_train_epochs": task.epochs,
        "per_device_train_batch_size": task.batch, "max_length": task.max_length, "learning_rate": task.learning_rate,
        "trainer.lr_scheduler_type": "constant", "trainer.warmup_steps": 0,
    }  # fmt: skip
    if task.save_steps:
        section["trainer.save_steps"] = task.save_steps
    if task.stage == "dpo":  # as `trl dpo` does it: a fresh adapter, the bare base as reference
        section |= {"init_from": "null", "reference": "base", "beta": BETA}
    values = {f"{task.stage}.{key}": value for key, value in (section | settings).items()}
    values |= {"base_model_id": task.model, "seed": task.seed, "offline": "true"}
    values |= {"data.validation_ratio": 0, "data.test_ratio": 0}  # every record is trained on, as with the others
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, str(ROOT / f"scripts/train_{task.stage}.py"), "--config", str(ROOT / "configs/config.yaml"), *words]  # fmt: skip


def our_long_command(task: Task) -> list[str]:
    """Return this project's command as it chooses itself for runs of a common length; those timed here are shorter."""
    import torch

    return [*our_command(task), "--set", f"performance.compile={'auto' if torch.cuda.is_available() else 'true'}"]


def our_order(stage: str, rows: list[Row], seed: int) -> list[int]:
    """Return the order in which this project takes records: the first batch of each epoch is the longest."""
    from scripts.training.batching import SimilarLengthSampler

    sampler = SimilarLengthSampler([row.length for row in rows], BATCH[stage], seed)
    order = []
    for epoch in range(EPOCHS[stage]):
        sampler.set_epoch(epoch)
        order += list(sampler)
    return order


def trl_command(task: Task, *flags: str) -> list[str]:
    """Return TRL's own command line for the task; what decides speed is left at its defaults unless `flags` say more."""
    program = shutil.which("trl", path=str(Path(sys.executable).parent))
    if program is None:
        raise UserError(
            "trl: its command is not beside this Python. Install requirements.txt, or leave it out with --systems."
        )
    import torch

    words: dict[str, object] = {
        "model_name_or_path": task.model, "dataset_name": task.data.parent, "output_dir": task.output,
        "lora_r": LORA.r, "lora_alpha": LORA.alpha, "lora_dropout": LORA.dropout, "lora_target_modules": "all-linear",
        "per_device_train_batch_size": task.batch, "num_train_epochs": task.epochs, "max_length": task.max_length,
        "learning_rate": task.learning_rate, "lr_scheduler_type": "constant", "warmup_steps": 0, "report_to": "none", "seed": task.seed,
    }  # fmt: skip
    if task.save_steps:
        words["save_steps"] = task.save_steps
    if task.stage == "dpo":
        words["beta"] = BETA
    given = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return [program, task.stage, *given, "--use_peft", *([] if torch.cuda.is_available() else ["--use_cpu"]), *flags]


def trl_best_command(task: Task) -> list[str]:
    """Return TRL's command line with every flag that makes it faster on this CPU. Packing halved its speed on one."""
    dtype = "bfloat16" if bf16_support("cpu")[0] else "float32"
    once = ["--precompute_ref_log_probs"] if task.stage == "dpo" else []  # instead of once per epoch
    return trl_command(task, "--dtype", dtype, "--bf16", "false", "--gradient_checkpointing", "false", *once)


SYSTEMS = {
    "ours": System("this project", our_long_command, order=our_order),
    "trl": System("trl, defaults", trl_command),
    "trl-best": System("trl, best flags", trl_best_command),
}


def system_of_user(given: str) -> System:
    """Read `name=command`; {stage}, {model}, {data}, {output}, {batch}, {epochs}, … in it stand for the task's values."""
    name, equals, text = given.partition("=")
    if not equals or not name.strip() or "{data}" not in text:
        raise UserError(
            f"--against {given}: wanted NAME=COMMAND with {{data}} in the command, where the records' file goes; "
            f"also known: {', '.join('{' + key + '}' for key in Task.__dataclass_fields__)}."
        )

    def command(task: Task) -> list[str]:
        words = shlex.split(text)
        for key, value in vars(task).items():
            words = [word.replace("{" + key + "}", str(value)) for word in words]
        return words

    return System(name.strip(), command, own_folder=False)


@dataclass(frozen=True)
class Row:
    """A record in the form every system reads, with its token ids and how many tokens a system must work through.

    `length` is that of the row this project makes of it.
    """

    fields: dict[str, Any]
    rendered: Any
    tokens: int
    length: int


def read_rows(stage: str, path: str, tokenizer: Any, max_length: int) -> list[Row]:
    """Read records or pairs and keep those that fit whole, in a fixed random order."""
    from scripts.dataset.chat_format import ChatFormat
    from scripts.dataset.rendering import render_pair, render_record

    rows = []
    data = Data(on_bad_row="skip", train_on="last")
    files = load_datasets(path, PARSERS[TRAINING_STAGES[stage].records], data, f"--{stage}-data")
    for record in files[0].records:
        answers = (
            {"completion": record.answer} if stage == "sft" else {"chosen": record.chosen, "rejected": record.rejected}
        )
        fields = {"prompt": list(record.prompt)} | {
            key: [{"role": "assistant", "content": text}] for key, text in answers.items()
        }
        if stage == "sft":
            rendered: Any = render_record(ChatFormat(tokenizer), record)[0]
            tokens = length = len(rendered.input_ids)
        else:
            rendered = render_pair(ChatFormat(tokenizer), record)
            length = len(rendered.prompt_ids) + rendered.trained_tokens
            tokens = length + len(rendered.prompt_ids)
        if len(rendered.input_ids) <= max_length:
            rows.append(Row(fields, rendered, tokens, length))
    random.Random(0).shuffle(rows)
    return rows


def write_rows(rows: Sequence[Row], folder: Path) -> Path:
    """Write records as the one file of a folder, which is what TRL reads as a dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row.fields, ensure_ascii=False) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "train.jsonl"


def environment(work: Path, compiled: Path) -> dict[str, str]:
    """Return what every system runs with: all cores (accelerate alone would take one), no network, caches of its own.

    What a run compiles goes into a fresh folder, so that each run of a system pays alike for it.
    """
    return {
        **os.environ, "OMP_NUM_THREADS": str(available_cores()), "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(compiled), "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip


def note(moments: list[tuple[float, float]], seconds: float, share: float) -> None:
    """Add a moment if a bar has moved."""
    if not moments or share > moments[-1][1]:
        moments.append((seconds, share))


class Running:
    """A started command with its own clock, its progress, and the most memory its processes have held together.

    `steps` are the moments at which its bar was seen to move, as (seconds, share of all steps), and `reference` those of
    its reference pass.
    """

    def __init__(self, system: System, task: Task, work: Path, command: Sequence[str] | None = None) -> None:
        self.system, self.task, self.log = system, task, task.output.with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.peak_bytes, self.alive, self.steps = 0, True, list[tuple[float, float]]()
        self.reference: list[tuple[float, float]] = []
        words = list(command or system.command(task))
        with self.log.open("w", encoding="utf-8") as output:
            self.stopped, self.stopped_at = 0.0, 0.0
            self.begin = time.monotonic()
            try:
                self.process = psutil.Popen(
                    words, stdout=output, stderr=subprocess.STDOUT, env=environment(work, self.log.with_suffix(".compiled")),
                    cwd=self.log.parent if system.own_folder else None,
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"{system.name}: cannot start {words[0]}: {error.strerror}.") from None

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.tree():
            with suppress(psutil.Error):
                each.kill()
        self.process.wait()

    def tree(self) -> list[psutil.Process]:
        """Return the process and all that it started."""
        with suppress(psutil.Error):
            return [self.process, *self.process.children(recursive=True)]
        return []

    @property
    def seconds(self) -> float:
        """Return the time since the start, without that in which it was suspended."""
        return (self.stopped_at or time.monotonic()) - self.begin - self.stopped

    @property
    def progress(self) -> float:
        """Return the share of its steps that it has done."""
        return self.steps[-1][1] if self.steps else 0.0

    def is_running(self) -> bool:
        """Wait a moment, look at memory and progress, and return whether the command still runs.

        Raises: UserError with the end of its output when it failed.
        """
        with suppress(psutil.TimeoutExpired):
            code = self.process.wait(POLL_SECONDS)
            self.alive = False
            self._look_at_the_log()
            if code:
                end = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise UserError(f"{self.system.name} ended with exit code {code}; {self.log} ends with\n{end}")
            return False
        own, shared = 0, [0]
        for each in self.tree():
            with suppress(psutil.Error):
                memory = each.memory_info()
                common = getattr(memory, "shared", 0)  # libraries that several of its processes use count once
                own += memory.rss - common
                shared.append(common)
        self.peak_bytes = max(self.peak_bytes, own + max(shared))
        self._look_at_the_log()
        return True

    def _look_at_the_log(self) -> None:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if found := REFERENCE.findall(text):
            note(self.reference, self.seconds, int(found[-1]) / 100)
        if found := STEP.findall(text):
            note(self.steps, self.seconds, int(found[-1][0]) / int(found[-1][1]))

    def suspend(self) -> None:
        """Stop the processes and their clock."""
        for each in self.tree():
            with suppress(psutil.Error):
                each.suspend()
        self.stopped_at = time.monotonic()

    def resume(self) -> None:
        """Let a suspended command continue."""
        self.stopped += time.monotonic() - self.stopped_at
        self.stopped_at = 0.0
        for each in self.tree():
            with suppress(psutil.Error):
                each.resume()


def side_by_side(systems: Sequence[System], tasks: Sequence[Task], work: Path) -> list[Running]:
    """Run all systems, one at a time: each up to its first steps, then always the one that is behind, for a step.

    So a machine whose speed drifts slows all of them alike. Their memory must fit together.
    """
    with ExitStack() as stack:
        runs = []
        for system, task in zip(systems, tasks, strict=True):
            run = stack.enter_context(Running(system, task, work))
            while run.is_running() and run.progress < WARM_UP:
                pass
            run.suspend()
            runs.append(run)
        while waiting := [run for run in runs if run.alive]:
            behind = min(waiting, key=lambda run: run.progress)
            behind.resume()
            before = behind.progress
            while behind.is_running() and behind.progress == before:
                pass
            behind.suspend()
        return runs


def run_to_the_end(system: System, task: Task, work: Path, command: Sequence[str] | None = None) -> tuple[float, float]:
    """Run a command; return its wall-clock seconds and the peak memory of its processes in GiB."""
    with Running(system, task, work, command) as running:
        while running.is_running():
            pass
        return running.seconds, running.peak_bytes / 2**30
