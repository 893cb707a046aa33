"""The right values: the libraries' plain model, one sequence at a time without padding or cache, and our own formulas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional


def plain_model(base: Path, adapter: Path | None = None, *, trainable: bool = False) -> Any:
    """Load a base as transformers does and an adapter as PEFT does; its attention is written out, not a kernel."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    return model.eval()


def logps_of(model: Any, ids: Sequence[int], trained: Sequence[bool]) -> torch.Tensor:
    """Return the log-probability of each trained token of one sequence."""
    logps = torch.log_softmax(model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :-1].float(), -1)
    places = [place for place in range(len(ids) - 1) if trained[place + 1]]
    return logps[places, [ids[place + 1] for place in places]]


def dpo_loss(policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], beta: float) -> torch.Tensor:
    """Return the loss of one pair (Rafailov et al. 2023, equation 7) from the logps of its chosen and rejected tokens."""
    gains = [ours.sum() - theirs.sum().detach() for ours, theirs in zip(policy, reference, strict=True)]
    return -functional.logsigmoid(beta * (gains[0] - gains[1]))


def routers_loss(model: Any, sequences: Sequence[Sequence[int]]) -> torch.Tensor | float:
    """Return what a mixture's routers add to a loss (Fedus et al. 2022, equations 4 to 6) for the tokens of a batch."""
    config = model.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", 0.0) if hasattr(config, "output_router_logits") else 0.0
    if not weight or not any("Router" in type(module).__name__ for module in model.modules()):
        return 0.0
    logits = [
        layer
        for ids in sequences
        for layer in model(
            input_ids=torch.tensor([list(ids)]), output_router_logits=True, use_cache=False
        ).router_logits
    ]
    shares = torch.softmax(torch.cat(logits), -1)  # (tokens of all layers, experts)
    chosen = torch.zeros_like(shares).scatter(1, shares.topk(config.num_experts_per_tok).indices, 1.0)
    return weight * shares.shape[1] * (chosen.mean(0) * shares.mean(0)).sum()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return what a backward pass left at the weights of the adapter that trains."""
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


@torch.no_grad()
def greedy(model: Any, ids: Sequence[int], new: int, stops: set[int]) -> list[int]:
    """Return the likeliest token again and again, up to a stop, which is left out."""
    answer: list[int] = []
    for _ in range(new):
        logits = model(input_ids=torch.tensor([[*ids, *answer]]), use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token in stops:
            break
        answer.append(token)
    return answer
