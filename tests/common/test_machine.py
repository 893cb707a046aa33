"""What this machine offers, and starts that would leave a part of it out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from scripts.common import machine as machine_module
from scripts.common.errors import UserError
from scripts.common.machine import Machine, available_cores, check_launch, choose_machine
from scripts.common.schema import Config, Performance, Quantization
from tests.conftest import ROOT

CPU = Machine("cpu", torch.bfloat16, 1, 1, ())


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


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


@pytest.mark.parametrize(
    ("fast", "dtype", "warned"), [(False, "bf16", True), (True, "bf16", False), (False, "auto", False)]
)
def test_a_type_that_the_processor_cannot_compute_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fast: bool, dtype: str, warned: bool
) -> None:
    monkeypatch.setattr(
        machine_module, "bf16_support", lambda device: (fast, "there is neither AMX nor AVX512-BF16 to use")
    )

    machine_module.choose_machine(Config(performance=Performance(device="cpu", dtype=dtype)))

    assert ("25 to 30 times as long" in caplog.text) == warned


def test_what_the_processor_may_not_use_is_not_chosen() -> None:
    """bf16 is slow on a processor that could compute it, too, where oneDNN is kept from doing so."""
    code = "from scripts.common.machine import *; print(bf16_support('cpu')[0], kind_of_processor())"
    narrowed = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | narrowed, capture_output=True, text=True)

    assert said.stdout.split() == ["False", torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX2")]


def test_on_an_apple_gpu_training_stays_on_the_cpu_in_fp32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for check in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False)

    machine = choose_machine(Config())

    assert (machine.device, machine.dtype) == ("cpu", torch.float32)
    assert any("mps" in reason for reason in machine.reasons)
