"""Several processes make one run: the same batches, losses and held-out figures as one, and one set of outputs."""

from __future__ import annotations

import os
import random
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
from scripts.common import processes
from scripts.common.errors import UserError
from scripts.common.fast_path import SimilarLengthSampler
from scripts.common.runtime import Machine, check_launch
from scripts.common.schema import Config, Quantization
from tests.chain import manifest, wait_for, write_chain
from tests.conftest import ROOT

CPU = Machine("cpu", torch.bfloat16, 1, 1, ())
LENGTHS = random.Random(0).choices(range(5, 500), k=83)


def launch(stage: str, config: Path, *more: str, sharded: bool = False) -> subprocess.Popen[str]:
    """Start a stage in two processes, as README shows, or under FSDP2."""
    what = [str(ROOT / "tests/sharded_on_cpu.py"), stage] if sharded else ["-m", f"scripts.{stage}"]
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
    """Stand in one process's place."""
    monkeypatch.setattr(processes, "place", lambda: (rank, count))


@pytest.mark.parametrize(("rows", "count"), [(10, 1), (10, 2), (11, 4), (3, 8), (1, 2)])
def test_shares_are_equally_long_and_count_every_row_once(monkeypatch, rows: int, count: int) -> None:
    counted, lengths = [], set()
    for rank in range(count):
        as_process(monkeypatch, rank, count)
        own, valid = processes.own_share(range(rows))
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
        dealt.append(list(processes.even_rounds(range(rows), batch)))

    total = 0.0
    for turn in zip(*dealt, strict=True):
        assert len({(len(indices), taken) for indices, taken in turn}) == 1, "in step"
        assert all(len(indices) <= batch for indices, _ in turn)
        total += sum(sum(values[i] for i in indices) / len(indices) for indices, _ in turn) / count * turn[0][1]
    assert total / rows == pytest.approx(sum(values) / rows)


@pytest.mark.parametrize(("count", "accumulated"), [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_an_optimizer_step_sees_the_same_records_however_it_is_split(count: int, accumulated: int) -> None:
    """Through accelerate's own sharding; an incomplete last batch is filled up by it, so only whole ones are compared."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    step, size = 16, 16 // (count * accumulated)
    order = list(SimilarLengthSampler(LENGTHS, step, seed=0))
    sampler = SimilarLengthSampler(LENGTHS, step, seed=0)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, size, False), count, rank)) for rank in range(count)]

    for number in range(len(LENGTHS) // step):
        seen = [
            index
            for shard in shards
            for batch in shard[number * accumulated : (number + 1) * accumulated]
            for index in batch
        ]
        assert sorted(seen) == sorted(order[number * step : (number + 1) * step])


def test_every_epoch_has_another_order_in_a_shard() -> None:
    """The Trainer's epoch has to reach our sampler through accelerate's wrapping."""
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    loader = DataLoader(range(83), batch_size=4, sampler=SimilarLengthSampler(LENGTHS, 8, seed=0))
    prepared = prepare_data_loader(loader, num_processes=2, process_index=1, put_on_device=False)
    epochs = []
    for epoch in (0, 1, 0):
        prepared.set_epoch(epoch)
        epochs.append([int(index) for batch in prepared for index in batch])

    assert epochs[0] == epochs[2] != epochs[1]


# --- starts that would leave something out in silence


@pytest.mark.parametrize(
    ("machine", "environment", "said"),
    [
        (CPU, {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "single process on a CPU.*torchrun"),
        (CPU, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "over GPUs only"),
        (Machine("cuda", torch.bfloat16, 1, 8, ()), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp2.yaml"),
        (Machine("cuda", torch.bfloat16, 1, 8, ()), {"ACCELERATE_USE_DEEPSPEED": "true"}, "ddp.yaml"),
    ],
)
def test_launch_that_would_not_do_what_it_says_is_refused(monkeypatch, machine, environment, said) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UserError, match=said):
        check_launch(Config(quantization=Quantization(load_in_4bit=True)), machine)


def test_several_gpus_without_a_launcher_are_refused_with_both_ways_out(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    with pytest.raises(UserError, match=r"4 GPUs.*torchrun --nproc_per_node 4.*CUDA_VISIBLE_DEVICES=0"):
        check_launch(Config(), Machine("cuda", torch.bfloat16, 1, 1, ()))
    check_launch(Config(), Machine("cuda", torch.bfloat16, 1, 4, ()))


@pytest.mark.parametrize(
    ("name", "kind", "environment"),
    [
        ("ddp", "MULTI_GPU", {}),
        (
            "fsdp2",
            "FSDP",
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
        ),
        ("zero3", "DEEPSPEED", None),
    ],
)
def test_launch_file_says_to_the_pinned_accelerate_what_we_read_from_it(name, kind, environment) -> None:
    """The environment that `accelerate launch` hands over; for DeepSpeed it first asks for that package."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = f"configs/accelerate/{name}.yaml"
    assert load_config_from_file(str(ROOT / path)).distributed_type == kind
    assert f"accelerate launch --config_file {path} -m scripts.train_sft" in (ROOT / path).read_text(encoding="utf-8")
    if environment is not None:
        given = launch_command_parser().parse_args(["--config_file", str(ROOT / path), "-m", "scripts.train_sft"])
        found = prepare_multi_gpu_env(_validate_launch_command(given)[0])
        assert found["ACCELERATE_MIXED_PRECISION"] == "no", "performance.dtype decides"
        assert found.items() >= environment.items()


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
