"""Tracking: a run is closed as what it was, and a store that fails never stops training."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
from pathlib import Path

import mlflow
import pytest

from scripts.common.config import load_config
from scripts.common.errors import Interrupted, UserError
from scripts.common.signals import trapped_signals
from scripts.common.tracking import Tracker, open_store, tracked_run


@pytest.fixture
def config(write_config):
    """Return a configuration whose MLflow store lies in the test's folder."""
    return load_config(write_config())


def run_of(tracker: Tracker):
    """Read a run back from the store."""
    return mlflow.MlflowClient().get_run(tracker.run_id)


def text_of(tracker: Tracker, name: str) -> str:
    """Read a text artifact of a run."""
    return Path(mlflow.artifacts.download_artifacts(run_id=tracker.run_id, artifact_path=name)).read_text()


def test_finished_run_holds_what_was_sent(config, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("inner")
    with tracked_run(config, "sft") as tracker:
        tracker.log_params({"lora.r": 16, "long": "x" * 9000})
        tracker.log_metrics({"train/loss": 2.5}, step=3)
        tracker.log_metrics({"train/loss": 1.5}, step=4)
        tracker.log_dataset("data/a.jsonl", "c0ffee" * 10, "train", 12)
        tracker.log_dataset("data/a.jsonl", "c0ffee" * 10, "validation", 3)
        tracker.log_artifact(tmp_path / "note.txt")
        tracker.log_artifact(tmp_path / "folder", "adapter")
        tracker.set_tag("colour", "blue")

    run = run_of(tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run.data.tags["stage"] == "sft"
    assert run.data.tags["config_sha256"] == config.digest()
    assert run.data.tags["colour"] == "blue"
    assert len(run.data.tags["git_commit"]) == 40 or run.data.tags["git_commit"] == "none"
    assert run.data.params["lora.r"] == "16"
    history = mlflow.MlflowClient().get_metric_history(tracker.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(3, 2.5), (4, 1.5)]
    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert {side: dataset.name for side, dataset in inputs.items()} == {
        "train": "a.jsonl (train)",
        "validation": "a.jsonl (validation)",
    }
    assert all(dataset.digest.startswith("c0ffee") for dataset in inputs.values())
    assert text_of(tracker, "note.txt") == "hello"
    assert text_of(tracker, "adapter/a.txt") == "inner"


def test_single_figures_are_tags_and_a_long_description_ends_with_a_whole_line(config) -> None:
    with tracked_run(config, "comparison") as tracker:
        tracker.summarise({"all rules (strict).dpo": 2 / 3, "steps": 12})
        tracker.describe("\n".join(["verdict", *("figures " * 40 for _ in range(40))]))

    data = run_of(tracker).data
    assert {key: value for key, value in data.tags.items() if key.startswith("summary.")} == {
        "summary.all rules _strict_.dpo": "0.666667",
        "summary.steps": "12",
    }
    first, *lines = data.tags["mlflow.note.content"].split("\n")
    assert (first, set(lines)) == ("verdict", {"figures " * 40})
    assert 10 < len(lines) < 20
    assert not [name for name in data.metrics if not name.startswith("system/")]


def test_an_adapter_is_a_model_of_its_run_and_a_version_in_the_registry(config, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("weights")
    for seed in ("0", "1"):
        with tracked_run(config, "dpo", name=f"DPO beta 0.1 · seed {seed}") as tracker:
            tracker.describe("**Better**")
            tracker.log_model(adapter, f"DPO-seed-{seed}", "mine-dpo", "LoRA adapter", {"seed": seed})

    run, client = run_of(tracker), mlflow.MlflowClient()
    last, first = client.search_model_versions("name = 'mine-dpo'")
    model = client.get_logged_model(last.source.removeprefix("models:/"))
    assert (run.info.run_name, run.data.tags["mlflow.note.content"]) == ("DPO beta 0.1 · seed 1", "**Better**")
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert (model.name, model.status, model.model_type, last.tags) == (
        "DPO-seed-1",
        "READY",
        "LoRA adapter",
        {"seed": "1"},
    )
    assert [file.path for file in client.list_logged_model_artifacts(model.model_id)] == ["adapter_model.safetensors"]
    assert client.list_artifacts(tracker.run_id) == [], "the weights are stored once"
    assert [int(version.version) for version in (last, first)] == [2, 1]
    assert client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_store_without_models_keeps_the_adapter_in_the_run(config, tmp_path: Path, monkeypatch) -> None:
    """As servers before MLflow 3."""

    def unknown(*arguments: object, **more: object) -> None:
        raise mlflow.exceptions.MlflowException("no such endpoint")

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/weights").write_text("x")
    monkeypatch.setattr(mlflow.MlflowClient, "create_logged_model", unknown)
    with tracked_run(config, "sft") as tracker:
        tracker.log_model(tmp_path / "adapter", "a", "mine-sft", "LoRA adapter", {})

    assert text_of(tracker, "adapter/weights") == "x"


def test_the_configured_parent_comes_before_that_of_the_stage(config, write_config) -> None:
    with tracked_run(config, "study") as study:
        pass
    with tracked_run(config, "sft") as sft:
        pass
    below = load_config(write_config(tracking={"parent_run_id": study.run_id}))

    for given in (None, sft.run_id):
        with tracked_run(below, "dpo", parent_run_id=given) as tracker:
            pass
        assert run_of(tracker).data.tags["mlflow.parentRunId"] == study.run_id


def test_crash_marks_the_run_failed_and_keeps_the_traceback(config) -> None:
    with pytest.raises(ZeroDivisionError), tracked_run(config, "sft") as tracker:
        raise ZeroDivisionError("division by zero")

    assert run_of(tracker).info.status == "FAILED"
    assert "ZeroDivisionError: division by zero" in text_of(tracker, "traceback.txt")


@pytest.mark.parametrize("stop", [Interrupted(143), KeyboardInterrupt()])
def test_signal_marks_the_run_killed(config, stop: BaseException) -> None:
    with pytest.raises(type(stop)), tracked_run(config, "sft") as tracker:
        raise stop

    assert run_of(tracker).info.status == "KILLED"


@pytest.mark.parametrize(("step", "status"), [("start_run", "KILLED"), ("end_run", "FINISHED")])
def test_signal_while_the_run_opens_or_closes_leaves_no_run_open(config, monkeypatch, step: str, status: str) -> None:
    real = getattr(mlflow, step)

    def signalled(*arguments: object, **more: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **more)

    monkeypatch.setattr(mlflow, step, signalled)
    with pytest.raises(Interrupted), trapped_signals(), tracked_run(config, "sft"):
        assert step == "end_run", "work began after a request to stop"

    (run,) = mlflow.MlflowClient().search_runs(["0", "1"])
    assert run.info.status == status


def test_parent_run_is_linked(config) -> None:
    with tracked_run(config, "sft") as parent:
        pass
    with tracked_run(config, "dpo", parent_run_id=parent.run_id) as child:
        pass

    assert run_of(child).data.tags["mlflow.parentRunId"] == parent.run_id
    assert run_of(parent).info.status == "FINISHED"


def left_running(config) -> str:
    """Leave a run behind as a killed process does."""
    open_store(config)
    run_id = mlflow.start_run().info.run_id
    mlflow.tracking.fluent._active_run_stack.get().clear()
    assert mlflow.MlflowClient().get_run(run_id).info.status == "RUNNING"
    return run_id


def test_run_of_a_process_that_died_is_continued(config) -> None:
    earlier = left_running(config)

    with tracked_run(config, "sft", earlier=earlier, resume=True) as tracker:
        assert tracker.run_id == earlier

    assert run_of(tracker).info.status == "FINISHED"


def test_run_of_a_process_that_died_is_marked_killed_when_starting_over(config) -> None:
    earlier = left_running(config)

    with tracked_run(config, "sft", earlier=earlier) as tracker:
        assert tracker.run_id != earlier

    assert mlflow.MlflowClient().get_run(earlier).info.status == "KILLED"


def test_run_that_is_not_in_this_store_starts_a_new_one(config) -> None:
    with tracked_run(config, "sft", earlier="0" * 32, resume=True) as tracker:
        pass

    assert run_of(tracker).info.status == "FINISHED"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////dev/null/mlflow.db", "nonsense://x"])
def test_store_that_cannot_be_opened_is_refused_by_key_and_uri(write_config, monkeypatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = load_config(write_config(tracking={"mlflow_tracking_uri": uri}))

    with pytest.raises(UserError) as caught, tracked_run(config, "sft"):
        pytest.fail("work began without a store")

    assert str(caught.value).startswith(f"tracking.mlflow_tracking_uri: cannot open {uri}: ")
    assert "sqlite:///mlflow.db" in str(caught.value)


def test_folder_store_works(write_config, monkeypatch, tmp_path: Path) -> None:
    """MLflow refuses a folder unless an environment variable says that this is meant."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    config = load_config(write_config(tracking={"mlflow_tracking_uri": str(tmp_path / "runs")}))

    with tracked_run(config, "sft") as tracker:
        tracker.log_metrics({"train/loss": 2.5}, step=3)

    assert run_of(tracker).data.metrics["train/loss"] == 2.5
    assert list((tmp_path / "runs").rglob("meta.yaml"))


def break_store(folder: Path, *, back: bool = False) -> None:
    """Take the table of metrics away from a live store, or bring it back."""
    names = ("gone", "metrics") if back else ("metrics", "gone")
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.execute("PRAGMA legacy_alter_table=ON")
        connection.execute(f"ALTER TABLE {names[0]} RENAME TO {names[1]}")
    connection.close()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return our own warnings."""
    return [r.message for r in caplog.records if r.name.startswith("scripts") and r.levelno >= logging.WARNING]


def test_store_that_dies_and_returns_gets_everything_in_order(config, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, "scripts")
    with tracked_run(config, "sft") as tracker:
        tracker.log_metrics({"train/loss": 9.0}, step=0)
        break_store(tmp_path)
        for step in range(1, 6):
            tracker.log_metrics({"train/loss": 9.0 - step}, step=step)
        tracker.set_tag("after", "the failure")
        assert tracker.waiting == 6
        break_store(tmp_path, back=True)

    history = mlflow.MlflowClient().get_metric_history(tracker.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 9.0 - step) for step in range(6)]
    run = run_of(tracker)
    assert run.data.tags["after"] == "the failure"
    assert run.info.status == "FINISHED"
    assert len(warnings_in(caplog)) == 1
    assert "training continues" in warnings_in(caplog)[0]


def test_numbers_of_quick_steps_are_delivered_together_and_none_is_lost(config, monkeypatch) -> None:
    """A delivery takes longer than a small model's step on a GPU; MLflow takes a thousand numbers at once."""
    deliveries = []
    with tracked_run(config, "sft") as tracker:
        deliver = tracker._client.log_batch
        monkeypatch.setattr(tracker._client, "log_batch", lambda *a, **k: (deliveries.append(a), deliver(*a, **k)))
        for step in range(700):
            tracker.log_metrics({"train/loss": 1.0 * step, "train/entropy": 2.0}, step)

    history = mlflow.MlflowClient().get_metric_history(tracker.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(step, 1.0 * step) for step in range(700)]
    assert 3 <= len(deliveries) < 20


def test_store_that_stays_away_does_not_stop_the_run_and_says_what_is_lost(config, tmp_path: Path, caplog) -> None:
    with tracked_run(config, "sft") as tracker:
        break_store(tmp_path)
        for step in range(4):
            tracker.log_metrics({"train/loss": 1.0}, step=step)

    assert any("4 entries could not be delivered" in message for message in warnings_in(caplog))


def test_other_processes_of_a_launch_track_nothing(config, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with tracked_run(config, "sft") as tracker:
        tracker.log_metrics({"train/loss": 1.0})
    monkeypatch.undo()

    assert tracker.run_id is None
    mlflow.set_tracking_uri(config.values.tracking.mlflow_tracking_uri)
    assert mlflow.MlflowClient().search_runs(["0", "1"]) == []
