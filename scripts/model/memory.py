"""Estimate the peak memory of a LoRA training run before anything is loaded."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from scripts.common.distributed import local_world_size, shard_count
from scripts.common.schema import Config
from scripts.model.shape import ModelShape

GIB = 2**30
LIBRARIES_GIB = 0.9  # torch, transformers, TRL and MLflow in one CPU process
# Values kept for the backward pass, per token and layer: multiples of the hidden and the intermediate size.
EAGER_VALUES, GPU_VALUES, COMPILED_VALUES = (16, 5), (12, 4), (11, 3.5)
PLAINLY_ATTENDED = 16 * 512**2  # tokens that tokens attend to in a batch: 8 rows of 724, 16 of 512
SAFETY_RATIO = 0.9  # of what is free
NF4_BYTES, INT8_BYTES = 0.52, 1.01  # per weight, with its share of the scales


def attends_plainly(sequences: int, longest: int) -> bool:
    """Tell whether a CPU trains with plain attention (speed/attention.py), whose weights are kept for the backward pass."""
    return sequences * longest**2 <= PLAINLY_ATTENDED


@dataclass(frozen=True)
class MemoryEstimate:
    """Where the memory of a run goes, in GiB."""

    weights: float
    adapter: float
    activations: float
    logits: float
    libraries: float

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.logits + self.libraries

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in vars(self).items())
        return f"about {self.total:.1f} GiB ({parts})"


def parameter_count(folder: Path, *, of_decoder_matrices: bool = False) -> int:
    """Count a model's parameters, or those that quantisation shrinks, from the headers of its safetensors."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            matrix = len(entry.get("shape", ())) == 2 and re.search(r"\.\d+\.", name)
            if name != "__metadata__" and (matrix or not of_decoder_matrices):
                total += math.prod(entry["shape"])
    return total


def estimate_memory(
    folder: Path,
    config: Config,
    *,
    sequences: int,
    longest: int,
    answer_tokens: int,
    bytes_per_value: int,
    cpu: bool,
    checkpointing: bool,
    compiled: bool,
    keep_weights: bool = True,
) -> MemoryEstimate:
    """Estimate a run's peak from the model's shape and its largest batch.

    That is its largest forward pass: so many sequences, padded to the tokens of the longest, with so many answer tokens. For
    `keep_weights` see speed/attention.py.
    """
    shape = ModelShape.of_folder(folder)
    layers, hidden, intermediate = shape.layers, shape.hidden, shape.intermediate
    weight_bytes = float(parameter_count(folder) * bytes_per_value)
    if config.quantization.load_in_4bit or config.quantization.load_in_8bit:
        shrunk = NF4_BYTES if config.quantization.load_in_4bit else INT8_BYTES
        weight_bytes -= parameter_count(folder, of_decoder_matrices=True) * (bytes_per_value - shrunk)
    adapter_parameters = layers * config.lora.r * (8 * hidden + 3 * (hidden + intermediate))
    of_hidden, of_intermediate = COMPILED_VALUES if compiled else EAGER_VALUES if cpu else GPU_VALUES
    per_layer = of_hidden * hidden + of_intermediate * intermediate
    kept = (layers * hidden + per_layer) if checkpointing else layers * per_layer
    attended = 0
    if cpu and config.performance.fast_path and attends_plainly(sequences, longest):
        attended = sequences * shape.heads * longest**2 * (layers if keep_weights and not checkpointing else 1)
    return MemoryEstimate(
        weights=weight_bytes / shard_count() / GIB,
        adapter=adapter_parameters * 16 / GIB,  # fp32 weight, gradient and two Adam moments
        activations=(sequences * longest * kept + attended) * bytes_per_value / GIB,
        logits=answer_tokens * shape.vocab * bytes_per_value * 2 / GIB,  # and their gradient
        libraries=LIBRARIES_GIB if cpu else 0.0,
    )


def available_memory_gib(device: str) -> float:
    """Return this process's part of the free memory of the device, heeding a container's limit."""
    import psutil
    import torch

    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0] / GIB)
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
    except OSError:  # no container, or one without limits
        limit = used = "max"
    if limit != "max":
        free = min(free, int(limit) - int(used))
    return float(free / local_world_size() / GIB)
