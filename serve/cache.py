"""The engine's forward pass with a key-value cache: that of the library, and the proof that no way changes an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import psutil
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from scripts.common.errors import UserError, is_out_of_memory
from scripts.model.int8 import is_in_int8
from scripts.model.shape import ModelShape
from serve.adapters import Models, cannot_serve, proof_prompt
from serve.stacking import fastest_product

log = logging.getLogger(__name__)

# Memory grows by at least so many tokens, and by an eighth of what is used: so it is copied rarely.
GROW_TOKENS = 64

Forward = TypeVar("Forward", bound="CachedForward")

# How far logits may differ with the cache, relative to their size. A wrong mask or position changes them altogether.
# In 16 bits another order of summation changes them by some hundredths, and may choose other experts; in 8 bits the
# rounding of a row depends on its neighbours.
LARGEST_DIFFERENCE_32_BITS, LARGEST_DIFFERENCE = 0.001, 0.3
# Text and windows of the proof. Masks take their windows from these keys; which layer gets which mask, from others.
PROVEN_ROWS, PROOF_TOKENS, PROOF_NEW_TOKENS, PROOF_WINDOW = 2, 32, 4, 5
WINDOW_KEYS = ("sliding_window", "attention_chunk_size")


class CachedForward(Protocol):
    """What the engine asks of a network: rows stand in slots, each with the keys and values of all that it has read."""

    @property
    def bytes_per_token(self) -> int:
        """Return what one token of one row takes."""

    @property
    def nbytes(self) -> int:
        """Return what the rows take now."""

    def renew(self) -> None:
        """Look at the network again, after its layers were stacked or its windows changed."""

    def read(
        self, slot: int, names: Sequence[str], tokens: Sequence[Sequence[int]], start: int, places: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:  # fmt: skip
        """Read the next tokens of rows in the slots from `slot` on, all from one position.

        names: the adapter of each row; places: indices into its new tokens, whose logits are returned, (places, V).
        """

    def step(self, names: Sequence[str], tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append a token to each row, which has so many; return the logits of the next, (B, V)."""

    def move(self, source: int, target: int, length: int) -> None:
        """Put a row of so many tokens into another slot."""

    def clear(self, slot: int) -> None:
        """Forget a row whose numbers went wrong."""

    def release(self, slot: int) -> None:
        """Let the memory of a slot go, behind which no row stands."""

    def save(self, slot: int, length: int) -> Any:
        """Return a copy of the keys and values of a row's first tokens."""

    def load(self, slot: int, states: Any, length: int) -> None:
        """Begin a row with saved keys and values of so many tokens."""


class SlotCache:
    """Keys and values of all rows: for each layer [rows, heads, tokens, head_dim], which grow up to slots and context.

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
        # A layer may have heads of its own size, and its values others than its keys.
        for store, new in ((self.keys, keys), (self.values, values)):
            store[layer] = self._with_room(store.get(layer), new)
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

    def _with_room(self, states: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """Return what a layer has kept, with room for the rows and positions that are selected."""
        rows, tokens = (0, 0) if states is None else (len(states), states.shape[2])
        if states is not None and self.last <= rows and self.used <= tokens:
            return states
        rows = max(rows, self.last)
        tokens = tokens if self.used <= tokens else min(self.context, self.used + max(GROW_TOKENS, self.used // 8))
        _, heads, _, size = new.shape
        grown = torch.zeros(rows, heads, tokens, size, dtype=new.dtype, device=self.device)
        if states is not None:
            grown[: len(states), :, : states.shape[2]] = states
        return grown

    @property
    def bytes_per_token(self) -> int:
        """Return what one token of one row takes."""
        return sum(states.nbytes // (len(states) * states.shape[2]) for states in self.all_states())

    def make_room(self, slot: int, length: int, like: list[dict[int, torch.Tensor]]) -> None:
        """Make room for a row that begins with keys and values of so many tokens."""
        self.last, self.used = slot + 1, length
        for store, of_layers in zip((self.keys, self.values), like, strict=True):
            for layer, states in of_layers.items():
                store[layer] = self._with_room(store.get(layer), states[None])

    def all_states(self) -> list[torch.Tensor]:
        """Return the keys and values of all layers."""
        return [*self.keys.values(), *self.values.values()]

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


def check_cache_fits(bytes_per_token: int, rows: int, context: int, device: str) -> int:
    """Return how many tokens fit into free memory.

    Raises: UserError when that is less than so many rows of the whole context.
    """
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    needed = bytes_per_token * rows * context
    if needed > free:
        key = "serve.max_concurrent" if rows > 1 else "serve.max_context_tokens"
        raise UserError(
            f"{key}: {rows} request{'s' if rows > 1 else ''} of {context} tokens need {needed / 2**30:.1f} GiB for keys and "
            f"values, and {free / 2**30:.1f} GiB are free. Lower serve.max_concurrent or serve.max_context_tokens."
        )
    return free // bytes_per_token


class LibraryForward:
    """The library's own forward pass on padded rows; see CachedForward."""

    def __init__(self, models: Models, slots: int, context: int) -> None:
        self.models, self.cache = models, SlotCache(slots, context, models.network.device)
        self.bytes_per_token = 0  # known once something was read

    @property
    def nbytes(self) -> int:
        """Return what the rows take now."""
        return sum(states.nbytes for states in self.cache.all_states())

    def renew(self) -> None:
        """Nothing: the network itself asks its layers."""

    def read(
        self, slot: int, names: Sequence[str], tokens: Sequence[Sequence[int]], start: int, places: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:  # fmt: skip
        """Read the next tokens of rows, padded on the right: no token looks at what stands after it."""
        # Example: A and B decode in slots 0 and 1; the prompts C (5 tokens) and D (3 tokens) are read together.
        #
        #   slot   position 0 1 2 3 4      mask: key 0 1 2 3 4
        #    2  C           c c c c c      query 0   1 . . . .
        #    3  D           d d d - -            1   1 1 . . .
        #                                        2   1 1 1 . .    … down to 4
        #
        # All start at one position, so one mask serves all rows. A pad (-) comes after its row's last token: no token of
        # the row sees it, and D's first new token overwrites it at position 3.
        width = max(map(len, tokens))
        kept = sorted({place for wanted in places for place in wanted})
        column = {place: index for index, place in enumerate(kept)}
        padded = [[*row, *[row[-1]] * (width - len(row))] for row in tokens]
        positions = torch.arange(start, start + width).expand(len(tokens), -1)
        logits = self._forward(slot, names, padded, positions, start + width, kept)
        return [row[[column[place] for place in wanted]] for row, wanted in zip(logits, places, strict=True)]

    def step(self, names: Sequence[str], tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append a token to each row; return the logits of the next, (B, V)."""
        if self.models.shape.ends_aligned and len(names) > 1:
            alone = [
                self._forward(slot, [name], [[token]], torch.tensor([[length]]), length + 1, [0])
                for slot, (name, token, length) in enumerate(zip(names, tokens, lengths, strict=True))
            ]
            return torch.cat(alone)[:, 0]
        positions = torch.tensor(lengths)[:, None]
        return self._forward(0, names, [[token] for token in tokens], positions, max(lengths) + 1, [0])[:, 0]

    def _forward(
        self, slot: int, names: Sequence[str], tokens: list[list[int]], positions: torch.Tensor, used: int, kept: list[int]
    ) -> torch.Tensor:  # fmt: skip
        """Run the network on rows that read `used` positions. Returns logits (B, kept, V)."""
        device = self.cache.device
        self.cache.select(slot, positions.to(device), used)
        self.models.rows.set(names)
        input_ids = torch.tensor(tokens, device=device)
        # As indices, not as a count: of a slice, torch's product would copy the whole output layer's matrix.
        keep = torch.tensor(kept, dtype=torch.long, device=device)
        with fastest_product(input_ids.numel()):
            output = self.models.network(
                input_ids=input_ids, position_ids=self.cache.positions,
                past_key_values=self.cache, use_cache=True, logits_to_keep=keep,
            )  # fmt: skip
        self.bytes_per_token = self.cache.bytes_per_token
        logits: torch.Tensor = output.logits
        return logits

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row into another slot."""
        for states in self.cache.all_states():
            states[target, :, :length] = states[source, :, :length]

    def clear(self, slot: int) -> None:
        """Forget a row whose numbers went wrong: masked positions are weighted with 0, and 0 x NaN is NaN."""
        for states in self.cache.all_states():
            states[slot] = 0

    def release(self, slot: int) -> None:
        """Let all memory go with the last row."""
        if slot == 0:
            self.cache.keys, self.cache.values = {}, {}

    def save(self, slot: int, length: int) -> list[dict[int, torch.Tensor]]:
        """Return a copy of the keys and values of a row's first tokens."""
        return [
            {layer: states[slot, :, :length].clone() for layer, states in kept.items()}
            for kept in (self.cache.keys, self.cache.values)
        ]

    def load(self, slot: int, states: list[dict[int, torch.Tensor]], length: int) -> None:
        """Begin a row with saved keys and values of so many tokens."""
        self.cache.make_room(slot, length, states)
        for kept, saved in zip((self.cache.keys, self.cache.values), states, strict=True):
            for layer, of_layer in saved.items():
                kept[layer][slot, :, :length] = of_layer[:, :length]


def choose_forward(models: Models, slots: int, context: int, lean: bool) -> CachedForward:
    """Return the lean decoder's forward pass where it is wanted and equal to the library's, otherwise the library's.

    Raises: UserError when not even that one computes with a cache what it computes without.
    """
    rows = max(slots, PROVEN_ROWS)
    if lean:
        from serve.lean_forward import LeanForward  # nothing of scripts/speed is imported where it is not wanted

        if LeanForward.takes(models):
            try:
                return prove_cache(models, LeanForward(models), context)
            except UserError as error:
                log.warning("performance.fast_path: the library's slower forward pass is used: %s", error)
    return prove_cache(models, LibraryForward(models, rows, context), context)


@torch.inference_mode()
def prove_cache(models: Models, forward: Forward, context: int) -> Forward:
    """Compare two rows of two adapters, read in pieces and continued, with one plain forward pass of each row.

    An architecture may keep more than keys and values, ignore the masks or the positions, or take them in another form.
    Windows are longer than any text that could be read at every start, so both sides get short ones: a window's length
    is a number that enters a mask, and nothing else depends on it.
    Returns: what was proven, with nothing in its slots.
    Raises: UserError when the logits differ, or when the network cannot be run with the cache at all.
    """
    names = (list(models.served) * PROVEN_ROWS)[-PROVEN_ROWS:]
    length = max(2, min(PROOF_TOKENS, context - PROOF_NEW_TOKENS))
    longer = (proof_prompt(models) * length)[:length]
    prompts = [longer, longer[length // 3 :]]
    with _short_windows(models.network.config.get_text_config(decoder=True)):
        try:
            forward.renew()
            tokens, logits = _continue_together(forward, names, prompts)
        except Exception as error:  # each architecture fails in its own way
            if is_out_of_memory(error):
                raise
            reason = f"it does not work with the server's key-value cache ({' '.join(str(error).split())[:200]})"
            raise cannot_serve(models.network, models.source, reason) from None
        plain = [_read_alone(models, name, row) for name, row in zip(names, tokens, strict=True)]
    difference = _relative_difference(torch.cat(logits).float(), torch.cat(plain).float())
    rounds = getattr(models.network, "is_quantized", False) or is_in_int8(models.network)
    exact = plain[0].dtype == torch.float32 and not rounds
    if not difference <= (LARGEST_DIFFERENCE_32_BITS if exact else LARGEST_DIFFERENCE):
        reason = f"with the server's key-value cache its logits differ by {100 * difference:.3g} % of their size"
        raise cannot_serve(models.network, models.source, reason)
    for slot in reversed(range(PROVEN_ROWS)):
        forward.release(slot)
    forward.renew()
    return forward


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
    forward: CachedForward, names: list[str], prompts: list[list[int]]
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Read prompts together, the longer ones to their end in another piece, and continue them greedily.

    Returns: for each row the tokens that were read, (T,), and all their logits, (T, V).
    """
    shortest = min(map(len, prompts))
    logits = forward.read(0, names, [row[:shortest] for row in prompts], 0, [list(range(shortest))] * len(prompts))
    for slot, row in enumerate(prompts):
        rest = row[shortest:]
        if rest:
            (more,) = forward.read(slot, names[slot : slot + 1], [rest], shortest, [list(range(len(rest)))])
            logits[slot] = torch.cat([logits[slot], more])
    tokens = [list(prompt) for prompt in prompts]
    for _ in range(PROOF_NEW_TOKENS):
        new = [int(row[-1].argmax()) for row in logits]
        step = forward.step(names, new, list(map(len, tokens)))
        tokens = [[*row, token] for row, token in zip(tokens, new, strict=True)]
        logits = [torch.cat([row, next_one[None]]) for row, next_one in zip(logits, step, strict=True)]
    return tokens, logits


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
