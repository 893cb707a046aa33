"""The engine's forward pass on the lean decoder: real tokens only, and each row's keys and values in memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn import functional

from scripts.speed.speed_up import Packed, lean_decoder_of, logits_of
from serve.adapters import Models
from serve.stacking import StackedProduct

# A row's memory grows by at least so many tokens, and by an eighth of what it has: so it is copied rarely.
GROW_TOKENS = 64


class RowCache:
    """Keys and values of rows that differ in length. states[slot]: (layers, 2, G, capacity, D), or None for an empty slot.

    A row takes what it needs, so a long one costs its neighbours nothing, and what is not read is not looked at.
    """

    def __init__(self, slots: int) -> None:
        self.states: list[torch.Tensor | None] = [None] * slots
        self.first, self.starts, self.ends = 0, [0], [0]  # of the rows in this pass: slot, and their new positions
        self.edges = [(0, 0)]  # where the tokens of each row stand in the packed list
        self.masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def select(self, first: int, starts: Sequence[int], counts: Sequence[int], like: torch.Tensor, shape: Any) -> None:
        """Choose the rows of the next pass, which get so many tokens each; make room for them."""
        self.first, self.starts = first, list(starts)
        self.ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self.edges = list(pairwise(accumulate(counts, initial=0)))
        self.masks = {}
        for slot, (start, end) in enumerate(zip(self.starts, self.ends, strict=True), first):
            self._reserve(slot, start, end, like, shape)

    def _reserve(self, slot: int, length: int, tokens: int, like: torch.Tensor, shape: tuple[int, int, int]) -> None:
        states = self.states[slot]
        capacity = 0 if states is None else states.shape[3]
        if tokens > capacity or (not length and capacity > 2 * tokens + GROW_TOKENS):
            layers, groups, size = shape
            more = tokens + max(GROW_TOKENS, length // 8)
            grown = like.new_empty(layers, 2, groups, more, size)
            if states is not None and length:
                grown[:, :, :, :length] = states[:, :, :, :length]
            self.states[slot] = grown

    def attention(self, number: int, packed: Packed, window: int | None) -> Any:
        """Return how a layer attends: each token to the tokens of its row up to itself."""
        return partial(self._attend, number, window)

    def _attend(
        self, number: int, window: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, room: int
    ) -> torch.Tensor:
        """q (G, N R, D), scaled; k and v (G, N, D). Returns (N, G R D)."""
        groups, count, size = k.shape
        shared = q.shape[1] // count
        new = torch.stack((k, v))
        found = []
        for index, (begin, end) in enumerate(self.edges):
            states = self.states[self.first + index]
            assert states is not None, "select has made room"
            layer, start, stop = states[number], self.starts[index], self.ends[index]
            layer[:, :, start:stop] = new[:, :, begin:end]
            since = max(0, start + 1 - window) if window is not None else 0
            keys, values = layer[:, :, since:stop]
            queries = q[:, begin * shared : end * shared]
            if end - begin == 1:  # the heads that share keys stand beside each other, as queries of one head
                weights = torch.bmm(queries, keys.transpose(1, 2)).softmax(-1)
                found.append(torch.bmm(weights, values).view(1, -1))
            else:
                heads = queries.view(groups, end - begin, shared, size).transpose(1, 2).flatten(0, 1)[None]
                keys, values = (each.repeat_interleave(shared, 0)[None] for each in (keys, values))
                attended = functional.scaled_dot_product_attention(
                    heads, keys, values, self._mask(index, since, window, q), scale=1.0
                )
                found.append(attended[0].transpose(0, 1).flatten(1))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _mask(self, index: int, since: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Return which keys the new tokens of a row see, (T, S); the layers share it."""
        if (index, window) not in self.masks:
            queries = torch.arange(self.starts[index], self.ends[index], device=like.device)[:, None]
            keys = torch.arange(since, self.ends[index], device=like.device)
            seen = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
            self.masks[index, window] = torch.where(seen, 0.0, -torch.inf).to(like.dtype)
        mask = self.masks[index, window]
        assert mask is not None
        return mask


class LeanForward:
    """The lean decoder for the engine's rows; see CachedForward."""

    def __init__(self, models: Models, slots: int) -> None:
        self.models, self.network = models, models.network
        self.cache = RowCache(slots)
        self.renew()

    @staticmethod
    def takes(models: Models) -> bool:
        """Return whether a network is of the lean decoder's family; that it computes the same is proven afterwards."""
        return lean_decoder_of(models.network, StackedProduct) is not None

    def renew(self) -> None:
        """Look at the network's layers again, after some were stacked."""
        lean = lean_decoder_of(self.network, StackedProduct)
        assert lean is not None, "the caller has asked `takes`"
        self.lean = lean
        first = lean.layers[0]
        self.shape = (len(lean.layers), first.groups, first.attention.head_dim)
        self.embeddings = self.network.get_input_embeddings().weight

    @property
    def bytes_per_token(self) -> int:
        """Return what one token of one row takes."""
        layers, groups, size = self.shape
        return int(2 * layers * groups * size * self.embeddings.element_size())

    @property
    def nbytes(self) -> int:
        """Return what the rows take now."""
        return sum(states.nbytes for states in self.cache.states if states is not None)

    def read(
        self, slot: int, names: Sequence[str], tokens: Sequence[Sequence[int]], start: int, places: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:  # fmt: skip
        """Read the next tokens of rows in the slots from `slot` on, all from one position; return logits at their places."""
        edges = list(accumulate(map(len, tokens), initial=0))
        index = [begin + place for begin, wanted in zip(edges, places, strict=False) for place in wanted]
        logits = self._forward(slot, names, tokens, [start] * len(tokens), index)
        return list(logits.split([len(wanted) for wanted in places]))

    def step(self, names: Sequence[str], tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append a token to each row, which has so many; return the logits of the next, (B, V)."""
        return self._forward(0, names, [[token] for token in tokens], lengths, list(range(len(tokens))))

    def _forward(
        self, slot: int, names: Sequence[str], tokens: Sequence[Sequence[int]], starts: Sequence[int], index: list[int]
    ) -> torch.Tensor:
        device = self.embeddings.device
        self.models.rows.set([name for name, row in zip(names, tokens, strict=True) for _ in row])
        self.cache.select(slot, starts, [len(row) for row in tokens], self.embeddings, self.shape)
        ids = torch.tensor([token for row in tokens for token in row], device=device)
        positions = torch.cat([torch.arange(a, b) for a, b in zip(self.cache.starts, self.cache.ends, strict=True)])
        # For a single token oneDNN prepares a product longer than torch's own kernel computes it. The switch is the whole
        # process's, but nothing beside the engine's thread computes with torch.
        torch.backends.mkldnn.enabled = len(ids) > 1  # type: ignore[assignment]
        try:
            hidden = self.lean.hidden(Packed(ids, positions.to(device), [], []), self.cache)
            return logits_of(self.network, hidden, torch.tensor(index, dtype=torch.long, device=device))
        finally:
            torch.backends.mkldnn.enabled = True  # type: ignore[assignment]

    def move(self, source: int, target: int, length: int) -> None:
        """Put a row into another slot."""
        self.cache.states[target], self.cache.states[source] = self.cache.states[source], None

    def clear(self, slot: int) -> None:
        """Nothing: no other row looks at what this one has read."""

    def release(self, slot: int) -> None:
        """Let the memory of a slot go."""
        self.cache.states[slot] = None

    def save(self, slot: int, length: int) -> torch.Tensor:
        """Return a copy of the first tokens' keys and values of a row."""
        states = self.cache.states[slot]
        assert states is not None, "the row has read something"
        return states[:, :, :, :length].clone()

    def load(self, slot: int, states: torch.Tensor, length: int) -> None:
        """Begin a row with saved keys and values of so many tokens."""
        layers, _, groups, _, size = states.shape
        fresh = states.new_empty(layers, 2, groups, length + GROW_TOKENS, size)
        fresh[:, :, :, :length] = states[:, :, :, :length]
        self.cache.states[slot] = fresh
