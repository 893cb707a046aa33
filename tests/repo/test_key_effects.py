"""Keys whose effect shows before anything is trained: what they change in the trainer, the machine, the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import EarlyStoppingCallback

from scripts import get_demo_model, train_dpo, train_kto, train_sft
from scripts.common.config import load_config
from scripts.common.machine import choose_machine
from scripts.common.schema import Config, Performance, Quantization
from scripts.dataset.rendering import Rendered, RenderedPair
from scripts.model.base import load_base
from scripts.model.memory import estimate_memory
from scripts.training.callbacks import training_callbacks
from scripts.training.plan import plan_training
from scripts.training.start import find_start
from tests.support.chain import write_chain, write_kto_chain
from tests.support.exporting import save_adapter
from tests.support.training import build_trainer, run_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with config, data, a base and an SFT adapter."""
    made = tmp_path_factory.mktemp("keys")
    write_kto_chain(made)
    save_adapter(made / "model", made / "out/sft_adapter")
    return made


SHARED: list[tuple[str, Callable, object]] = [
    ("num_train_epochs=7", lambda trainer: trainer.args.num_train_epochs, 7),
    ("learning_rate=0.125", lambda trainer: trainer.args.learning_rate, 0.125),
    ("per_device_train_batch_size=3", lambda trainer: trainer.args.per_device_train_batch_size, 3),
    ("gradient_accumulation_steps=5", lambda trainer: trainer.args.gradient_accumulation_steps, 5),
    ('trainer={"weight_decay": 0.5}', lambda trainer: trainer.args.weight_decay, 0.5),
]
EFFECTS = [
    *((name, f"{name}.{setting}", seen, wanted) for name in ("sft", "dpo", "kto") for setting, seen, wanted in SHARED),
    ("sft", "seed=9", lambda trainer: trainer.args.seed, 9),
    ("sft", "performance.group_by_length=false", lambda trainer: trainer.group_by_length, False),
    ("sft", "performance.gradient_checkpointing=true", lambda trainer: trainer.args.activation_checkpointing, True),
    ("sft", "lora.init=gaussian", lambda trainer: trainer.model.peft_config["default"].init_lora_weights, "gaussian"),
    ("dpo", "performance.fast_path=false", lambda trainer: trainer.fast_path, False),
    ("dpo", "dpo.beta=0.7", lambda trainer: trainer.beta, 0.7),
    ("dpo", "dpo.loss_type=ipo", lambda trainer: trainer.loss_types, ["ipo"]),
    ("dpo", "dpo.sft_weight=0.5", lambda trainer: trainer.loss_weights, [1.0, 0.5]),
    ("dpo", "dpo.reference=base", lambda trainer: trainer.reference_adapter, None),
    ("kto", "kto.beta=0.7", lambda trainer: trainer.beta, 0.7),
    ("kto", "kto.loss_type=apo_zero_unpaired", lambda trainer: trainer.loss_type, "apo_zero_unpaired"),
    ("kto", "kto.reference=base", lambda trainer: trainer.reference_adapter, None),
    ("kto", "kto.desirable_weight=1.5", lambda trainer: trainer.desirable_weight, 1.5),
    ("kto", "kto.undesirable_weight=2.5", lambda trainer: trainer.undesirable_weight, 2.5),
]


@pytest.mark.parametrize(("name", "override", "seen", "wanted"), EFFECTS, ids=[effect[1] for effect in EFFECTS])
def test_key_reaches_the_trainer(folder: Path, tmp_path: Path, name: str, override: str, seen, wanted) -> None:
    assert seen(build_trainer(name, folder / "config.yaml", tmp_path, [override])) == wanted


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_early_stopping_is_on_only_when_asked_for(folder: Path, name: str) -> None:
    arguments = SimpleNamespace(load_best_model_at_end=True, save_total_limit=None)
    found = []
    for patience in (0, 3):
        config = load_config(folder / "config.yaml", [f"{name}.early_stopping_patience={patience}"])
        callbacks = training_callbacks(getattr(config.values, name), arguments)
        found.append(any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks))
    assert found == [False, True]


@pytest.mark.parametrize(
    ("setting", "seen", "wanted"),
    [
        ({"dtype": "bf16"}, "dtype", torch.bfloat16),
        ({"dtype": "fp32"}, "dtype", torch.float32),
        ({"threads": 1023}, "threads", 1023),
        ({"device": "cpu"}, "device", "cpu"),
    ],
)
def test_machine_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch, setting: dict, seen: str, wanted) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "device" in setting)
    assert getattr(choose_machine(Config(performance=Performance(**setting))), seen) == wanted


@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_checkpointing_is_as_asked_for(tiny_llama: Path, tmp_path: Path, wanted: bool) -> None:
    config = Config(performance=Performance(gradient_checkpointing=wanted))
    row = Rendered.of([1] * 40, [1] * 10)
    assert plan_training(config, config.sft, tiny_llama, choose_machine(config), [row]).checkpointing is wanted


def test_plan_counts_a_pair_as_one_row_and_attention_weights_only_where_they_are_kept(tiny_llama: Path) -> None:
    config = Config(performance=Performance(gradient_checkpointing=False, device="cpu"))
    machine = choose_machine(config)
    pair, row = RenderedPair([1] * 100, [2] * 80, [3] * 60), Rendered.of([1] * 100, [2] * 140)
    dpo = plan_training(config, config.dpo, tiny_llama, machine, [pair]).estimate
    batch = {"per_device_train_batch_size": config.dpo.per_device_train_batch_size}
    same = config.model_copy(update={"sft": config.sft.model_copy(update=batch)})
    assert dpo == plan_training(same, same.sft, tiny_llama, machine, [row]).estimate

    shape = json.loads((tiny_llama / "config.json").read_text(encoding="utf-8"))
    size = {"sequences": 4, "longest": 240, "answer_tokens": 140, "bytes_per_value": 4, "cpu": True, "checkpointing": False, "compiled": True}  # fmt: skip
    kept, again = (estimate_memory(tiny_llama, config, **size, keep_weights=keep) for keep in (True, False))
    one_layer = 4 * 240**2 * shape["num_attention_heads"] * 4 / 2**30
    assert kept.total - again.total == pytest.approx((shape["num_hidden_layers"] - 1) * one_layer)


def test_8bit_loads_8bit_layers(tiny_llama: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = Config(quantization=Quantization(load_in_8bit=True))
    model = load_base(tiny_llama, config, choose_machine(config))
    assert any(isinstance(module, bitsandbytes.nn.Linear8bitLt) for module in model.modules())


def test_revision_chooses_among_cached_ones(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for branch, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        shutil.copytree(tiny_llama, tmp_path / f"models--me--tiny/snapshots/{commit}")
        (tmp_path / "models--me--tiny/refs").mkdir(exist_ok=True)
        (tmp_path / f"models--me--tiny/refs/{branch}").write_text(commit)

    config = write_chain(tmp_path / "chain")
    found = []
    for revision in ("null", "v2", "b" * 40):
        chosen = [
            "base_model_id=me/tiny",
            f"base_model_revision={revision}",
            "dpo.init_from=null",
            "dpo.reference=base",
        ]
        loaded = load_config(config, chosen)
        found.append(find_start(run_of("dpo", loaded, tmp_path), (), loaded.values.dpo.init_from).base_folder.name)

    assert found == ["a" * 40, "b" * 40, "b" * 40]


# --- flags


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_kto], ids=["sft", "dpo", "kto"])
def test_data_without_a_report_is_refused_when_asked(folder: Path, tmp_path: Path, capsys, script) -> None:
    common = ["--config", str(folder / "config.yaml"), "--dry-run"]
    assert script.main(common) == 0
    assert script.main([*common, "--require-deid-report"]) == 2
    assert "no such report" in capsys.readouterr().err


def test_deid_reads_the_configuration_it_is_given(tmp_path: Path) -> None:
    pytest.importorskip("presidio_analyzer")
    from scripts.deid_presidio import build_parser, config_of

    (tmp_path / "mine.yaml").write_text("deid: {profile: strict}")
    arguments = build_parser().parse_args(["--in", "a", "--out", "b", "--config", str(tmp_path / "mine.yaml")])
    assert config_of(arguments).deid.profile == "strict"


def test_demo_model_goes_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "NOTICE").touch()
    assert get_demo_model.main(["--out", str(tmp_path)]) == 0
    assert f"{tmp_path} is there already" in capsys.readouterr().err
