"""Estimate the peak memory of a LoRA training run before anything is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.common.distributed import local_world_size, shard_count
from scripts.common.schema import Config
from scripts.model.shape import ModelShape

GIB = 2**30
LIBRARIES_GIB = 1.05  # torch, transformers, TRL and MLflow in one CPU process
# What a step takes beside the values kept for its backward pass: gradients, and holes in the heap of an uncompiled CPU run.
EAGER_SHARE, GPU_SHARE, COMPILED_SHARE = 1.3, 1.1, 1.0
TILE_BYTES = 512 * 2**20  # of logits that are kept together (speed/answer_head.py); what lies beyond is computed again
PLAINLY_ATTENDED = 16 * 512**2  # tokens that tokens attend to in a batch: 8 rows of 724, 16 of 512
LEAN_KEPT_KEYS = 512  # weights of tokens that see more are computed again (speed/lean_decoder.py)
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
    loading: float  # the mapped weight files, which are gone before the first step

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.libraries + max(self.activations + self.logits, self.loading)

    def __str__(self) -> str:
        of_step = {name: value for name, value in vars(self).items() if name != "loading"}
        parts = ", ".join(f"{name} {value:.1f}" for name, value in of_step.items())
        while_loading = f"; while it loads {self.loading:.1f} instead of activations and logits"
        more = while_loading if self.loading > self.activations + self.logits else ""
        return f"about {self.total:.1f} GiB ({parts}{more})"


def parameter_count(folder: Path, *, of_decoder_matrices: bool = False) -> int:
    """Count a model's parameters, or those that quantisation shrinks, from the headers of its safetensors."""
    return sum(
        math.prod(shape)
        for name, shape in _tensors(folder)
        if not of_decoder_matrices or (len(shape) == 2 and re.search(r"\.\d+\.", name))
    )


def _tensors(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def kept_values(folder: Path, shape: ModelShape, rank: int, bytes_per_value: int, lean: bool = False) -> float:
    """Count the values that one decoder layer with adapters keeps of a token for the backward pass.

    The factors are those of Llama, Qwen 3 and Gemma 3, counted by torch's hooks for saved tensors; `lean` is the decoder of
    speed/lean_decoder.py.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # A norm of 16-bit values keeps one copy in fp32. There are two to a layer, and in some families four, or some for each head.
    of_norm = 2 if bytes_per_value == 2 else 1
    norms = [
        (queries if "q_" in name else keys) if size == [shape.head_dim] else size[0]
        for name, size in _tensors(folder)
        if len(size) == 1 and re.search(r"\.0\.(?!.*bias).*(norm|ln_)", name) and not re.search("vision|audio", name)
    ]
    normed = sum(norms) or 2 * shape.hidden  # a folder without safetensors
    if lean:  # each norm keeps what it read; what follows it keeps its output
        return 2 * shape.hidden + normed + 2 * (queries + keys) + 3 * shape.intermediate + 7 * rank
    return 3.5 * shape.hidden + 2 * (queries + keys) + of_norm * normed + 4 * shape.intermediate + 7 * rank


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
    lean: bool = False,
) -> MemoryEstimate:
    """Estimate a run's peak from the model's shape and its largest batch.

    That is its largest forward pass: so many sequences, padded to the tokens of the longest, with so many answer tokens. For
    `keep_weights` see speed/attention.py, for `lean` speed/lean_decoder.py.
    """
    shape = ModelShape.of_folder(folder)
    layers, hidden, intermediate = shape.layers, shape.hidden, shape.intermediate
    fast_cpu = cpu and config.performance.fast_path
    weight_bytes = float(parameter_count(folder) * bytes_per_value)
    if config.quantization.load_in_4bit or config.quantization.load_in_8bit:
        shrunk = NF4_BYTES if config.quantization.load_in_4bit else INT8_BYTES
        weight_bytes -= parameter_count(folder, of_decoder_matrices=True) * (bytes_per_value - shrunk)
    adapter_parameters = layers * config.lora.r * (8 * hidden + 3 * (hidden + intermediate))
    share = COMPILED_SHARE if compiled else EAGER_SHARE if cpu else GPU_SHARE
    per_layer = kept_values(folder, shape, config.lora.r, bytes_per_value, lean) * share
    kept = (layers * hidden + per_layer) if checkpointing else layers * per_layer
    attended = 0
    if lean and cpu:
        attended = sequences * shape.heads * min(longest, LEAN_KEPT_KEYS) ** 2 * (1 if checkpointing else layers)
    elif fast_cpu and attends_plainly(sequences, longest):
        attended = sequences * shape.heads * longest**2 * (layers if keep_weights and not checkpointing else 1)
    logit_bytes = answer_tokens * shape.vocab * bytes_per_value
    packed_head = (
        shape.vocab * hidden * bytes_per_value if cpu and bytes_per_value == 2 else 0
    )  # by torch's bf16 products
    return MemoryEstimate(
        weights=weight_bytes / shard_count() / GIB,
        adapter=adapter_parameters * 16 / GIB,  # fp32 weight, gradient and two Adam moments
        activations=(sequences * longest * kept + attended) * bytes_per_value / GIB,
        logits=((min(logit_bytes, TILE_BYTES) if fast_cpu else logit_bytes) * 2 + packed_head)
        / GIB,  # and their gradient
        libraries=LIBRARIES_GIB if cpu else 0.0,
        loading=sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GIB if cpu else 0.0,
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
