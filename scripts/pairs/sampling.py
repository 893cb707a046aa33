"""Draw several answers to each prompt, batch by batch: a killed run continues at the first batch that is missing."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.common.artifacts import Manifest, sha256_json
from scripts.common.machine import Machine, apply_machine
from scripts.common.schema import Config
from scripts.dataset.chat_format import ChatFormat
from scripts.dataset.records import with_system_prompt
from scripts.dataset.rendering import render_prompt
from scripts.model.adapter import load_adapter
from scripts.model.base import load_base
from scripts.model.generation import Sampling, sample_answers
from scripts.pairs.prompts import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """An answer of the model, and whether it came to an end by itself."""

    text: str
    ended: bool


class SamplesFile:
    """The batches of one plan that are done, one a line; each is on the disk before the next begins."""

    def __init__(self, run_dir: Path, plan: dict[str, Any]) -> None:
        """Open the file of this plan. Another plan has another file, so what was sampled before stays.

        What the same plan has sampled for another file of pairs in this folder is taken over: only labels differ.
        """
        self.path = run_dir / f"samples-{sha256_json(plan)[:16]}.jsonl"
        others = [] if self.path.exists() else list(run_dir.parent.glob(f"*.run/{self.path.name}"))
        if others:
            shutil.copyfile(max(others, key=lambda path: path.stat().st_size), self.path)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # killed while it wrote
            os.truncate(self.path, len(whole))
        self.batches = [
            [[Sample(**sample) for sample in samples] for samples in json.loads(line)]
            for line in whole.splitlines()
        ]  # fmt: skip

    def add(self, batch: list[list[Sample]]) -> None:
        """Append the samples of a batch of prompts."""
        line = json.dumps([[asdict(sample) for sample in samples] for samples in batch], ensure_ascii=True)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.batches.append(batch)


def plan_of(config: Config, machine: Machine, adapter: Manifest, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return everything that decides what is sampled, and in which batches."""
    settings = config.pairs
    return {
        "adapter": adapter.sha256,
        "base_model": adapter.base_model.fingerprint,
        "prompts": sha256_json([[prompt.messages, prompt.seed] for prompt in prompts]),
        "sampling": [settings.samples_per_prompt, settings.temperature, settings.max_new_tokens, settings.batch_size],
        "machine": [machine.device, str(machine.dtype), machine.threads],
        "quantization": config.quantization.model_dump(),
        "fast_path": config.performance.fast_path,
    }


def sample_prompts(
    config: Config, machine: Machine, base_folder: Path, adapter: str, chat: ChatFormat, prompts: Sequence[Prompt], file: SamplesFile
) -> list[list[Sample]]:  # fmt: skip
    """Return `pairs.samples_per_prompt` answers to each prompt, those of the file and the missing ones.

    A batch is sampled by itself, so that on one machine it comes out the same in whichever run it does.
    """
    settings = config.pairs
    batches = [prompts[at : at + settings.batch_size] for at in range(0, len(prompts), settings.batch_size)]
    done = len(file.batches)
    if done == len(batches):
        log.info("all %d prompts are sampled already: %s", len(prompts), file.path)
        return [samples for batch in file.batches for samples in batch]
    if done:
        log.info("%d of %d batches are sampled already; continuing", done, len(batches))
    apply_machine(machine)
    model = load_adapter(load_base(base_folder, config, machine), adapter)
    if config.performance.fast_path:
        from scripts.speed.speed_up import speed_up

        speed_up(model)
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, n=settings.samples_per_prompt
    )
    total, before = len(prompts) * sampling.n, done * settings.batch_size * sampling.n
    with tqdm(total=total, initial=before, unit="answer", dynamic_ncols=True) as bar:
        for batch in batches[done:]:
            asked = [with_system_prompt(prompt.messages, chat.system_prompt) for prompt in batch]
            answers = sample_answers(
                model,
                chat.tokenizer,
                [render_prompt(chat, messages) for messages in asked],
                sampling,
                [prompt.seed for prompt in batch],
                settings.batch_size,
                bar.update,
            )
            file.add([[Sample(answer.text, answer.ended) for answer in of_prompt] for of_prompt in answers])
    return [samples for batch in file.batches for samples in batch]
