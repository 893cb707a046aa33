"""Estimate how many minutes a stage takes on this machine: by a short matrix product, and by runs that were measured."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.common.machine import available_cores

# What training reaches per core, as a share of numpy's fp32 product on one core: by the demo's run on an EPYC with
# AVX512-BF16 (eval/benchmarks/demo.json) and the benchmark on a Xeon with AMX (eval/benchmarks/README.md).
REACHED = {"AMX": 1.6, "AVX512-BF16": 0.9, "fp32": 0.45}
FLOPS_TRAINED, FLOPS_READ = 4, 2  # for each parameter and token: an adapter's training needs no gradients of the base
START_SECONDS = 25  # libraries, loading, saving
# Writing answers token by token is bound by memory: the demo's comparison wrote 18,000 tokens of a 135M model in 200 s.
WRITTEN_SECONDS = 200 / 18_000 / 135e6


@dataclass(frozen=True)
class Speed:
    """How fast this machine trains."""

    flops: float  # per second; 0 where nothing is known
    how: str

    def training_seconds(self, parameters: int, tokens: float, read: float = 0) -> float:
        """Estimate a run that trains on so many tokens, of all epochs, and reads others without training."""
        return START_SECONDS + parameters * (FLOPS_TRAINED * tokens + FLOPS_READ * read) / self.flops

    def training(self, parameters: int, tokens: float, read: float = 0) -> str:
        """Say how long a training run takes; nothing where nothing is known."""
        return in_words(self.training_seconds(parameters, tokens, read)) if self.flops else ""

    def comparing(self, parameters: int, prompts: int, answer_tokens: float, models: int) -> str:
        """Say how long a comparison of so many models takes."""
        written = WRITTEN_SECONDS * parameters * prompts * answer_tokens * models
        return in_words(START_SECONDS + written) if self.flops else ""


def in_words(seconds: float) -> str:
    """Say a duration as an estimate is to be read."""
    minutes = seconds / 60
    if minutes > 90:
        return f"about {minutes / 60:.0f} hours"
    return f"about {max(1, round(minutes))} minute{'s' * (round(minutes) > 1)}"


def measure_speed() -> Speed:
    """Multiply two matrices for a moment."""
    if shutil.which("nvidia-smi"):
        return Speed(0.0, "a GPU is here, whose speed is not estimated: expect a few minutes at most for a small model")
    import numpy
    from threadpoolctl import threadpool_limits

    side = 768
    matrix = numpy.ones((side, side), numpy.float32)
    seconds = []
    with threadpool_limits(
        1
    ):  # on a busy machine several threads wait for each other, and the best of a few says nothing
        for _ in range(12):
            started = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - started)
    product = 2 * side**3 / min(seconds) * available_cores()
    kind = _bf16_kind()
    how = f"times are estimates: a matrix product runs at {product / 1e9:.0f} GFLOP/s here, and runs were measured on a CPU with {kind}"
    return Speed(product * REACHED[kind], how if kind != "fp32" else how.replace("with fp32", "without bf16"))


def _bf16_kind() -> str:
    """Name how the CPU multiplies in bf16, as Linux lists its features; elsewhere nothing is assumed."""
    try:
        features = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "fp32"
    return "AMX" if "amx_bf16" in features else "AVX512-BF16" if "avx512_bf16" in features else "fp32"
