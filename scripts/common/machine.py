"""What the machine offers and how this process uses it: device, dtype, threads, allocator, seed."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.common.distributed import local_world_size, sharding_engine
from scripts.common.errors import UserError
from scripts.common.paths import ROOT
from scripts.common.schema import Config

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# glibc gives blocks of a few megabytes back to the kernel at once and faults them in again at the next step: 17 to 23 %
# of a CPU training step. So keep them, but let larger ones go: kept, blocks of ever different sizes (logits) would
# tear holes into the heap, which then grows without end. M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h.
M_MMAP_THRESHOLD = -3
MALLOC_SETTINGS = ((M_MMAP_THRESHOLD, 32 * 2**20), (-1, 2**31 - 1), (-2, 64 * 2**20))

BF16_PROCESSORS = ("AMX", "AVX512-BF16")

# By whether Apple's GPU is there. The proofs of this project were never run on one, so nothing is trained on it.
NO_GPU = {False: "no GPU", True: "Apple's GPU (mps) is not used, since nothing here is proven on it"}


@dataclass(frozen=True)
class Machine:
    """The choices of one run and the reason for each."""

    device: str
    dtype: torch.dtype
    threads: int
    world_size: int
    reasons: tuple[str, ...]


def prepare_environment(config: Config) -> None:
    """Set what libraries read at import; call it before importing torch or transformers."""
    # Waiting threads spin for some 20 microseconds and then sleep. Without the spin each of a step's thousands of small
    # operations waits for a thread to wake; with GNU's usual milliseconds, a machine that does anything else is five times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # What was compiled once is taken from here by the next run. torch's own place, below /tmp, may be another user's.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "outputs" / ".compiled"))
    if config.offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def choose_machine(config: Config) -> Machine:
    """Choose device, dtype and threads, and say why."""
    import torch

    wanted = config.performance
    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise UserError("performance.device: found cuda, but torch sees no GPU. Use auto or cpu.")
    device = "cuda" if wanted.device != "cpu" and torch.cuda.is_available() else "cpu"
    reasons = [
        f"device {device}: "
        + ("asked for" if wanted.device != "auto" else "a GPU is there" if device == "cuda" else NO_GPU[has_mps()])
    ]
    fast, why = bf16_support(device)
    if wanted.dtype == "auto":
        dtype = torch.bfloat16 if fast else torch.float32
        reasons.append(f"base weights in {str(dtype).removeprefix('torch.')}: {why}")
    else:
        dtype = torch.bfloat16 if wanted.dtype == "bf16" else torch.float32
        reasons.append(f"base weights in {str(dtype).removeprefix('torch.')}: asked for")
        if dtype == torch.bfloat16 and device == "cpu" and not fast:
            log.warning("performance.dtype: found bf16, but %s: a step takes 25 to 30 times as long as in fp32", why)
    threads = available_cores() if wanted.threads == "auto" else wanted.threads
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        reasons.append(f"{world_size} processes, {local_world_size()} of them on this machine")
    return Machine(device, dtype, threads, world_size, tuple(reasons))


def check_launch(config: Config, machine: Machine) -> None:
    """Refuse a start in which processes, GPUs or sharding would be left out without a word."""
    import torch

    sharded = sharding_engine()
    if sharded and machine.device == "cpu":
        raise UserError("accelerate shards models over GPUs only. On a CPU start with torchrun, without a launch file.")
    if sharded == "FSDP" and os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            "FSDP version 1 wants one dtype for base and adapter. Set fsdp_version: 2 (configs/accelerate/fsdp2.yaml)."
        )
    if sharded and (config.quantization.load_in_4bit or config.quantization.load_in_8bit):
        raise UserError(
            "quantization: a 4- or 8-bit base cannot be split over processes. Use configs/accelerate/ddp.yaml, or set it to false."
        )
    if machine.world_size > 1:
        return
    # For a CPU `accelerate launch --num_processes N` sets the address of a group and then starts one process.
    if machine.device == "cpu" and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise UserError(
            "accelerate launch always starts a single process on a CPU. "
            "Use `torchrun --nproc_per_node N -m scripts.…` there."
        )
    if machine.device == "cuda" and torch.cuda.device_count() > 1:
        raise UserError(
            f"this machine shows {torch.cuda.device_count()} GPUs, and one process uses one. Start one process for each with "
            f"`torchrun --nproc_per_node {torch.cuda.device_count()} -m scripts.…`, or choose one with CUDA_VISIBLE_DEVICES=0."
        )


def bf16_support(device: str) -> tuple[bool, str]:
    """Say whether the device multiplies matrices in bf16, and how that was found."""
    import torch

    if device == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return supported, f"the GPU {'computes' if supported else 'does not compute'} in bf16"
    kind = kind_of_processor()
    if kind in BF16_PROCESSORS:
        return True, f"the CPU has {kind}"
    return False, f"there is neither {' nor '.join(BF16_PROCESSORS)} to use"


def kind_of_processor() -> str:
    """Name what multiplies matrices here: AMX or AVX512-BF16, which take bf16, else the instructions torch chose, as AVX2."""
    import torch

    have = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    # oneDNN may be kept from using what the CPU has (ONEDNN_MAX_CPU_ISA). Only builds for these CPUs can be asked.
    if any(have) and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return BF16_PROCESSORS[have.index(True)]
    return torch.backends.cpu.get_cpu_capability()


def has_mps() -> bool:
    """Say whether torch sees the GPU of an Apple processor."""
    import torch

    return torch.backends.mps.is_available()


def available_cores() -> int:
    """Count the cores this process may use: OMP_NUM_THREADS, else what the scheduler gives it."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())


def hardware() -> str:
    """Name the hardware for people who compare figures."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU used"
    cpu = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    return f"{available_cores()} cores of {cpu}, {bf16_support('cpu')[1]}, {gpu}"


def apply_machine(machine: Machine) -> None:
    """Set threads and allocator for this process."""
    import torch

    torch.set_num_threads(machine.threads)
    _set_allocator(MALLOC_SETTINGS)
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        log.info("the launcher's mixed precision is not used: performance.dtype decides")
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if machine.device == "cuda":  # each process of a machine takes a GPU of its own
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def give_freed_memory_back() -> None:
    """Let large blocks go back to the system when they are freed, where training keeps them for the next step."""
    _set_allocator(((M_MMAP_THRESHOLD, 2**20),))


def empty_heap() -> None:
    """Give back what is free in memory that the allocator keeps, and with it the holes between blocks of all sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def _set_allocator(settings: tuple[tuple[int, int], ...]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            for parameter, value in settings:
                libc.mallopt(parameter, value)


def seed_everything(seed: int) -> None:
    """Seed every generator; call it before an adapter is created, whose weights start at random."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def peak_memory_gib() -> float:
    """Return the most memory this process has held so far (device memory on a GPU)."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_gib()


def peak_resident_gib(*, of_children: bool = False) -> float:
    """Return the most main memory this process has held so far; or, where it is more, any one of its ended children."""
    if sys.platform == "win32":  # which keeps no such figure for children
        import psutil

        return float(psutil.Process().memory_info().peak_wset / 2**30)
    import resource

    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) if of_children else (resource.RUSAGE_SELF,)
    peak = max(resource.getrusage(who).ru_maxrss for who in whose)
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
