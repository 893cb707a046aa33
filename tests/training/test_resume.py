"""A run resumes from its newest whole checkpoint, and only as the run it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.artifacts import DatasetFacts
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora, Performance, Sft
from scripts.training.resume import find_resumption, identity_of, last_whole_checkpoint, write_state
from scripts.training.start import Start
from tests.support.training import run_of

CPU = Machine("cpu", torch.float32, 1, 1, ())


def identity(config: Config, machine: Machine = CPU, sha256: str = "d" * 64) -> dict[str, Any]:
    """Return the identity of a run that starts from a made-up base."""
    data = [DatasetFacts(path="data.jsonl", sha256=sha256, train=1, validation=0)]
    run = run_of("sft", LoadedConfig(config, {}), Path("unused"))
    return identity_of(run, machine, Start(Path("base"), None, "f" * 64), data)


def refusal(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Write the state of one run and return why another one may not resume it."""
    write_state(folder, before, None, None)
    with pytest.raises(UserError) as caught:
        find_resumption(folder, now, resume=True)
    return str(caught.value).partition("interrupted (")[2].rpartition("). Restore")[0]


def test_changed_settings_are_named_with_both_values(tmp_path: Path) -> None:
    before = Config(sft=Sft(trainer={"max_steps": 4, "optim": "adafactor"}))
    now = Config(lora=Lora(r=4, init="pissa"), sft=Sft(trainer={"max_steps": 6}))

    assert refusal(tmp_path, identity(before), identity(now)) == (
        "lora.r: was 16, is 4; lora.init: was default, is pissa; sft.trainer.max_steps: was 4, is 6; "
        "sft.trainer.optim: was adafactor, is null"
    )


def test_auto_is_what_the_machine_made_of_it(tmp_path: Path) -> None:
    gpu = Machine("cuda", torch.bfloat16, 1, 1, ())
    before = identity(Config())

    assert refusal(tmp_path, before, identity(Config(), gpu)) == (
        "performance.device: was cpu, is cuda; performance.dtype: was fp32, is bf16"
    )
    find_resumption(tmp_path, identity(Config(performance=Performance(dtype="fp32", device="cpu"))), resume=True)
    find_resumption(tmp_path, identity(Config(performance=Performance(threads=3, compile=False))), resume=True)


def test_state_of_an_earlier_version_is_resumed_and_still_compared(tmp_path: Path) -> None:
    """It knows neither the settings in words nor what performance was."""
    known = {"config", "data", "base", "parent"}
    before = {part: value for part, value in identity(Config()).items() if part in known}
    other = Config(performance=Performance(group_by_length=False))
    write_state(tmp_path, before, "run", 1.5)

    assert find_resumption(tmp_path, identity(other), resume=True).mlflow_run_id == "run"

    assert refusal(tmp_path, before, identity(Config(lora=Lora(r=4)))).startswith("config: was ")
    assert refusal(tmp_path, before, identity(Config(), sha256="e" * 64)).startswith("data: was ")
    assert json.loads((tmp_path / "state.json").read_text())["identity"] == before


@pytest.mark.parametrize("written", [None, '{"global_st'])
def test_checkpoint_that_was_cut_off_is_never_resumed_from(tmp_path: Path, written: str | None) -> None:
    for step in (8, 16, 104):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    state = tmp_path / "checkpoint-104/trainer_state.json"
    state.unlink() if written is None else state.write_text(written)

    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")
    assert not (tmp_path / "checkpoint-104").exists()
    assert last_whole_checkpoint(tmp_path / "nothing") is None
