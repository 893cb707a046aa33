"""Compile the decoder layers of a training run, when the planned work repays the time that compiling takes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config
from scripts.model.memory import parameter_count
from scripts.model.shape import ModelShape

log = logging.getLogger(__name__)

# Two cores compile for 25 to 50 s. With AMX or AVX512-BF16 they train at 0.3 to 0.6 · 10¹² FLOP/s and save a third of a step;
# with AVX2 alone at 0.17 · 10¹² FLOP/s, and save a tenth. Both have the time back after about as much work.
REPAID_FROM_FLOP = 8e13
TRIAL = """#include <omp.h>
#include <vector>
extern "C" int threads() {
  std::vector<int> seen(64);
  #pragma omp parallel
  seen[omp_get_thread_num() % 64] = omp_get_num_threads();
  return seen[0];
}
"""
FLOP_PER_WEIGHT = 4  # and token: forward, and the gradient of the activations


def choose_compilation(
    config: Config, machine: Machine, base_folder: Path, lean: bool, tokens: float, tight: bool = False
) -> tuple[bool, str]:
    """Decide whether to compile, and say why; `tokens` are those this process will train on.

    Where memory is `tight`, compiled layers take less of it, at less cost than gradient checkpointing.

    The lean decoder is faster uncompiled than the library's compiled layers; only the answer head can then be compiled.

    The answer depends on plan and machine alone, never on a clock, so that a resumed run computes as it did before.
    Raises: UserError when it is asked for and cannot be.
    """
    setting = config.performance.compile
    if setting is False:
        return False, "layers not compiled: asked for"
    if setting == "auto" and machine.device != "cpu":
        return False, "layers not compiled: on a GPU only when asked for"
    obstacle = _obstacle(config)
    if setting is True:
        obstacle = obstacle or _compiler_fault()
        if obstacle:
            raise UserError(f"performance.compile: found true, but {obstacle}. Set it to auto or false.")
        return True, "answer head compiled: asked for" if lean else "layers compiled: asked for"
    if lean:
        return False, "layers not compiled: the lean decoder is faster without"
    if obstacle:
        return False, f"layers not compiled: {obstacle}"
    if tight:
        return True, "layers compiled: that takes less memory"
    flop = FLOP_PER_WEIGHT * parameter_count(base_folder) * tokens
    repaid = flop >= REPAID_FROM_FLOP
    if repaid and (fault := _compiler_fault()):
        return False, f"layers not compiled: {fault}"
    work = f"{flop / 1e12:.0f} TFLOP of work {'repay' if repaid else 'do not repay'} the time it takes"
    return repaid, f"layers {'' if repaid else 'not '}compiled: {work}"


def _obstacle(config: Config) -> str | None:
    if not config.performance.fast_path:
        return "performance.fast_path is off"
    if config.quantization.load_in_4bit or config.quantization.load_in_8bit:
        return "a quantised base cannot be"
    compiler = _compiler()
    asked = ["/help"] if compiler == "cl" else ["--version"]
    if not shutil.which(compiler) or subprocess.run([compiler, *asked], capture_output=True).returncode:
        return f"there is no working C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are not installed (Debian: python3-dev)"
    return None


def _compiler() -> str:
    return os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")


def _compiler_fault() -> str | None:
    """Build a small library as torch would: a compiler may be there and lack OpenMP, its linker or its environment."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cpp"
        source.write_text(TRIAL, encoding="utf-8")
        try:
            CppBuilder("trial", [str(source)], CppTorchOptions(warning_all=False), folder).build()
        except Exception as error:  # of several types, and torch's own are not public
            lines = str(error).splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "error:" in line.lower()), lines[0]).strip()
            return f"there is no working C++ compiler ({_compiler()}): {reason[:200]}"
    return None


def compile_layers(model: Any) -> None:
    """Compile the decoder layers for steps that train; what needs no gradient is computed as before.

    All layers share one compilation, made for any batch and length. The first layer is left alone: its input has no
    gradient, so it would need a second one.
    """
    base = model.get_base_model()
    count = ModelShape.of(base.config).layers
    lists = [module for module in base.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    if not lists:
        log.warning(
            "performance.compile: found no list of %d decoder layers in this model; it trains uncompiled", count
        )
        return
    for layer in list(lists[0])[1:]:
        layer.forward = _compiled_for_training(layer.forward)


def _compiled_for_training(forward: Any) -> Any:
    from torch._dynamo.exc import TorchDynamoException

    compiled = compile_for_this_processor(forward)

    def choose(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"performance.compile: torch cannot compile this model's layers here ({reason[:200]}). Set it to false."
            ) from error

    return choose


def compile_for_this_processor(function: Any) -> Any:
    """Compile for any batch and length.

    Torch 2.13 keeps compiled code in a folder without noting the width of the vectors that it was made for. Taken up by a
    processor with others, it gives NaN or a crash; named as an option, the width becomes a part of the key.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    width = pick_vec_isa().bit_width()
    return torch.compile(function, dynamic=True, options={"cpp.simdlen": width} if width else None)
