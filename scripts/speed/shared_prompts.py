"""Let the chosen and the rejected answer of a pair stand in one row behind their prompt, which is then computed once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from scripts.model.shape import ModelShape
from scripts.speed.attention import PLAIN_ATTENTION
from scripts.speed.guard import distance

log = logging.getLogger(__name__)

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
PROVEN_ON_PAIRS = 2
TOLERANCE = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.bfloat16: 0.15,
    torch.float16: 0.15,
}  # rounding alone makes 0.02


@dataclass(frozen=True)
class Layout:
    """Where each token of a batch [chosen; rejected] lies in rows of prompt, chosen and rejected answer, and back.

    Shapes: source and positions (B, W), mask (B, 1, W, W) to be added to attention scores, back (2B, T).
    """

    source: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    back: torch.Tensor


def lay_out(input_ids: torch.Tensor, attention_mask: torch.Tensor, dtype: torch.dtype) -> Layout:
    """Plan rows for a batch that is padded on the right: the tokens that both halves begin with are their prompt."""
    # A pair of one prompt token P, one chosen token C and one rejected token R makes one row of three tokens:
    #
    #     input_ids  P C       source     P C R = flattened ids 0, 1, 3        mask       key P  C  R
    #                P R       positions  0 1 1, as in the rows apart          query P    yes -  -
    #                                                                                C    yes yes -
    #     back       0 1 = where each token of the first row now lies                R    yes -  yes
    #                0 2 = and of the second
    pairs, width = len(input_ids) // 2, input_ids.shape[1]
    lengths = attention_mask.sum(1)
    chosen, rejected = lengths[:pairs, None], lengths[pairs:, None]
    same = (input_ids[:pairs] == input_ids[pairs:]) & (attention_mask[:pairs] * attention_mask[pairs:] == 1)
    prompt = same.cumprod(1).sum(1, keepdim=True)
    total = chosen + rejected - prompt
    column = torch.arange(int(total.max()), device=input_ids.device)[None]
    of_rejected, used = column >= chosen, column < total
    positions = torch.where(of_rejected, column - chosen + prompt, column) * used
    row = torch.arange(pairs, device=input_ids.device)[:, None]
    source = (row + pairs * (of_rejected & used)) * width + positions
    causal = column[:, None] <= column[..., None]  # (1, W, W): key at or before query
    other_answer = of_rejected[:, :, None] & ((column >= prompt) & ~of_rejected)[:, None]
    allowed = causal & used[:, None] & ~other_answer
    mask = torch.zeros(allowed.shape, dtype=dtype, device=input_ids.device)
    mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    token = torch.arange(width, device=input_ids.device)[None]
    in_rejected = torch.where(token < prompt, token, token - prompt + chosen)
    in_row = torch.cat([token.expand(pairs, -1), in_rejected]).clamp(max=column.shape[1] - 1)  # padding lies anywhere
    back = in_row + row.repeat(2, 1) * column.shape[1]
    return Layout(source, positions, mask[:, None], back)


class SharedPrompts:
    """Rearranges what a model's decoder is given, and puts its hidden states back, while it is at work.

    All is exact: a token attends to the same tokens at the same positions. Prompts are a fifth of what DPO computes, and
    answers of unequal length no longer pad each other.
    """

    def __init__(self, model: Any, sample: dict[str, torch.Tensor]) -> None:
        self.decoder = model.get_base_model().base_model
        self.window = ModelShape.of(self.decoder.config).window
        self.back: torch.Tensor | None = None
        self.active = False
        self.possible = self._known()
        if self.possible:
            self.decoder.register_forward_pre_hook(self._rearrange, with_kwargs=True)
            self.decoder.register_forward_hook(self._put_back)
            self.possible = self._proven(sample)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Take every forward pass within for one of pairs: [chosen; rejected], padded on the right."""
        self.active = self.possible
        try:
            yield
        finally:
            self.active = False

    def _known(self) -> bool:
        """Return whether all layers mix tokens by attention that heeds a mask."""
        config = self.decoder.config.get_text_config(decoder=True)
        return (
            config._attn_implementation == PLAIN_ATTENTION
            and "position_ids" in inspect.signature(self.decoder.forward).parameters
            and set(getattr(config, "layer_types", None) or KNOWN_LAYERS) <= KNOWN_LAYERS
        )

    @torch.no_grad()
    def _proven(self, sample: dict[str, torch.Tensor]) -> bool:
        """Compare both ways on the first pairs of a batch; a model for which they differ keeps its two rows per pair."""
        batch: dict[str, Any] = {"use_cache": False}
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.cat([side[:PROVEN_ON_PAIRS] for side in sample[name].chunk(2)])
        real, training = batch["attention_mask"] == 1, self.decoder.training
        self.decoder.eval()
        two_rows = self.decoder(**batch).last_hidden_state[real]
        with self.at_work():
            one_row = self.decoder(**batch).last_hidden_state[real]
        self.decoder.train(training)
        apart = distance(one_row, two_rows)
        if not apart <= TOLERANCE[two_rows.dtype]:
            log.warning("this model does not compute a prompt once for both of its answers alike (%.2g apart)", apart)
            return False
        return True

    def _rearrange(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self.back = None
        if not self.active:
            return None
        inputs = dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)) | kwargs
        layout = lay_out(inputs["input_ids"], inputs["attention_mask"], decoder.dtype)
        if self.window and layout.source.shape[1] > self.window:
            return None
        self.back = layout.back
        inputs["input_ids"] = inputs["input_ids"].flatten()[layout.source]
        inputs["attention_mask"], inputs["position_ids"] = layout.mask, layout.positions
        return (), inputs

    def _put_back(self, decoder: Any, args: Any, output: Any) -> Any:
        if self.back is not None:
            output.last_hidden_state = self._in_two_rows(output.last_hidden_state).view(*self.back.shape, -1)
            if getattr(output, "router_logits", None) is not None:  # the routers' loss counts tokens as in two rows
                output.router_logits = tuple(self._in_two_rows(logits) for logits in output.router_logits)
        return output

    def _in_two_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return what each token of the two rows has among values of the tokens of one row, as (2B * T, …)."""
        assert self.back is not None
        return values.flatten(0, -2).index_select(0, self.back.flatten())
