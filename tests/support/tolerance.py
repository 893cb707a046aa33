"""Tell rounding, which depends on the processor, from an error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}  # a wrong term or scale is 1e-2 and more apart


def apart(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Return the largest L2 norm of a difference, relative to that of `theirs`, or to a tenth of the largest of these.

    A gradient that is nearly zero, as of saturated attention, is mostly rounding in fp32; float64 shows an error in it.
    """
    norms = [float(tensor.double().norm()) for tensor in theirs]
    differences = [float((a.double() - b.double()).norm()) for a, b in zip(ours, theirs, strict=True)]
    floor = max(norms) / 10
    return max(difference / max(norm, floor) for difference, norm in zip(differences, norms, strict=True))
