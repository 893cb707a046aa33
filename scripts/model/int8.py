"""Weights in 8 bits, for answers only: each row of a matrix as whole numbers from -127 to 127, and one scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.common.machine import Machine
from scripts.common.schema import Config
from scripts.model.products import HeadLinear, become_embedding, linear

# Up to so many tokens, torch's product reads the rows as they are. More are multiplied with rows widened on the way.
FEW_TOKENS = 32
WIDENED_ROWS = 4096  # at once, so that a large vocabulary is never held in full
KERNEL_WIDTH = 32  # of whose multiples torch's product takes inputs; of others it reads past the end
SCALE_DTYPE = torch.bfloat16  # in fp32 and fp16 torch's product is several times slower


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix (O, I) as whole numbers and the scale of each row (O,)."""
    wide = weight.detach().float()
    scales = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(SCALE_DTYPE)
    return (wide / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def product(x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return x Wᵀ of rounded rows, (…, O). Both ways round what they read and give to bf16, so that a row may change over."""
    tokens = x.reshape(-1, x.shape[-1]).to(SCALE_DTYPE)
    if len(tokens) <= FEW_TOKENS and rows.shape[1] % KERNEL_WIDTH == 0:
        y = torch._weight_int8pack_mm(tokens, rows, scales)
    else:
        wide = tokens.to(x.dtype)
        y = torch.cat([linear(wide, part.to(x.dtype)) for part in rows.split(WIDENED_ROWS)], 1) * scales.to(x.dtype)
        y = y.to(SCALE_DTYPE)
    return y.to(x.dtype).view(*x.shape[:-1], len(rows))


class Int8Linear(nn.Linear):
    """A linear layer whose matrix is rounded: y = x Wᵀ + b. It has no `weight`."""

    rows: torch.Tensor
    scales: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = product(input, self.rows, self.scales)
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Embedding):
    """An embedding whose matrix is rounded. Its `weight` is empty, and only says of which type it was."""

    rows: torch.Tensor
    scales: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.rows[input].to(self.weight.dtype) * self.scales[input].to(self.weight.dtype)[..., None]


def check_int8(config: Config, machine: Machine, key: str) -> None:
    """Refuse int8 weights on a GPU, and of a base that is quantised already.

    Raises: UserError that begins with the key.
    """
    if machine.device != "cpu":
        raise UserError(
            f"{key}: these products are computed on a CPU only, and the device is {machine.device}. Leave the weights full, "
            "with quantization.load_in_8bit: true for a smaller base, or set performance.device: cpu."
        )
    for other in ("load_in_4bit", "load_in_8bit"):
        if getattr(config.quantization, other):
            raise UserError(f"{key}: the base is quantised already (quantization.{other}). Set one of the two.")


def keep_in_int8(network: Any, key: str) -> None:
    """Round all matrices of a network where they stand, and let the full ones go; adapters of PEFT stay as they are.

    The head and the embeddings are one matrix where they were one before.
    Raises: UserError that begins with the key, for a matrix that is neither a plain linear layer's nor an embedding's and
    for a DoRA adapter, which asks for the full weights; then all is as before.
    """
    if any("lora_magnitude_vector" in name for name, _ in network.named_parameters()):
        raise UserError(f"{key}: a DoRA adapter needs the full weights. Merge it, or leave the weights full.")
    layers = {name: module for name, module in network.named_modules() if "lora_" not in name}
    taken = {name: module for name, module in layers.items() if _is_taken(module)}
    for name, module in layers.items():
        left = [of for of, weight in module.named_parameters(recurse=False) if weight.ndim > 1]
        if name not in taken and left:
            raise UserError(
                f"{key}: linear layers and embeddings can be rounded, and this base has another kind of matrix: "
                f"{name}.{left[0]} of {type(module).__name__}. Leave the weights full."
            )
    embeddings, head = (
        getattr(module, "base_layer", module)  # under an adapter
        for module in (network.get_input_embeddings(), network.get_output_embeddings())
    )
    tied = head.weight is embeddings.weight
    for module in taken.values():
        if tied and module is head:
            continue
        rows, scales = rounded(module.weight)
        if isinstance(module, nn.Embedding):
            become_embedding(module, Int8Embedding, rows=rows, scales=scales)
        else:
            module.__class__ = Int8Linear
            _keep(module, rows, scales)
    if tied:
        head.__class__ = Int8Linear
        _keep(head, embeddings.rows, embeddings.scales)


def is_in_int8(network: Any) -> bool:
    """Return whether the matrices of a network are rounded."""
    return any(isinstance(module, (Int8Linear, Int8Embedding)) for module in network.modules())


def _is_taken(module: Any) -> bool:
    return type(module) in (nn.Linear, HeadLinear) or isinstance(module, nn.Embedding)


def _keep(module: Any, rows: torch.Tensor, scales: torch.Tensor) -> None:
    del module.weight
    module.__dict__.pop("packed", None)  # the same in 16 bits
    module.register_buffer("rows", rows, persistent=False)
    module.register_buffer("scales", scales, persistent=False)
