"""The engine's key-value cache: a slot for each row, how large it may be, and the proof that it changes no answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import psutil
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from scripts.common.errors import UserError, is_out_of_memory
from scripts.model.shape import ModelShape
from serve.adapters import Models, cannot_serve, proof_prompt

# How far logits may differ with the cache, relative to their size. A wrong mask or position changes them altogether.
# In 16 bits another order of summation changes them by some hundredths, and may choose other experts; in 8 bits the
# rounding of a row depends on its neighbours.
LARGEST_DIFFERENCE_32_BITS, LARGEST_DIFFERENCE = 0.001, 0.3
# Text and windows of the proof. Masks take their windows from these keys; which layer gets which mask, from others.
PROOF_TOKENS, PROOF_NEW_TOKENS, PROOF_WINDOW = 32, 4, 5
WINDOW_KEYS = ("sliding_window", "attention_chunk_size")


class SlotCache:
    """Keys and values of all rows: for each layer [slots, heads, context, head_dim], allocated when it is first written.

    Running rows are kept together at the front, so that a step reads a view and gathers nothing. Every layer keeps the
    whole context; a window is a matter of its mask.
    """

    def __init__(self, slots: int, context: int, device: torch.device) -> None:
        self.slots, self.context, self.device = slots, context, device
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.slot_index = torch.arange(slots, device=device)
        self.first = self.last = self.used = 0
        self.positions = torch.zeros(0, 0, dtype=torch.long, device=device)

    def select(self, first: int, positions: torch.Tensor, used: int) -> None:
        """Choose the rows of the next forward pass, the positions of their tokens (B, T), and how far they read."""
        self.first, self.last = first, first + len(positions)
        self.positions, self.used = positions, used

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what a layer computed and return all it may look at; transformers calls this."""
        if layer not in self.keys:  # a layer may have heads of its own size, and its values others than its keys
            self.keys[layer], self.values[layer] = self._allocate(keys), self._allocate(values)
        K, V, rows = self.keys[layer], self.values[layer], slice(self.first, self.last)
        width = keys.shape[2]
        if width == 1:  # one token for each row, at the row's own position
            slots, positions = self.slot_index[rows], self.positions[:, 0]
            K[slots, :, positions] = keys[:, :, 0]
            V[slots, :, positions] = values[:, :, 0]
        else:  # prompts from their beginning, or a piece of one
            K[rows, :, self.used - width : self.used] = keys
            V[rows, :, self.used - width : self.used] = values
        return K[rows, :, : self.used], V[rows, :, : self.used]

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, size = states.shape
        return torch.zeros(self.slots, heads, self.context, size, dtype=states.dtype, device=self.device)

    @property
    def bytes_per_token(self) -> int:
        """Return what one token of one row takes."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(tensor.nbytes for tensor in tensors) // (self.slots * self.context)

    def clear(self, slot: int) -> None:
        """Forget a row whose numbers went wrong: masked positions are weighted with 0, and 0 x NaN is NaN."""
        for states in (*self.keys.values(), *self.values.values()):
            states[slot] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row into another slot."""
        for states in (*self.keys.values(), *self.values.values()):
            states[target, :, :length] = states[source, :, :length]

    # What the masks are made from, asked for by transformers.

    def get_query_offset(self, *_: Any) -> torch.Tensor:
        """Return where each token of each row stands, (B, T): rows differ, so one offset does not do."""
        return self.positions

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Return how many keys a layer sees, and the position of the first."""
        return self.used, 0

    def get_seq_length(self, *_: Any) -> int:
        """Return how many keys are there before this pass."""
        return self.used - self.positions.shape[1]


def _mask_by_position(library_mask: Callable[..., Any], additive: bool) -> Callable[..., Any]:
    """Let transformers' masks take the position of each token of each row where a SlotCache gives them.

    A network then makes its own masks, one for each kind of layer, and only the positions are ours. With any other
    cache the offset is one number, and the library's function answers.
    """

    def mask(*, q_offset: Any = 0, **given: Any) -> Any:
        if not (isinstance(q_offset, torch.Tensor) and q_offset.ndim == 2):
            return library_mask(q_offset=q_offset, **given)
        rows = torch.arange(given["batch_size"], device=q_offset.device)[:, None, None, None]
        keys = torch.arange(given["kv_length"], device=q_offset.device)
        seen = given["mask_function"](rows, torch.zeros_like(rows), q_offset[:, None, :, None], keys)
        return torch.where(seen, 0.0, torch.finfo(given["dtype"]).min).to(given["dtype"]) if additive else seen

    return mask


for name, additive in (("sdpa", False), ("eager", True)):
    AttentionMaskInterface.register(name, _mask_by_position(ALL_MASK_ATTENTION_FUNCTIONS[name], additive))


def context_limit(shape: ModelShape, max_tokens: int) -> int:
    """Return how many tokens a row may hold: those asked for, or fewer where the model's positions end.

    Where longrope changes all angles, the keys in the cache become wrong, so it ends there, too.
    """
    return min([max_tokens, *(limit for limit in (shape.positions, shape.rope_switch) if limit)])


def check_cache_fits(bytes_per_token: int, slots: int, context: int, device: str) -> int:
    """Return the bytes of the cache.

    Raises: UserError when the machine has not that much memory free.
    """
    needed = bytes_per_token * slots * context
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"serve.max_concurrent: {slots} requests of {context} tokens need {needed / 2**30:.1f} GiB for keys and values, "
            f"and {free / 2**30:.1f} GiB are free. Lower serve.max_concurrent or serve.max_context_tokens."
        )
    return needed


def forward_cached(
    models: Models, names: list[str], cache: SlotCache, input_ids: torch.Tensor, kept: list[int]
) -> torch.Tensor:
    """Run the network on the rows and positions that the cache selects. Returns logits (B, kept, V).

    names: the adapter of each row; input_ids: (B, T); kept: indices into T.
    """
    if models.shape.ends_aligned and len(names) > 1 and input_ids.shape[1] == 1:
        first, positions = cache.first, cache.positions
        rows = []
        for index, name in enumerate(names):
            cache.select(first + index, positions[index : index + 1], int(positions[index]) + 1)
            rows.append(forward_cached(models, [name], cache, input_ids[index : index + 1], kept))
        return torch.cat(rows)
    models.rows.set(names)
    # As indices, not as a count: of a slice, torch's product would copy the whole output layer's matrix.
    keep = torch.tensor(kept, dtype=torch.long, device=input_ids.device)
    # For a single token oneDNN prepares a product longer than torch's own kernel computes it. The switch is the whole
    # process's, but nothing beside the engine's thread computes with torch.
    torch.backends.mkldnn.enabled = input_ids.numel() > 1  # type: ignore[assignment]
    try:
        output = models.network(
            input_ids=input_ids, position_ids=cache.positions,
            past_key_values=cache, use_cache=True, logits_to_keep=keep,
        )  # fmt: skip
    finally:
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
    logits: torch.Tensor = output.logits
    return logits


@torch.inference_mode()
def prove_cache(models: Models, context: int) -> int:
    """Compare a padded batch of two adapters, read in pieces and continued, with one plain forward pass of each row.

    An architecture may keep more than keys and values, ignore the masks or the positions, or take them in another form.
    Windows are longer than any text that could be read at every start, so both sides get short ones: a window's length
    is a number that enters a mask, and nothing else depends on it.
    Returns: the bytes that one token takes in the cache.
    Raises: UserError when the logits differ, or when the network cannot be run with the cache at all.
    """
    names = (list(models.served) * 2)[-2:]
    length = max(2, min(PROOF_TOKENS, context - PROOF_NEW_TOKENS))
    longer = (proof_prompt(models) * length)[:length]
    prompts = [longer, longer[length // 3 :]]
    with _short_windows(models.network.config.get_text_config(decoder=True)):
        try:
            cache, tokens, logits = _continue_together(models, names, prompts)
        except Exception as error:  # each architecture fails in its own way
            if is_out_of_memory(error):
                raise
            reason = f"it does not work with the server's key-value cache ({' '.join(str(error).split())[:200]})"
            raise cannot_serve(models.network, models.source, reason) from None
        plain = [_read_alone(models, name, row) for name, row in zip(names, tokens, strict=True)]
    difference = _relative_difference(torch.cat(logits).float(), torch.cat(plain).float())
    exact = plain[0].dtype == torch.float32 and not getattr(models.network, "is_quantized", False)
    if not difference <= (LARGEST_DIFFERENCE_32_BITS if exact else LARGEST_DIFFERENCE):
        reason = f"with the server's key-value cache its logits differ by {100 * difference:.3g} % of their size"
        raise cannot_serve(models.network, models.source, reason)
    return cache.bytes_per_token


@contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Let the windows from which masks are made end after a few tokens."""
    windows = {key: getattr(config, key) for key in WINDOW_KEYS if getattr(config, key, None)}
    try:
        for key, window in windows.items():
            setattr(config, key, min(window, PROOF_WINDOW))
        yield
    finally:
        for key, window in windows.items():
            setattr(config, key, window)


def _continue_together(
    models: Models, names: list[str], prompts: list[list[int]]
) -> tuple[SlotCache, list[list[int]], list[torch.Tensor]]:
    """Read prompts as one batch in two pieces and continue them greedily; the first is the longest.

    Returns: the cache, and for each row the tokens that were read, (T,), and all their logits, (T, V).
    """
    device, longest = models.network.device, len(prompts[0])
    cache = SlotCache(len(prompts), longest + PROOF_NEW_TOKENS, device)
    padded = torch.tensor([row + [row[0]] * (longest - len(row)) for row in prompts], device=device)
    pieces = []
    for start, end in pairwise((0, longest // 2, longest)):
        cache.select(0, torch.arange(start, end, device=device).expand(len(prompts), -1), end)
        pieces.append(forward_cached(models, names, cache, padded[:, start:end], list(range(end - start))))
    logits = [row[: len(prompt)] for row, prompt in zip(torch.cat(pieces, dim=1), prompts, strict=True)]
    tokens = [list(prompt) for prompt in prompts]
    for _ in range(PROOF_NEW_TOKENS):
        new = torch.stack([row[-1].argmax(keepdim=True) for row in logits])
        positions = torch.tensor([[len(row)] for row in tokens], device=device)
        cache.select(0, positions, int(positions.max()) + 1)
        step = forward_cached(models, names, cache, new, [0])
        tokens = [row + token for row, token in zip(tokens, new.tolist(), strict=True)]
        logits = [torch.cat(pair) for pair in zip(logits, step, strict=True)]
    return cache, tokens, logits


def _read_alone(models: Models, name: str, tokens: list[int]) -> torch.Tensor:
    """Return the logits of a row in a pass without a cache, (T, V)."""
    models.rows.set([name])
    logits: torch.Tensor = models.network(
        input_ids=torch.tensor([tokens], device=models.network.device), use_cache=False
    ).logits
    return logits[0]


def _relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative difference of any row in the L2 norm. A constant means nothing, so means are 0."""
    logits, expected = logits - logits.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
