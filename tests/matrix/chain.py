"""One family's way through all stages: its tiny base, data of very different lengths, and what each stage left."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import TrainerCallback

from scripts import train_sft
from scripts.model.base import load_tokenizer
from scripts.training import session
from scripts.training.callbacks import training_callbacks
from tests.conftest import write_jsonl
from tests.support.architectures import save_family
from tests.support.chain import write_chain
from tests.support.serving import save_adapter
from tests.support.training import build_trainer

WORDS = ("red", "blue", "green", "gold", "grey", "seven", "eight", "nine", "over", "under", "before", "after")
STEPS = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
NEW_TOKENS = 12
CONTEXT = 128  # of the server; beyond every window
ADAPTERS = {
    "first": {"r": 4, "alpha": 8},
    "second": {"r": 7, "alpha": 3},
    "third": {"r": 2, "alpha": 8},
}


def text(draw: random.Random) -> str:
    """Write some words: rows of a batch must pad each other, and the long ones reach beyond every window."""
    return " ".join(draw.choices(WORDS, k=draw.choice((1, 4, 14, 24))))


def write_data(folder: Path) -> None:
    """Write records and pairs of very different lengths."""
    draw = random.Random(0)
    sft = [{"instruction": f"say {n} {text(draw)}", "output": text(draw)} for n in range(16)]
    dpo = [{"prompt": f"tell {n} {text(draw)}", "chosen": text(draw), "rejected": text(draw)} for n in range(16)]
    write_jsonl(folder / "sft.jsonl", sft)
    write_jsonl(folder / "dpo.jsonl", dpo)


class StopAfter(TrainerCallback):
    """Send this process the signal that asks it to stop, at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Family:
    """A family's base and what each stage made of it; each is made once, when a cell first asks for it."""

    def __init__(self, name: str, folder: Path, empty_store: Path) -> None:
        self.name, self.folder = name, folder
        self.base = save_family(folder / "model", name)
        shutil.copy(empty_store, folder / "mlflow.db")
        self.config = write_chain(
            folder,
            lora={"r": 4, "alpha": 8},
            data={"validation_ratio": 0.4, "test_ratio": 0.1},
            sft={"learning_rate": 5e-2, "trainer": STEPS},
            dpo={"init_from": str(folder / "first"), "beta": 0.3, "trainer": STEPS},
            eval={"max_new_tokens": NEW_TOKENS},
            export={"output_dir": str(folder / "out/merged")},
            serve={
                "adapter_path": None,
                "adapters": {name: str(folder / name) for name in ADAPTERS},
                "max_context_tokens": CONTEXT,
                "max_concurrent": 3,
            },
        )
        write_data(folder)
        self.sft_folder = folder / "out/sft_adapter"

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cached_property
    def stops(self) -> set[int]:
        return {self.tokenizer.eos_token_id}

    @cached_property
    def adapters(self) -> dict[str, Path]:
        """Save three adapters of different rank and scale whose weights are random."""
        return {
            name: save_adapter(self.folder / name, self.base, seed=seed, scale=0.4, **lora)
            for seed, (name, lora) in enumerate(ADAPTERS.items(), 1)
        }

    @cached_property
    def sft_trainer(self) -> Any:
        """Build SFT's trainer as its script does."""
        return build_trainer("sft", self.config, self.folder / "built_sft")

    @cached_property
    def dpo_trainer(self) -> Any:
        """Build DPO's trainer as its script does; it starts from the first adapter."""
        assert self.adapters
        return build_trainer("dpo", self.config, self.folder / "built_dpo")

    @cached_property
    def trained(self) -> Path:
        """Train SFT to its end without a break; return the adapter's folder."""
        self.run(train_sft)
        return self.sft_folder

    def run(self, command: ModuleType, *arguments: str) -> None:
        """Run a command in this process; a user's error comes as it is raised, not as its exit code."""
        assert command.main.__wrapped__(["--config", str(self.config), *arguments]) == 0


@contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Stop the training within at the end of a step, by the signal that a user's Ctrl-C or a scheduler sends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "training_callbacks", lambda *given: [*training_callbacks(*given), StopAfter(step)])
        yield
