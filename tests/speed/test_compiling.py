"""Compiled layers: chosen by the planned work alone, the same numbers in fp32, and only where gradients are wanted."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

import pytest
import torch

from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config, Lora, Performance, Quantization
from scripts.model.adapter import add_lora
from scripts.model.base import load_base
from scripts.model.memory import parameter_count
from scripts.speed import compiling
from scripts.speed.compiling import REPAID_FROM_FLOP, choose_compilation, compile_layers
from scripts.speed.speed_up import speed_up
from tests.conftest import run_python, save_tiny_model
from tests.support.tolerance import ROUNDING, apart

CPU, GPU = (Machine(device, torch.float32, 1, 1, ()) for device in ("cpu", "cuda"))


def config(compile: object) -> Config:
    return Config(performance=Performance(compile=compile))


def test_work_decides_and_not_a_clock(tiny_llama: Path) -> None:
    enough = REPAID_FROM_FLOP / (4 * parameter_count(tiny_llama))

    assert choose_compilation(config("auto"), CPU, tiny_llama, False, enough * 1.01)[0]
    assert not choose_compilation(config("auto"), CPU, tiny_llama, False, enough * 0.99)[0]
    assert choose_compilation(config("auto"), CPU, tiny_llama, False, 1, tight=True) == (True, "layers compiled: that takes less memory")  # fmt: skip
    assert not choose_compilation(config("auto"), GPU, tiny_llama, False, enough * 1.01)[0]
    assert choose_compilation(config(True), CPU, tiny_llama, False, 1) == (True, "layers compiled: asked for")
    assert choose_compilation(config("auto"), CPU, tiny_llama, True, enough * 9) == (False, "layers not compiled: the lean decoder is faster without")  # fmt: skip
    assert choose_compilation(config(False), CPU, tiny_llama, False, enough * 9) == (
        False,
        "layers not compiled: asked for",
    )


@pytest.mark.parametrize(
    ("obstacle", "said"),
    [
        ("quantised", "a quantised base"),
        ("compiler", "no working C++ compiler"),
        ("broken compiler", "no working C++ compiler (false)"),
        ("headers", "python3-dev"),
        ("slow", "fast_path"),
    ],
)
def test_what_cannot_be_compiled_is_not_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path, obstacle: str, said: str
) -> None:
    changes: dict = {}
    if obstacle == "compiler":
        monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    elif obstacle == "broken compiler":
        monkeypatch.setenv("CXX", "false")
    elif obstacle == "headers":
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    elif obstacle == "quantised":
        changes["quantization"] = Quantization(load_in_4bit=True)
    slow = {"fast_path": False} if obstacle == "slow" else {}

    chosen, why = choose_compilation(Config(performance=Performance(**slow), **changes), CPU, tiny_llama, False, 1e18)

    assert not chosen
    assert said in why
    with pytest.raises(UserError, match="performance.compile: found true, but .*" + re.escape(said)):
        choose_compilation(
            Config(performance=Performance(compile=True, **slow), **changes), CPU, tiny_llama, False, 1e18
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "script", "said"),
    [
        ("clang++", 'for each in "$@"; do case "$each" in *openmp*) echo "clang: error: unsupported option -fopenmp" >&2; exit 1;; esac; done; exec g++ "$@"', "unsupported option -fopenmp"),
        ("c++-without-linker", 'case "$*" in *-version*) exec g++ --version;; esac; echo "ld: error: cannot find crti.o" >&2; exit 1', "cannot find crti.o"),
        ("cl", "exit 3", "cl"),
    ],
)  # fmt: skip
def test_a_compiler_that_is_there_and_cannot_build_leaves_the_run_uncompiled(
    tmp_path: Path, tiny_llama: Path, name: str, script: str, said: str
) -> None:
    """As Apple's clang, which answers `--version` and has no OpenMP."""
    compiler = tmp_path / name
    compiler.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    compiler.chmod(0o755)
    code = (
        "import torch; from pathlib import Path; from scripts.common.machine import Machine\n"
        "from scripts.common.schema import Config, Performance\n"
        "from scripts.speed.compiling import choose_compilation\n"
        "machine = Machine('cpu', torch.float32, 1, 1, ())\n"
        f"print(choose_compilation(Config(), machine, Path({str(tiny_llama)!r}), False, 1e18))\n"
        f"choose_compilation(Config(performance=Performance(compile=True)), machine, Path({str(tiny_llama)!r}), False, 1)\n"
    )

    done = run_python("-c", code, CXX=str(compiler), PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    assert done.stdout.startswith("(False, 'layers not compiled: there is no working C++ compiler"), done.stderr[-2000:]
    assert said in done.stdout
    assert "performance.compile: found true, but there is no working C++ compiler" in done.stderr


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_layer_but_the_first_is_compiled(tmp_path: Path, architecture: str) -> None:
    model = add_lora(load_base(save_tiny_model(tmp_path / "m", architecture), Config(), CPU), Lora(r=4), "m")

    compile_layers(model)

    inner = model.get_base_model()
    layers = inner.model.layers if architecture == "llama" else inner.transformer.h
    assert ["forward" in vars(layer) for layer in layers] == [False] + [True] * (len(layers) - 1)


def test_layers_that_torch_cannot_compile_name_the_key(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    def fails(forward: object, **options: object) -> object:
        def compiled(*args: object, **kwargs: object) -> None:
            raise torch._dynamo.exc.TorchDynamoException("no such instruction\nand so on")

        return compiled

    monkeypatch.setattr(torch, "compile", fails)
    model = add_lora(load_base(tiny_llama, Config(), CPU), Lora(r=4), "m")
    compile_layers(model)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 9)[None])

    with pytest.raises(UserError, match=r"performance\.compile: .*\(no such instruction\)\. Set it to false"):
        model(input_ids=torch.arange(5, 9)[None])


@pytest.mark.slow
@pytest.mark.parametrize("keep_weights", [True, False])
def test_compiled_training_takes_the_same_course_in_fp32(tiny_llama: Path, keep_weights: bool) -> None:
    """Batches of other sizes and lengths are no new compilation, and a pass without gradients compiles nothing."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(5, 500, shape, generator=generator) for shape in ((3, 24), (2, 31), (4, 17), (3, 40))]

    def course(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = add_lora(load_base(tiny_llama, Config(), CPU), Lora(r=4), "m")
        speed_up(model, keep_weights)
        if compiled:
            compile_layers(model)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.5)
        losses = []
        for ids in batches:
            mask = torch.ones_like(ids)
            mask[0, :5] = 0
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask)
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(weight.detach() for weight in weights)]

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    quick = course(True)
    assert counters["stats"]["unique_graphs"] == 1
    slow = course(False)

    count = len(batches)
    assert apart(quick[:count], slow[:count]) < ROUNDING[torch.float32] / 10
    assert apart(quick[count:], slow[count:]) < ROUNDING[torch.float32]
    assert slow[0] - slow[3] != 0
    assert any(weight.abs().max() > 1e-3 for weight in slow[count:])


@pytest.mark.slow
def test_code_compiled_for_other_vectors_is_not_taken_up(tmp_path: Path) -> None:
    """As from a cache that processors of several kinds share; here the instruction sets are masked."""
    losses = []
    for masked in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        done = run_python("-c", TRAIN_COMPILED, str(tmp_path / "m"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), OMP_NUM_THREADS="1", **masked)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append(float(done.stdout.split()[-1]))

    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


TRAIN_COMPILED = """
import sys, torch
from pathlib import Path
from tests.speed.test_compiling import CPU, Config, Lora, add_lora, compile_layers, load_base, save_tiny_model, speed_up
folder = Path(sys.argv[1])
model = add_lora(load_base(folder if folder.is_dir() else save_tiny_model(folder), Config(), CPU), Lora(r=4), "m")
speed_up(model)
compile_layers(model)
ids = torch.arange(5, 29).repeat(3, 1)
loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
loss.backward()
print(loss.item())
"""
