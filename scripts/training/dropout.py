"""What a model leaves to chance while it trains (dropout, skipped layers, jitter at a router), and how to switch it off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch.nn.modules.dropout import _DropoutNd

CHANCE = re.compile("drop|jitter")  # in the names under which modules and configurations keep a probability or a width


def switch_off_dropout(model: Any) -> None:
    """Make a model in training mode compute what it computes in evaluation mode.

    TRL's own function reaches modules of the class Dropout only: not what OPT's layers hand to the function of that name, nor
    the layers that it skips, nor what Falcon reads from its configuration at each pass.
    """
    for owner, name, _ in _settings(model):
        setattr(owner, name, type(getattr(owner, name))(0))


def dropout_of(model: Any) -> dict[str, float]:
    """Return what a model leaves to chance, by the last part of its name."""
    return {label: float(getattr(owner, name)) for owner, name, label in _settings(model) if owner is not model.config}


def _settings(model: Any) -> Iterator[tuple[Any, str, str]]:
    """Yield each object that holds such a setting, the attribute and what to call it."""
    for path, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            yield module, "p", path.rpartition(".")[2]
        for owner in (module, getattr(module, "config", None)):
            for name, value in list(getattr(owner, "__dict__", {}).items()):
                if type(value) in (int, float) and 0 < value <= 1 and CHANCE.search(name):
                    yield owner, name, name
