"""Before training: how many steps a run takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import train_dpo, train_sft
from scripts.common.config import LoadedConfig
from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config, Sft
from scripts.training import sft
from scripts.training.plan import blamed_on_trainer_block, evaluations, total_steps
from tests.support.chain import write_chain
from tests.support.exporting import save_adapter
from tests.support.training import build_trainer, run_of


@pytest.mark.parametrize(("limit", "steps"), [(-1, 6), (4, 4)])
def test_steps_are_counted_as_the_trainer_takes_them(limit: int, steps: int) -> None:
    section = Sft(trainer={"max_steps": limit}, num_train_epochs=2, per_device_train_batch_size=4)

    assert total_steps(section, rows=10, world_size=1) == steps


@pytest.mark.parametrize(
    ("steps", "validation", "section", "count"),
    [
        (100, 80, {}, 1),  # 800 records are trained on, so scoring 80 twice takes 8 % of the time
        (300, 80, {}, 3),
        (1000, 80, {}, 4),
        (100, 80, {"early_stopping_patience": 2}, 4),
        (100, 80, {"trainer": {"eval_steps": 10}}, 4),
        (100, 0, {}, 4),
    ],
)
def test_held_out_passes_take_a_small_part_of_a_run(steps: int, validation: int, section: dict, count: int) -> None:
    """Unless a pass at both ends takes more, or the user asks for more."""
    import torch

    machine = Machine("cpu", torch.float32, 1, 1, ())

    assert evaluations(Sft(per_device_train_batch_size=8, **section), machine, steps, validation) == count


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with config, data, a base and an SFT adapter."""
    made = tmp_path_factory.mktemp("plan")
    write_chain(made)
    save_adapter(made / "model", made / "out/sft_adapter")
    return made


# What the libraries say, by the settings they say it of. The second group is found only when the model is at hand.
LATE: list[tuple[dict, str]] = [
    ({"optim": "galore_adamw"}, "You need to install `galore_torch`"),
    ({"optim": "schedule_free_adamw"}, "You need to install `schedulefree`"),
    ({"use_liger_kernel": True}, "liger-kernel >= 0.3.0 is not available"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"powr": 2}}, "unexpected keyword argument 'powr'"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "missing 1 required positional argument: 'num_decay_steps'"),
    ({"lr_scheduler_kwargs": "nofile.json"}, "must be a mapping, not str"),
    ({"dataloader_num_workers": -1}, "num_workers option should be non-negative"),
    ({"dataloader_persistent_workers": True}, "persistent_workers option needs num_workers > 0"),
    ({"dataloader_multiprocessing_context": "x"}, "multiprocessing_context can only be used with"),
    ({"adam_beta1": 2.0}, "Invalid beta parameter at index 0"),
    ({"adam_epsilon": -1}, "Invalid epsilon value: -1"),
    ({"accelerator_config": "nofile.json"}, "No such file or directory: 'nofile.json'"),
]
LATER: list[tuple[dict, str]] = [
    ({"optim": "lomo"}, "You need to install `lomo_optim`"),
    ({"optim": "apollo_adamw", "optim_target_modules": "all-linear"}, "You need to install `apollo_torch`"),
    ({"fsdp": "full_shard"}, "Using fsdp only works in distributed training"),
    ({"torch_compile": True, "torch_compile_backend": "x"}, "is not a valid DynamoBackend"),
    ({"parallelism_config": {"a": 1}}, "'dict' object has no attribute"),
    ({"pad_to_multiple_of": -3}, "must match the existing size"),
]


@pytest.fixture(autouse=True)
def no_traces_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what transformers writes into the environment, and the state that accelerate keeps of it."""
    from accelerate.state import AcceleratorState, GradientState

    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize(("block", "said"), [*LATE, *LATER], ids=[json.dumps(block) for block, _ in [*LATE, *LATER]])
def test_setting_that_a_library_refuses_is_a_message(
    stage: str, block: dict, said: str, folder: Path, tmp_path: Path
) -> None:
    given = {"max_steps": 2, **block}
    with pytest.raises(UserError) as caught:
        build_trainer(stage, folder / "config.yaml", tmp_path, [f"{stage}.trainer={json.dumps(given)}"])

    message = str(caught.value)
    assert message.startswith(f"{stage}.trainer: TRL refuses these settings: ")
    assert said in message
    assert f"\nFound: {', '.join(given)}. Correct or remove them." in message


@pytest.mark.parametrize("main", [train_sft.main, train_dpo.main])
@pytest.mark.parametrize(("block", "said"), LATE, ids=[json.dumps(block) for block, _ in LATE])
def test_dry_run_finds_what_needs_no_model(main: Callable, block: dict, said: str, folder: Path, capsys) -> None:
    stage = "sft" if main is train_sft.main else "dpo"
    setting = f"{stage}.trainer={json.dumps({'max_steps': 2, **block})}"

    assert main(["--config", str(folder / "config.yaml"), "--set", setting, "--dry-run"]) == 2

    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "block",
    [
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0}},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
)
def test_setting_that_fits_is_trained_with(block: dict, folder: Path, tmp_path: Path) -> None:
    setting = f"sft.trainer={json.dumps({'max_steps': 2, **block})}"
    out = f"sft.output_dir={tmp_path}/out"
    path = str(shutil.copy(folder / "config.yaml", tmp_path))

    for more in (["--dry-run"], []):
        assert train_sft.main(["--config", path, "--set", setting, "--set", out, *more]) == 0


def test_error_with_an_empty_block_is_a_bug_and_stays_one(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(*arguments: object, **more: object) -> None:
        json.loads("{")

    monkeypatch.setattr(sft.SFTTrainer, "__init__", broken)
    with pytest.raises(json.JSONDecodeError):
        build_trainer("sft", folder / "config.yaml", tmp_path, ["sft.trainer={}"])
    with pytest.raises(UserError, match=r"TRL refuses these settings: Expecting property name"):
        build_trainer("sft", folder / "config.yaml", tmp_path)


def test_our_own_error_and_a_lack_of_memory_are_not_blamed_on_the_block(tmp_path: Path) -> None:
    run = run_of("sft", LoadedConfig(Config(sft=Sft(trainer={"max_steps": 2})), {}), tmp_path)

    with pytest.raises(ZeroDivisionError), blamed_on_trainer_block(run):
        total_steps(run.section.model_copy(update={"trainer": {}}), rows=1, world_size=0)
    with pytest.raises(MemoryError), blamed_on_trainer_block(run):
        raise MemoryError
