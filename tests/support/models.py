"""A tiny base in memory: load it, ask it, train it a little."""

from __future__ import annotations

from pathlib import Path

import torch

from scripts.common.machine import Machine
from scripts.common.schema import Config
from scripts.model.base import load_base

CPU = Machine("cpu", torch.float32, 1, 1, ())


IDS = torch.arange(3, 43).reshape(2, 20)


def load(folder: Path):
    """Load a tiny base in fp32."""
    return load_base(folder, Config(), CPU).eval()


def logits(model) -> torch.Tensor:
    """Return what the model says about fixed ids."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def take_steps(model, steps: int = 3) -> list[torch.Tensor]:
    """Train the adapter a little on fixed ids; return the last gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return [parameter.grad.clone() for parameter in parameters]
