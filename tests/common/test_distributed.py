"""Several processes make one run: the same batches, losses and held-out figures as one, and one set of outputs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file

from scripts import train_dpo, train_sft
from scripts.common import distributed
from tests.conftest import ROOT
from tests.support.chain import manifest, wait_for, write_chain


def launch(stage: str, config: Path, *more: str, sharded: bool = False) -> subprocess.Popen[str]:
    """Start a stage in two processes, as README shows, or under FSDP2."""
    what = [str(ROOT / "tests/support/sharded_on_cpu.py"), stage] if sharded else ["-m", f"scripts.{stage}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
         "--master_port", str(port), *what, "--config", str(config), *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a launched stage and return what it said."""
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    return said


# --- who takes what


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    """Make this process one of several ranks."""
    monkeypatch.setattr(distributed, "_rank_and_world_size", lambda: (rank, count))


@pytest.mark.parametrize(("rows", "count"), [(10, 1), (10, 2), (11, 4), (3, 8), (1, 2)])
def test_shares_are_equally_long_and_count_every_row_once(monkeypatch, rows: int, count: int) -> None:
    counted, lengths = [], set()
    for rank in range(count):
        as_process(monkeypatch, rank, count)
        own, valid = distributed.shard(range(rows))
        counted += own[:valid]
        lengths.add(len(own))

    assert sorted(counted) == list(range(rows))
    assert len(lengths) == 1


@pytest.mark.parametrize(("rows", "count", "batch"), [(10, 1, 4), (23, 2, 4), (24, 3, 4), (5, 4, 8), (2, 4, 8)])
def test_mean_over_rounds_is_the_mean_over_the_rows(monkeypatch, rows: int, count: int, batch: int) -> None:
    values = [float(number * number) for number in range(rows)]
    dealt = []
    for rank in range(count):
        as_process(monkeypatch, rank, count)
        dealt.append(list(distributed.equal_batches(range(rows), batch)))

    total = 0.0
    for turn in zip(*dealt, strict=True):
        assert len({(len(indices), taken) for indices, taken in turn}) == 1, "in step"
        assert all(len(indices) <= batch for indices, _ in turn)
        total += sum(sum(values[i] for i in indices) / len(indices) for indices, _ in turn) / count * turn[0][1]
    assert total / rows == pytest.approx(sum(values) / rows)


# --- whole runs


def history(folder: Path, stage: str, metric: str) -> dict[int, float]:
    """Return a metric of the one run that a stage left in the folder's store."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("llm-finetune-sft-dpo")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'")
    assert run.info.status == "FINISHED"
    return {point.step: point.value for point in client.get_metric_history(run.info.run_id, metric)}


def test_two_processes_train_like_one_with_twice_the_accumulation(tmp_path: Path, capsys) -> None:
    """Same losses at every step, same held-out figures, same adapters; one run, one folder, one voice."""
    trainer = {"max_steps": 3, "logging_steps": 1, "eval_steps": 3, "save_steps": 3}  # whole batches of 8
    folders = {}
    for name, accumulation in (("two", 1), ("one", 2)):
        folder = folders[name] = tmp_path / name
        folder.mkdir()
        stage = {"gradient_accumulation_steps": accumulation, "trainer": trainer}
        config = write_chain(folder, sft=stage, dpo=stage | {"sft_weight": 0.0})
        if name == "two":
            said = finish(launch("train_sft", config)) + finish(launch("train_dpo", config))
        else:
            start = f"dpo.init_from={folders['two']}/out/sft_adapter"  # so that DPO is compared by itself
            base = f"base_model_id={folders['two']}/model"
            assert train_sft.main(["--config", str(config), "--set", base]) == 0
            assert train_dpo.main(["--config", str(config), "--set", base, "--set", start]) == 0

    for stage in ("sft", "dpo"):
        two, one = (manifest(folders[name] / f"out/{stage}_adapter")["metrics"] for name in ("two", "one"))
        assert (two["processes"], one["processes"]) == (2, 1)
        for figure in ("held_out_loss_before", "held_out_loss"):
            assert two[figure] == pytest.approx(one[figure], abs=1e-5), (stage, figure)
        assert (two["train_tokens"], two["steps"]) == (one["train_tokens"], one["steps"])
        weights = [load_file(folders[name] / f"out/{stage}_adapter/adapter_model.safetensors") for name in folders]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
        for metric in ("train/loss", "train/grad_norm", "validation/loss"):
            ours, theirs = (history(folders[name], stage, metric) for name in ("two", "one"))
            assert len(ours) >= 2
            assert ours == pytest.approx(theirs, abs=1e-4), (stage, metric)
        assert said.count(f"{stage.upper()} is done") == 1
    assert two["step0_margin"] < 1e-5
    assert two["answers"] == pytest.approx(one["answers"], abs=1e-4)
    for metric in ("validation/rewards/margins", "validation/logps/chosen", "validation/answers/kl_to_reference"):
        ours, theirs = (history(folders[name], "dpo", metric) for name in ("two", "one"))
        assert ours == pytest.approx(theirs, abs=1e-4), metric


@pytest.mark.drill
def test_two_processes_stop_together_and_resume_to_the_same_adapter(tmp_path: Path, capsys) -> None:
    """A signal reaches them at different steps; both must end at one, or the checkpoint would wait for ever."""
    steps = {"max_steps": 60, "save_steps": 2, "eval_steps": 20, "logging_steps": 1, "save_total_limit": 99}
    config = write_chain(tmp_path, sft={"trainer": steps})
    whole, broken = (["--set", f"sft.output_dir={tmp_path / name}"] for name in ("whole", "broken"))
    finish(launch("train_sft", config, *whole))

    process = launch("train_sft", config, *broken)
    wait_for(tmp_path / "broken.run/checkpoints/checkpoint-2/trainer_state.json", process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert "stopped at step" in said, said
    assert not (tmp_path / "broken").exists()

    assert train_sft.main(["--config", str(config), *broken, "--resume"]) == 2
    assert "had 2 processes, this one has 1" in capsys.readouterr().err
    finish(launch("train_sft", config, *broken, "--resume"))

    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.drill
def test_mistake_that_only_the_first_process_sees_ends_all_of_them(tmp_path: Path) -> None:
    """Only the first opens the store; the other must neither wait nor show a traceback of a lost connection."""
    config = write_chain(tmp_path)
    process = launch("train_sft", config, "--set", "tracking.mlflow_tracking_uri=http://127.0.0.1:9")
    said = process.communicate(timeout=300)[0]

    assert process.returncode != 0
    assert said.count("error: tracking.mlflow_tracking_uri") == 1
    assert "Connection closed by peer" not in said
    assert not (tmp_path / "out/sft_adapter").exists()


@pytest.mark.drill
def test_fsdp2_trains_like_one_process_with_twice_the_accumulation(tmp_path: Path) -> None:
    """Weights split over two CPU processes: same held-out figures and adapters, saved whole, best checkpoint included."""
    trainer = {"max_steps": 3, "logging_steps": 1, "eval_steps": 3, "save_steps": 3}
    stage = {"gradient_accumulation_steps": 2, "trainer": trainer}
    config = write_chain(tmp_path, sft=stage, dpo=stage)
    assert train_sft.main(["--config", str(config)]) == 0
    assert train_dpo.main(["--config", str(config)]) == 0

    for name in ("sft", "dpo"):
        split, whole = tmp_path / f"split_{name}", tmp_path / f"out/{name}_adapter"
        more = (f"{name}.output_dir={split}", f"{name}.gradient_accumulation_steps=1")
        finish(launch(f"train_{name}", config, "--set", more[0], "--set", more[1], sharded=True))

        ours, theirs = (manifest(folder)["metrics"] for folder in (split, whole))
        assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], abs=1e-4)
        weights = [load_file(folder / "adapter_model.safetensors") for folder in (split, whole)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-4) for key in weights[0])
