"""The engine's key-value cache: a slot for each row, how large it may be, and the proof that it changes no answer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import psutil
import torch

from scripts.common.errors import UserError, is_out_of_memory
from scripts.model.shape import ModelShape
from serve.adapters import Models, cannot_serve, proof_prompt

# How far logits may differ with the cache, relative to their size. A wrong mask or position changes them altogether;
# in 16 bits another order of summation changes them by some hundredths, and may choose other experts.
LARGEST_DIFFERENCE = {torch.float32: 0.01}
LARGEST_DIFFERENCE_16_BITS = 0.3


class SlotCache:
    """Keys and values of all rows: [slots, kv_heads, context, head_dim] per layer, allocated once.

    Running rows are kept together at the front, so that a step reads a view and gathers nothing.
    """

    def __init__(self, shape: ModelShape, slots: int, context: int, dtype: torch.dtype, device: str) -> None:
        size = (slots, shape.kv_heads, context, shape.head_dim)
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.slot_index = torch.arange(slots, device=device)
        self.first = self.last = self.used = 0
        self.positions = torch.zeros(0, dtype=torch.long, device=device)

    @staticmethod
    def bytes_needed(shape: ModelShape, slots: int, context: int, dtype: torch.dtype) -> int:
        """Return the memory that this cache would take."""
        return 2 * shape.layers * slots * shape.kv_heads * context * shape.head_dim * dtype.itemsize

    def select(self, first: int, positions: torch.Tensor, used: int) -> None:
        """Choose the rows of the next forward pass, the position of the first token of each, and how far it reads."""
        self.first, self.last = first, first + len(positions)
        self.positions, self.used = positions, used

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what a layer computed and return all it may look at; transformers calls this."""
        K, V, rows = self.keys[layer], self.values[layer], slice(self.first, self.last)
        width = keys.shape[2]
        if width == 1:  # one token for each row, at the row's own position
            K[self.slot_index[rows], :, self.positions] = keys[:, :, 0]
            V[self.slot_index[rows], :, self.positions] = values[:, :, 0]
        else:  # prompts from their beginning, or a piece of one
            K[rows, :, self.used - width : self.used] = keys
            V[rows, :, self.used - width : self.used] = values
        return K[rows, :, : self.used], V[rows, :, : self.used]

    def clear(self, slot: int) -> None:
        """Forget a row whose numbers went wrong: masked positions are weighted with 0, and 0 x NaN is NaN."""
        for K, V in zip(self.keys, self.values, strict=True):
            K[slot], V[slot] = 0, 0

    def get_seq_length(self, *_: Any) -> int:
        """Return 0: positions and mask are always given by the caller."""
        return 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row into another slot."""
        for K, V in zip(self.keys, self.values, strict=True):
            K[target, :, :length] = K[source, :, :length]
            V[target, :, :length] = V[source, :, :length]


def context_limit(shape: ModelShape, max_tokens: int) -> int:
    """Return how many tokens a row may hold: those asked for, or fewer where the model's positions or window end.

    Up to the smallest window a sliding layer sees all there is, so one mask serves every layer.
    """
    return min([max_tokens, *(limit for limit in (shape.positions, shape.window) if limit)])


def check_cache_fits(shape: ModelShape, slots: int, context: int, dtype: torch.dtype, device: str) -> int:
    """Return the bytes of the cache.

    Raises: UserError when the machine has not that much memory free.
    """
    needed = SlotCache.bytes_needed(shape, slots, context, dtype)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"serve.max_concurrent: {slots} requests of {context} tokens need {needed / 2**30:.1f} GiB for keys and values, "
            f"and {free / 2**30:.1f} GiB are free. Lower serve.max_concurrent or serve.max_context_tokens."
        )
    return needed


def forward_cached(
    network: Any,
    cache: SlotCache,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    kept: list[int],
) -> torch.Tensor:
    """Run the network on the rows that the cache selects. Returns the logits at the kept positions, (B, kept, V).

    input_ids, positions: (B, T); mask: (B or 1, 1, T, used), True where a token may look; kept: indices into T.
    """
    if network.config.get_text_config()._attn_implementation == "eager":  # it adds the mask to the scores
        mask = torch.zeros_like(mask, dtype=network.dtype).masked_fill_(~mask, torch.finfo(network.dtype).min)
    # As indices, not as a count: of a slice, torch's product would copy the whole output layer's matrix.
    keep = torch.tensor(kept, dtype=torch.long, device=input_ids.device)
    # For a single token oneDNN prepares a product longer than torch's own kernel computes it. The switch is the whole
    # process's, but nothing beside the engine's thread computes with torch.
    torch.backends.mkldnn.enabled = input_ids.numel() > 1  # type: ignore[assignment]
    try:
        output = network(
            input_ids=input_ids, attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=keep,
        )  # fmt: skip
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
    logits: torch.Tensor = output.logits
    return logits


@torch.inference_mode()
def prove_cache(models: Models, context: int) -> None:
    """Compare the logits of a prompt that is read piece by piece into the cache with those of one plain forward pass.

    An architecture may keep more than keys and values, ignore the mask or the positions, or take them in another form.
    Raises: UserError when the logits differ, or when the network cannot be run with the cache at all.
    """
    ids = proof_prompt(models)[:context]
    models.rows.set([next(iter(models.served))])
    device = models.network.device
    input_ids = torch.tensor([ids], device=device)
    dtype = models.rows.table.dtype
    cache = SlotCache(models.shape, 1, len(ids), dtype, str(device))
    plain = models.network(input_ids=input_ids, use_cache=False).logits[0].float()
    logits = []
    try:
        # Two pieces of the prompt, then one token as in decoding.
        cuts = sorted({0, len(ids) // 2, len(ids) - 1, len(ids)})
        for start, end in pairwise(cuts):
            positions = torch.arange(start, end, device=device)[None]
            mask = torch.arange(end, device=device) <= positions[:, None, :, None]
            cache.select(0, positions[:, 0], end)
            kept = list(range(end - start))
            logits.append(forward_cached(models.network, cache, input_ids[:, start:end], positions, mask, kept)[0])
    except Exception as error:  # each architecture fails in its own way
        if is_out_of_memory(error):
            raise
        reason = f"it does not work with the server's key-value cache ({' '.join(str(error).split())[:200]})"
        raise cannot_serve(models.source, reason) from None
    difference = _relative_difference(torch.cat(logits).float(), plain)
    if not difference <= LARGEST_DIFFERENCE.get(dtype, LARGEST_DIFFERENCE_16_BITS):
        reason = f"with the server's key-value cache its logits differ by {100 * difference:.3g} % of their size"
        raise cannot_serve(models.source, reason)


def _relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative difference of any row in the L2 norm. A constant means nothing, so means are 0."""
    logits, expected = logits - logits.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
