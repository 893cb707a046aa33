"""SFT from records to a tracked adapter, end to end on tiny real models."""

from __future__ import annotations

import errno
import json
import random
import re
import signal
import time
from pathlib import Path

import mlflow
import pytest
import torch

from scripts.common import run as common_run
from scripts.common.artifacts import (
    MANIFEST,
    SPLIT_KEY_VERSION,
    BaseModelFacts,
    SplitFacts,
    locked_run_dir,
    read_manifest,
    sha256_file,
)
from scripts.common.config import load_config
from scripts.dataset.chat_format import ChatFormat, template_sha256, tokenizer_sha256, user_turn
from scripts.dataset.rendering import render_prompt
from scripts.dataset.split import side_of
from scripts.model.base import load_tokenizer
from scripts.model.fingerprint import base_fingerprint
from scripts.train_sft import main
from scripts.training import save, session
from tests.conftest import write_jsonl
from tests.support.chain import start_stage, wait_for
from tests.support.records import load, one_row

WORDS = ["red", "green", "blue", "amber", "violet", "black", "white", "grey"]


def rows(count: int = 40) -> list[dict[str, str]]:
    """Make short records with one learnable style: the answer always opens alike."""
    generator = random.Random(0)
    return [
        {"instruction": f"Note {n}: {' '.join(generator.choices(WORDS, k=generator.randrange(2, 12)))}",
         "output": f"ON TRACK: {generator.choice(WORDS)}"}
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def sft_config(write_config, tmp_path: Path, tiny_llama: Path):
    """Return a function that writes a config for a run of a few steps, with its data."""

    def write(*, records: list | None = None, base: Path = tiny_llama, trainer: dict | None = None, **sft) -> Path:
        data = write_jsonl(tmp_path / "data.jsonl", records or rows())
        return write_config(
            base_model_id=str(base),
            data={"validation_ratio": 0.2, "test_ratio": 0.2},
            lora={"r": 4, "alpha": 8},
            performance={"dtype": "fp32", "threads": 1},
            sft={
                "dataset_path": str(data), "learning_rate": 5e-3, "per_device_train_batch_size": 8, "max_length": 128,
                "trainer": {"max_steps": 4, "logging_steps": 1, **(trainer or {})}, **sft,
            },
        )  # fmt: skip

    return write


def only_run(status: str = "FINISHED"):
    """Return the one run of the store in the working folder."""
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    experiment = client.get_experiment_by_name("llm-finetune-sft-dpo")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == status
    return run


def losses() -> dict[int, float]:
    """Return the training loss of every step from the store in the working folder."""
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    return {point.step: point.value for point in client.get_metric_history(only_run().info.run_id, "train/loss")}


def output_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the user saw since the last look."""
    seen = capsys.readouterr()
    return seen.out + seen.err


# --- one whole run, looked at from all sides


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def finished(request, tmp_path_factory, tiny_llama: Path, tiny_gpt2: Path, empty_store: Path):
    """Train a tiny model once and return its folder, its base and what the user saw."""
    import contextlib
    import io
    import shutil

    import yaml

    base = tiny_llama if request.param == "llama" else tiny_gpt2
    folder = tmp_path_factory.mktemp(f"finished-{request.param}")
    shutil.copy(empty_store, folder / "mlflow.db")
    write_jsonl(folder / "data.jsonl", rows())
    config = {
        "base_model_id": str(base), "offline": True, "data": {"validation_ratio": 0.2, "test_ratio": 0.2}, "performance": {"dtype": "fp32", "threads": 1},
        "lora": {"r": 4, "alpha": 8}, "tracking": {"mlflow_tracking_uri": f"sqlite:///{folder}/mlflow.db"},
        "sft": {"dataset_path": "data.jsonl", "learning_rate": 1e-2, "max_length": 128, "num_train_epochs": 2},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    seen = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(seen):
        assert main(["--config", "config.yaml", "--set", "seed=7"]) == 0
    return folder, base, seen.getvalue()


@pytest.fixture
def in_finished(finished, monkeypatch: pytest.MonkeyPatch):
    """Stand in the folder of the finished run."""
    monkeypatch.chdir(finished[0])
    return finished


def test_manifest_of_a_finished_adapter_is_complete(in_finished) -> None:
    folder, base, _ = in_finished
    manifest = read_manifest("outputs/sft_adapter", stages=("sft",))
    tokenizer = load_tokenizer(base)

    assert manifest.base_model == BaseModelFacts(id=str(base), revision=None, fingerprint=base_fingerprint(base))
    assert manifest.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    assert manifest.chat_template_sha256 == template_sha256(tokenizer)
    assert manifest.parent is None
    (dataset,) = manifest.datasets
    assert dataset.sha256 == sha256_file(folder / "data.jsonl")
    assert dataset.train + dataset.validation + dataset.test + dataset.near_duplicates == 40
    assert min(dataset.validation, dataset.test) > 0
    assert manifest.split == SplitFacts(seed=0, validation_ratio=0.2, test_ratio=0.2, key_version=SPLIT_KEY_VERSION)
    assert manifest.config["seed"] == 7
    assert manifest.config["sft"]["learning_rate"] == 1e-2
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "curves.png",
        "curves.json",
    } <= manifest.files.keys()
    assert set(manifest.files) == {
        path.relative_to("outputs/sft_adapter").as_posix()
        for path in Path("outputs/sft_adapter").rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    assert manifest.metrics["held_out_loss"] < manifest.metrics["held_out_loss_before"] - 0.05
    names = json.loads(Path("outputs/sft_adapter/adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert names == sorted(names), "the same training again gives the same artifact, by whose hash DPO knows its parent"
    assert manifest.metrics["steps"] > 0
    assert manifest.metrics["tokens_per_second"] > 0


def test_adapter_loads_on_the_plain_base_with_plain_peft_and_changes_the_answer(in_finished) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, base, _ = in_finished
    tokenizer = AutoTokenizer.from_pretrained("outputs/sft_adapter")
    ids = torch.tensor([render_prompt(ChatFormat(tokenizer), user_turn("Note 99: red"))])
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        before = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, "outputs/sft_adapter").eval()
        after = adapted(ids).logits

    assert ids.tolist()[0] == render_prompt(ChatFormat(load_tokenizer(base)), user_turn("Note 99: red"))
    assert (after - before).abs().max() > 0.05
    first = tokenizer.encode("ON", add_special_tokens=False)[0]
    gain = torch.log_softmax(after[0, -1], -1)[first] - torch.log_softmax(before[0, -1], -1)[first]
    assert gain > 0.1, "the opening of every trained answer must have become likelier"


def test_saved_adapter_scores_the_held_out_loss_that_was_reported(in_finished) -> None:
    """The reported figure is that of the folder a user has in hand, also when the best checkpoint was restored."""
    from scripts.common.machine import Machine
    from scripts.common.schema import Config, Data
    from scripts.dataset.records import load_datasets, parse_record
    from scripts.dataset.split import side_of
    from scripts.model.adapter import load_adapter
    from scripts.model.base import load_base
    from scripts.model.scoring import mean_loss, score_answers

    _, base, _ = in_finished
    data = Data(validation_ratio=0.2, test_ratio=0.2)
    tokenizer = load_tokenizer(base)
    records = load_datasets("data.jsonl", parse_record, data, "sft.dataset_path")[0].records
    held_out = [one_row(tokenizer, record) for record in records if side_of(record, data) == "validation"]
    plain = load_base(base, Config(), Machine("cpu", torch.float32, 1, 1, ()))
    before = mean_loss(score_answers(plain, held_out, 0))
    after = mean_loss(score_answers(load_adapter(plain, "outputs/sft_adapter"), held_out, 0))

    metrics = read_manifest("outputs/sft_adapter").metrics
    assert metrics["held_out_loss_before"] == pytest.approx(before, abs=1e-4)
    assert metrics["held_out_loss"] == pytest.approx(after, abs=1e-4)


def test_mlflow_run_holds_params_metrics_datasets_and_artifacts(in_finished) -> None:
    folder, base, _ = in_finished
    run, manifest = only_run(), read_manifest("outputs/sft_adapter")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")

    assert manifest.mlflow.run_id == run.info.run_id
    assert run.data.params["base_model_id"] == str(base)
    assert run.data.params["lora.r"] == "4"
    assert {"train/loss", "train/learning_rate", "validation/loss", "summary/held_out_loss"} <= run.data.metrics.keys()
    assert run.data.metrics["summary/held_out_loss"] == pytest.approx(manifest.metrics["held_out_loss"])
    assert sorted(losses()) == list(range(1, manifest.metrics["steps"] + 1))
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == manifest.metrics["steps"]
    contexts = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
    assert contexts.keys() == {"train", "validation"}
    assert contexts["train"].digest == manifest.datasets[0].sha256[:32]
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"config.resolved.yaml", "manifest.json", "curves.png"} <= names
    assert (
        run.info.run_name
        == f"SFT lr {manifest.section['learning_rate']:g} seed {manifest.config['seed']} · {Path(manifest.datasets[0].path).stem}"
    )
    assert {name.partition(".")[0] for name in run.data.params} == {*save.DECISIVE, "sft"}
    assert run.data.tags["summary.steps"] == str(manifest.metrics["steps"])
    assert float(run.data.tags["summary.train_loss"]) > 0
    single = [name for name in run.data.metrics if len(client.get_metric_history(run.info.run_id, name)) == 1]
    assert [name for name in single if not name.startswith("system/")] == [], "charts of one bar"
    (version,) = client.search_model_versions("name = 'llm-finetune-sft-dpo-sft'")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert (version.run_id, model.source_run_id) == (run.info.run_id, run.info.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert model.tags["artifact_sha256"] == manifest.sha256
    copied = {item.path for item in client.list_logged_model_artifacts(model.model_id)}
    assert {"adapter_model.safetensors", "manifest.json"} <= copied
    copies = [
        path for path in folder.rglob("adapter_model.safetensors") if "mlruns" in path.parts or "models" in path.parts
    ]
    assert len(copies) == 1, "the weights are in the store once"
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    assert run.data.tags["stage"] == "sft"


def test_resolved_config_of_the_run_says_where_each_value_came_from(in_finished) -> None:
    text = Path("outputs/sft_adapter.run/config.resolved.yaml").read_text(encoding="utf-8")

    assert "seed: 7  # --set" in text
    assert load_config("outputs/sft_adapter.run/config.resolved.yaml").values == load_config("config.yaml", ["seed=7"]).values  # fmt: skip


def test_user_is_reported_the_result_and_the_next_step(in_finished) -> None:
    _, base, seen = in_finished

    for part in (
        "SFT is done",
        "held-out loss",
        "→",
        "tokens/s",
        "outputs/sft_adapter",
        "mlflow ui",
        "talk to it",
        "python -m serve.ask",
    ):
        assert part in seen
    assert ("c_attn" if "gpt2" in base.name else "q_proj") in seen


def test_training_ends_with_a_held_out_prompt_answered_without_and_with_the_adapter(in_finished) -> None:
    folder, _, seen = in_finished
    data = load_config("config.yaml").values.data
    prompts = {
        row["instruction"]: side_of(record, data)
        for row, record in zip(rows(), load(folder / "data.jsonl"), strict=True)
    }

    shown = seen.partition("a prompt that was held out, from ")[2]
    asked = next(prompt for prompt in prompts if f"\n{prompt}\n" in shown)
    assert prompts[asked] == "validation"
    assert re.search(r"^base +sft$", shown, re.MULTILINE)


def test_resume_of_a_finished_run_changes_nothing_and_exits_0(in_finished, capsys) -> None:
    before = Path("outputs/sft_adapter", MANIFEST).read_bytes()

    assert main(["--config", "config.yaml", "--set", "seed=7", "--resume"]) == 0

    assert "is finished already" in output_of(capsys)
    assert Path("outputs/sft_adapter", MANIFEST).read_bytes() == before
    assert only_run()


# --- before training


def files_below(folder: Path) -> set[str]:
    """Name every file of a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_shows_the_plan_and_writes_nothing(sft_config, tmp_path: Path, capsys) -> None:
    config = sft_config()
    before = files_below(tmp_path)

    assert main(["--config", str(config), "--dry-run"]) == 0

    seen = output_of(capsys)
    assert files_below(tmp_path) == before
    assert "4 optimizer steps" in seen
    assert ">>>ON TRACK: " in seen
    assert "<|end|><<<" in seen
    assert "memory: about" in seen
    assert "what the comparison can show" in seen


def test_answer_longer_than_max_length_is_refused_with_its_line_and_the_fix(sft_config, tmp_path, capsys) -> None:
    records = rows()
    records[6]["output"] = "long " * 300

    assert main(["--config", str(sft_config(records=records))]) == 2

    seen = output_of(capsys)
    assert "1 records are longer than sft.max_length (128)" in seen
    assert f"{tmp_path}/data.jsonl:7: " in seen
    assert "Raise sft.max_length to" in seen
    assert not (tmp_path / "outputs/sft_adapter").exists()


def test_answer_longer_than_max_length_is_left_out_when_asked(sft_config, tmp_path, capsys) -> None:
    records = rows()
    records[6]["output"] = "long " * 300
    config = sft_config(records=records, trainer={"max_steps": 2})

    assert main(["--config", str(config), "--set", "data.on_bad_row=skip"]) == 0

    assert f"{tmp_path}/data.jsonl:7: " in output_of(capsys)
    assert read_manifest("outputs/sft_adapter")


def test_bad_rows_are_written_to_the_run_folder_when_skipped(sft_config) -> None:
    config = sft_config(records=[*rows(), {"instruction": "q", "output": ""}], trainer={"max_steps": 2})

    assert main(["--config", str(config), "--set", "data.on_bad_row=skip"]) == 0

    (reject,) = Path("outputs/sft_adapter.run/rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(reject)["reason"] == "is empty"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.dataset_path=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("base_model_id=./nowhere", "./nowhere: no such model folder"),
        ('lora.target_modules=["no_such"]', "Linear layers of this model: down_proj"),
        ("tracking.mlflow_tracking_uri=sqlite:////dev/null/x.db", "tracking.mlflow_tracking_uri: cannot open"),
        ("sft.max_length=3", "sft.max_length"),
        ("sft.learning_rate=1e-4x", "sft.learning_rate"),
        ("performance.device=cuda", "performance.device: found cuda, but torch sees no GPU"),
    ],
)
def test_mistake_ends_in_one_message_and_no_adapter(sft_config, tmp_path, capsys, override: str, said: str) -> None:
    if "cuda" in override and torch.cuda.is_available():
        pytest.skip("there is a GPU")

    assert main(["--config", str(sft_config()), "--set", override]) == 2

    seen = output_of(capsys)
    assert said in seen
    assert "Traceback" not in seen
    assert not (tmp_path / "outputs/sft_adapter").exists()


def test_output_folder_in_use_is_refused(sft_config, tmp_path: Path, capsys) -> None:
    with locked_run_dir(tmp_path / "outputs/sft_adapter"):
        assert main(["--config", str(sft_config())]) == 2

    assert "another process is writing it" in output_of(capsys)


def test_run_that_would_train_nothing_is_refused(sft_config, monkeypatch, capsys, tmp_path: Path) -> None:
    """TRL would go through all steps with a frozen adapter and report success."""
    from scripts.model import adapter

    real = adapter.add_lora
    monkeypatch.setattr(adapter, "add_lora", lambda *arguments: real(*arguments).requires_grad_(False))

    assert main(["--config", str(sft_config())]) == 2

    assert "no weight of this adapter is trainable" in output_of(capsys)
    assert not (tmp_path / "outputs/sft_adapter").exists()


def test_training_that_moves_nothing_is_refused(sft_config, capsys, tmp_path: Path) -> None:
    config = sft_config(learning_rate=1e-45)

    assert main(["--config", str(config)]) == 2

    assert "not one adapter weight changed in training" in output_of(capsys)
    assert not (tmp_path / "outputs/sft_adapter").exists()


# --- options that change the course


def test_changing_the_save_strategy_alone_works_and_is_reported(sft_config, capsys) -> None:
    config = sft_config(trainer={"save_strategy": "no"}, early_stopping_patience=1)

    assert main(["--config", str(config)]) == 0

    seen = output_of(capsys)
    assert "the last checkpoint is kept instead of the best" in seen
    assert "early_stopping_patience has no effect" in seen
    assert read_manifest("outputs/sft_adapter").metrics["held_out_loss"] is not None


def test_nothing_held_out_trains_and_says_so(sft_config, capsys) -> None:
    assert main(["--config", str(sft_config()), "--set", "data.validation_ratio=0"]) == 0

    seen = output_of(capsys)
    assert "no record is for validation" in seen
    assert "nothing was held out" in seen
    assert read_manifest("outputs/sft_adapter").metrics["held_out_loss"] is None


def test_early_stopping_ends_a_run_that_gets_worse_and_keeps_the_best(sft_config, capsys) -> None:
    """The answers are drawn by chance, so after the style there is nothing to learn but the training records by heart."""
    config = sft_config(
        learning_rate=0.05,
        early_stopping_patience=1,
        trainer={"max_steps": 200, "eval_steps": 5, "save_steps": 5, "lr_scheduler_type": "constant"},
    )

    assert main(["--config", str(config)]) == 0

    metrics = read_manifest("outputs/sft_adapter").metrics
    held_out = [float(value) for value in re.findall(r"step [1-9]\d*: held-out loss ([\d.]+)", output_of(capsys))]
    assert metrics["steps"] < 200
    assert held_out[-1] > held_out[-2] == min(held_out)
    assert metrics["held_out_loss"] == pytest.approx(min(held_out), abs=1e-3)


def test_checkpoints_are_gone_after_the_end(sft_config) -> None:
    assert main(["--config", str(sft_config())]) == 0

    assert not list(Path("outputs").rglob("checkpoint-*"))
    assert read_manifest("outputs/sft_adapter")


def test_accumulating_gradients_equals_a_larger_batch(sft_config) -> None:
    from safetensors.torch import load_file

    weights = {}
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        config = sft_config(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        name = f"a{batch}"
        assert main(["--config", str(config), "--set", f"sft.output_dir={name}"]) == 0
        weights[batch] = load_file(f"{name}/adapter_model.safetensors")

    for batch in (2, 1):
        for name, tensor in weights[8].items():
            assert torch.allclose(weights[batch][name], tensor, atol=1e-4), (batch, name)


def test_same_seed_gives_the_same_adapter_and_another_seed_another(sft_config) -> None:
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        assert main(["--config", str(sft_config()), "--set", f"sft.output_dir=a{number}", "--set", f"seed={seed}"]) == 0
        digests.append(sha256_file(Path(f"a{number}/adapter_model.safetensors")))

    assert digests[0] == digests[1] != digests[2]


def test_weights_of_datasets_reach_training(sft_config, tmp_path: Path) -> None:
    config = sft_config(trainer={"max_steps": 2})
    sources = [{"path": str(tmp_path / "data.jsonl"), "weight": 2.0}]

    overrides = [f"sft.dataset_path={json.dumps(sources)}", "tracking.experiment=mine", "tracking.log_adapter=false"]
    assert main(["--config", str(config), *(part for item in overrides for part in ("--set", item))]) == 0

    (dataset,) = read_manifest("outputs/sft_adapter").datasets
    assert dataset.train == 2 * (40 - dataset.validation - dataset.test)
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    kept = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert "manifest.json" in kept
    assert "adapter" not in kept


# --- what fails on the way


def test_full_disk_leaves_the_previous_adapter_and_nothing_that_looks_finished(sft_config, monkeypatch, capsys) -> None:
    config = sft_config(trainer={"max_steps": 2})
    assert main(["--config", str(config)]) == 0
    before = read_manifest("outputs/sft_adapter")

    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "outputs")

    monkeypatch.setattr(common_run, "write_manifest", full)
    assert main(["--config", str(config), "--set", "seed=3"]) == 2

    seen = output_of(capsys)
    assert "No space left on device. Free some space" in seen
    assert "Traceback" not in seen
    assert read_manifest("outputs/sft_adapter") == before
    assert [path.parent.name for path in Path.cwd().rglob(MANIFEST) if "mlruns" not in path.parts] == ["sft_adapter"]


def test_crash_marks_the_run_failed_and_keeps_the_previous_adapter(sft_config, monkeypatch) -> None:
    config = sft_config(trainer={"max_steps": 2})

    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(save, "draw_curves", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["--config", str(config)])

    assert only_run("FAILED")
    assert not Path("outputs/sft_adapter").exists()


# --- interrupted and resumed

SLOW_STEPS = {"max_steps": 12, "save_steps": 2, "eval_steps": 2, "logging_steps": 1}


@pytest.fixture
def uninterrupted(sft_config, tmp_path: Path, monkeypatch):
    """Train once without a break in a folder of its own; return its losses per step and the adapter's hash."""
    import shutil

    config = sft_config(trainer=SLOW_STEPS)
    side = tmp_path / "side"
    side.mkdir()
    shutil.copy(tmp_path / "mlflow.db", side / "mlflow.db")
    monkeypatch.chdir(side)
    assert main(["--config", str(config), "--set", f"tracking.mlflow_tracking_uri=sqlite:///{side}/mlflow.db"]) == 0
    result = losses(), sha256_file(side / "outputs/sft_adapter/adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)
    return config, result


@pytest.mark.usefixtures("no_unpickling")
def test_killed_run_resumes_to_the_same_losses_as_an_uninterrupted_one(uninterrupted, tmp_path: Path, capsys) -> None:
    config, (wanted, adapter) = uninterrupted
    run_dir = tmp_path / "outputs/sft_adapter.run"
    process = start_stage("train_sft", config)
    try:
        wait_for(run_dir / f"checkpoints/checkpoint-{random.choice((2, 4, 6))}/trainer_state.json", process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "outputs/sft_adapter").exists()

    assert main(["--config", str(config), "--resume"]) == 0

    assert losses() == pytest.approx(wanted, abs=1e-6)
    assert sorted(losses()) == list(range(1, 13))
    assert sha256_file(tmp_path / "outputs/sft_adapter/adapter_model.safetensors") == adapter


def test_sigterm_writes_a_checkpoint_marks_the_run_killed_and_exits_143(sft_config, tmp_path: Path, capsys) -> None:
    """Then a resume with other data is refused with both hashes, and nothing is lost."""
    config = sft_config(trainer={**SLOW_STEPS, "max_steps": 300, "save_steps": 10000, "eval_steps": 10000})
    run_dir = tmp_path / "outputs/sft_adapter.run"
    process = start_stage("train_sft", config)
    wait_for(run_dir / "state.json", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    seen = process.communicate(timeout=240)[0]

    assert process.returncode == 143, seen
    assert "Traceback" not in seen
    assert "--resume continues from there" in seen
    (checkpoint,) = (run_dir / "checkpoints").glob("checkpoint-*")
    assert only_run("KILLED")
    assert not (tmp_path / "outputs/sft_adapter").exists()

    write_jsonl(tmp_path / "data.jsonl", rows(41))
    assert main(["--config", str(config), "--resume"]) == 2
    complaint = output_of(capsys)
    assert "this is not the run that was interrupted" in complaint
    assert re.search(r"data: was [0-9a-f]{16}…, is [0-9a-f]{16}…", complaint)
    assert "config: was" not in complaint
    assert checkpoint.exists()


def test_resume_with_another_config_is_refused_and_names_it(sft_config, tmp_path: Path, capsys) -> None:
    config = sft_config()
    assert main(["--config", str(config)]) == 0

    assert main(["--config", str(config), "--set", "lora.r=2", "--resume"]) == 2

    complaint = output_of(capsys)
    assert "(lora.r: was 4, is 2)" in complaint
    assert "data: was" not in complaint


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("performance.dtype=bf16", "performance.dtype: was fp32, is bf16"),
        ("performance.group_by_length=false", "performance.group_by_length: was true, is false"),
        ("performance.fast_path=false", "performance.fast_path: was true, is false"),
    ],
)
def test_resume_with_other_arithmetic_or_batches_is_refused(sft_config, override: str, said: str, capsys) -> None:
    config = ["--config", str(sft_config(trainer={"max_steps": 2}))]
    assert main(config) == 0

    assert main([*config, "--set", override, "--resume"]) == 2

    assert f"this is not the run that was interrupted ({said}). Restore what was changed" in output_of(capsys)
    assert main([*config, "--set", "performance.threads=2", "--resume"]) == 0
    assert "nothing to resume" in output_of(capsys)


def test_a_fresh_start_forgets_the_run_before_it(sft_config, monkeypatch, capsys) -> None:
    """Killed before its first checkpoint, a new run is not mistaken for the earlier one with another configuration."""
    config = sft_config(trainer={"max_steps": 2})
    assert main(["--config", str(config)]) == 0
    seed = ["--set", "seed=3"]

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "log_inputs", killed)
        assert main(["--config", str(config), *seed]) == 130
    assert main(["--config", str(config), *seed, "--resume"]) == 0

    assert "nothing to resume" in output_of(capsys)
    assert read_manifest("outputs/sft_adapter").config["seed"] == 3


def test_resume_without_anything_to_resume_starts_at_step_0_and_says_so(sft_config, capsys) -> None:
    assert main(["--config", str(sft_config(trainer={"max_steps": 2})), "--resume"]) == 0

    assert "nothing to resume" in output_of(capsys)
    assert read_manifest("outputs/sft_adapter").metrics["steps"] == 2
