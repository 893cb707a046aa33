"""The engine's forward pass on the lean decoder: real tokens only, and each row's keys and values in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from scripts.speed.speed_up import Cache, Packed, lean_decoder_of, logits_of
from serve.adapters import Models
from serve.stacking import StackedProduct, fastest_product, stack_layers

GROW_TOKENS = 64  # by which the memory of a row that is read grows at least


class RowCache:
    """Keys and values of rows that differ in length.

    A row that is being read has a tensor of its own, (layers, 2, G, capacity, D). Once it is continued it moves to a bank:
    there rows of similar length stand side by side, so that a step attends to all of them at once. A bank holds rows of up
    to 64, 128, 256 … tokens, so a long row makes no place for its neighbours longer.
    """

    def __init__(self, make_bank: Callable[[], Cache]) -> None:
        self.make_bank = make_bank
        self.banks: dict[int, Cache] = {}  # by how many tokens a row may have
        self.seats: dict[int, list[int]] = {}  # of each bank, the slot of each row
        self.own: dict[int, torch.Tensor] = {}  # by slot
        # Of this pass: each row that is read with its slot, first and last new position, and place in the packed list; or
        # each bank with the rows of the batch that it holds.
        self.reading: list[tuple[int, int, int, slice]] = []
        self.stepping: list[tuple[Cache, torch.Tensor | None]] = []  # None for all, in their order
        self.masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def read(
        self, first: int, start: int, counts: Sequence[int], shape: tuple[int, int, int], like: torch.Tensor
    ) -> None:
        """Choose rows that read so many tokens each, all from one position."""
        ends = [start + count for count in counts]
        edges = [slice(begin, end) for begin, end in pairwise(accumulate(counts, initial=0))]
        self.stepping, self.masks = [], {}
        self.reading = [
            (slot, start, end, edge) for slot, (end, edge) in enumerate(zip(ends, edges, strict=True), first)
        ]
        for slot, _, end, _ in self.reading:
            states = self.own.get(slot)
            if states is None or states.shape[3] < end:
                layers, groups, size = shape
                more = like.new_empty(layers, 2, groups, end + max(GROW_TOKENS, start // 8), size)
                if start and states is not None:
                    more[:, :, :, :start] = states[:, :, :, :start]
                self.own[slot] = more

    def step(self, lengths: Sequence[int], device: torch.device) -> None:
        """Choose all rows from slot 0 on, which have so many tokens, for one more each."""
        for slot, length in enumerate(lengths):
            self._seat(slot, length)
        self.reading, self.stepping = [], []
        for size, slots in self.seats.items():
            bank = self.banks[size]
            bank.lengths = torch.tensor([lengths[slot] for slot in slots], device=device)
            all_in_order = slots == list(range(len(lengths)))
            self.stepping.append((bank, None if all_in_order else torch.tensor(slots, device=device)))

    def _seat(self, slot: int, length: int) -> None:
        """Move a row to the bank that has room for one more token of it."""
        size = max(GROW_TOKENS, 1 << length.bit_length())
        if slot in self.seats.get(size, ()):
            return
        states = self.save(slot, length)
        self.release(slot)
        bank = self.banks.setdefault(size, self.make_bank())
        slots = self.seats.setdefault(size, [])
        bank.reserve(len(slots) + 1, size)
        bank.states[:, :, len(slots), :, :length] = states
        slots.append(slot)

    def save(self, slot: int, length: int) -> torch.Tensor:
        """Return the keys and values of a row's first tokens, (layers, 2, G, length, D); they may be the row's own."""
        return self._states_of(slot)[:, :, :, :length]

    def _states_of(self, slot: int) -> torch.Tensor:
        if slot in self.own:
            return self.own[slot]
        size = next(size for size, slots in self.seats.items() if slot in slots)
        return self.banks[size].states[:, :, self.seats[size].index(slot)]

    def move(self, source: int, target: int) -> None:
        """Let a row have another slot; what stood there has gone."""
        self.release(target)
        if source in self.own:
            self.own[target] = self.own.pop(source)
        for slots in self.seats.values():
            slots[:] = [target if slot == source else slot for slot in slots]

    def clear(self, slot: int) -> None:
        """Forget a row whose numbers went wrong: what a longer neighbour makes it see has the weight 0, and 0 x NaN is NaN."""
        self._states_of(slot).zero_()

    def release(self, slot: int) -> None:
        """Let a row's memory go; that of a bank goes with its last row."""
        self.own.pop(slot, None)
        for size in [size for size, slots in self.seats.items() if slot in slots]:
            slots, bank = self.seats[size], self.banks[size]
            row = slots.index(slot)
            if slot != slots[-1]:  # the last one takes its place
                bank.states[:, :, row] = bank.states[:, :, len(slots) - 1]
                slots[row] = slots[-1]
            slots.pop()
            if not slots:
                del self.seats[size], self.banks[size]
                self.stepping = []  # of the last step; it would keep the bank until the next

    @property
    def nbytes(self) -> int:
        """Return what all rows take now."""
        return sum(states.nbytes for states in [*self.own.values(), *(bank.states for bank in self.banks.values())])

    def continues(self, packed: Packed) -> bool:
        """Return whether each row gets one new token."""
        return not self.reading

    def attention(self, number: int, packed: Packed, window: int | None) -> Any:
        """Return how a layer attends: each token to the tokens of its row up to itself."""
        return partial(self._read if self.reading else self._step, number, packed, window)

    def _step(self, number: int, packed: Packed, window: int | None, heads: torch.Tensor, room: int) -> torch.Tensor:
        """Add a token to each row, bank by bank; heads (B, G R + 2 G, D). Returns (B, G R D)."""
        found = None
        for bank, rows in self.stepping:
            attend = bank.attention(number, packed, window)
            if rows is None:
                return attend(heads, room)
            of_rows = attend(heads[rows], room)
            found = of_rows.new_empty(len(heads), of_rows.shape[1]) if found is None else found
            found[rows] = of_rows
        assert found is not None, "a step has rows"
        return found

    def _read(self, number: int, packed: Packed, window: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, room: int) -> torch.Tensor:  # fmt: skip
        """Read new tokens of some rows, one after the other; q (G, N, R, D), scaled. Returns (N, G R D)."""
        found = []
        for slot, start, end, tokens in self.reading:
            layer = self.own[slot][number]
            layer[0, :, start:end], layer[1, :, start:end] = k[:, tokens], v[:, tokens]
            since = max(0, start + 1 - window) if window is not None else 0
            keys, values = (each.repeat_interleave(q.shape[2], 0)[None] for each in layer[:, :, since:end])
            heads = q[:, tokens].transpose(1, 2).flatten(0, 1)[None]
            mask = self._mask(slot, start, end, since, window, q)
            attended = functional.scaled_dot_product_attention(heads, keys, values, mask, scale=1.0)
            found.append(attended[0].transpose(0, 1).flatten(1))
        return torch.cat(found)

    def _mask(
        self, slot: int, start: int, end: int, since: int, window: int | None, like: torch.Tensor
    ) -> torch.Tensor:
        """Return which keys the new tokens of a row see, (T, S); the layers share it."""
        if (slot, window) not in self.masks:
            queries = torch.arange(start, end, device=like.device)[:, None]
            keys = torch.arange(since, end, device=like.device)
            seen = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
            self.masks[slot, window] = torch.where(seen, 0.0, -torch.inf).to(like.dtype)
        return self.masks[slot, window]


class LeanForward:
    """The lean decoder for the engine's rows; see CachedForward."""

    def __init__(self, models: Models) -> None:
        self.models, self.network = models, models.network
        self.renew()
        self._stack_all()
        self.cache = RowCache(lambda: Cache(*self.shape, self.embeddings))

    @staticmethod
    def takes(models: Models) -> bool:
        """Return whether a network is of the lean decoder's family; that it computes the same is proven afterwards."""
        return lean_decoder_of(models.network, StackedProduct) is not None

    def renew(self) -> None:
        """Look at the network again, after its layers were stacked or its windows changed."""
        lean = lean_decoder_of(self.network, StackedProduct)
        assert lean is not None, "the caller has asked `takes`"
        self.lean = lean
        first = lean.layers[0]
        self.shape = (len(lean.layers), first.groups, first.attention.head_dim)
        self.embeddings = self.network.get_input_embeddings().weight

    def _stack_all(self) -> None:
        """Give layers without an adapter the products of those that have one."""
        ours = {layer for each in self.lean.layers for product in each.products for layer in product.layers}
        plain = {name for name, module in self.network.named_modules() if module in ours and type(module) is nn.Linear}
        if plain:
            stack_layers(self.network, plain, self.models.rows)
            self.renew()

    @property
    def bytes_per_token(self) -> int:
        """Return what one token of one row takes."""
        layers, groups, size = self.shape
        return int(2 * layers * groups * size * self.embeddings.element_size())

    @property
    def nbytes(self) -> int:
        """Return what the rows take now."""
        return self.cache.nbytes

    def read(
        self, slot: int, names: Sequence[str], tokens: Sequence[Sequence[int]], start: int, places: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:  # fmt: skip
        """Read the next tokens of rows in the slots from `slot` on, all from one position; return logits at their places."""
        counts = list(map(len, tokens))
        self.cache.read(slot, start, counts, self.shape, self.embeddings)
        edges = accumulate(counts, initial=0)
        index = [begin + place for begin, wanted in zip(edges, places, strict=False) for place in wanted]
        positions = [start + place for count in counts for place in range(count)]
        names = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        logits = self._forward(names, [token for row in tokens for token in row], positions, index)
        return list(logits.split([len(wanted) for wanted in places]))

    def step(self, names: Sequence[str], tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append a token to each row, which has so many; return the logits of the next, (B, V)."""
        self.cache.step(lengths, self.embeddings.device)
        return self._forward(names, tokens, lengths, range(len(tokens)))

    def _forward(
        self, names: Sequence[str], tokens: Sequence[int], positions: Sequence[int], index: Sequence[int]
    ) -> torch.Tensor:
        """Read tokens of the rows that the cache has chosen, each with an adapter; return some logits."""
        ids, places, wanted = (
            torch.tensor(list(row), device=self.embeddings.device) for row in (tokens, positions, index)
        )
        self.models.rows.set(names)
        with fastest_product(len(ids)):
            return logits_of(self.network, self.lean.hidden(Packed(ids, places, [], []), self.cache)[wanted.long()])

    def move(self, source: int, target: int, length: int) -> None:
        """Let a row have another slot."""
        self.cache.move(source, target)

    def clear(self, slot: int) -> None:
        """Forget a row whose numbers went wrong."""
        self.cache.clear(slot)

    def release(self, slot: int) -> None:
        """Let the memory of a slot go."""
        self.cache.release(slot)

    def save(self, slot: int, length: int) -> torch.Tensor:
        """Return a copy of the first tokens' keys and values of a row."""
        return self.cache.save(slot, length).clone()

    def load(self, slot: int, states: torch.Tensor, length: int) -> None:
        """Begin a row with saved keys and values of so many tokens."""
        self.cache.own[slot] = states[:, :, :, :length]  # copied by the first read, which finds no room in it
