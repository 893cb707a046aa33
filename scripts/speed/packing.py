"""Pack rows of token ids into one list without padding, in which what rows begin with in common stands once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

WORTH_SHARING = 16  # tokens saved; for fewer, one more piece of attention costs more than it saves
PADDING = 1.25  # times the scores of pieces that attend side by side, with their padding

Stretches = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens start to end of the packed list, and the stretches before them that they look back on."""

    start: int
    end: int
    past: Stretches = ()

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def past_tokens(self) -> int:
        """Return how many tokens stand before its first."""
        return sum(end - start for start, end in self.past)


class Alike:
    """Pieces that attend side by side, P of them: T columns for their own tokens, behind S for what stands before.

    What stands before ends where they begin: the rows `s s a b` and `s c` of s s | a b | s c are one piece with a past and
    one without, `s s a b` beside `_ _ s c`. A column without a token stands for its piece's first one.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        own, self.past_tokens = columns_of(pieces)
        rows: list[list[int]] = []
        padding: list[int] = []
        for number, piece in enumerate(pieces):
            before = [place for stretch in piece.past for place in range(*stretch)]
            gaps = self.past_tokens - len(before), own - len(piece)
            rows.append([*[piece.start] * gaps[0], *before, *range(piece.start, piece.end), *[piece.start] * gaps[1]])
            padding.extend(range(number * own + len(piece), (number + 1) * own))
        self.seen = torch.tensor(rows)  # (P, S + T), where in the packed list the tokens of the columns stand
        self.own = self.seen[:, self.past_tokens :]
        self.padding = torch.tensor(padding, dtype=torch.long)  # columns of all own ones, (P T), without a token
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    def rows(self, groups: int, of_group: int, of_token: int, *, own: bool) -> torch.Tensor:
        """Return where tokens of each group of heads stand in memory, (G P t,), given the steps to the next group and token.

        All layers of a batch share it.
        """
        known = (groups, of_group, of_token, own)
        if known not in self._rows:
            places = (self.own if own else self.seen).flatten() * of_token
            self._rows[known] = (torch.arange(groups)[:, None] * of_group + places).flatten()
        return self._rows[known]


@dataclass(frozen=True)
class Packed:
    """Rows as trees. Shapes: ids and positions (N,); places: for each row, where each of its tokens stands, (T,)."""

    ids: torch.Tensor
    positions: torch.Tensor
    pieces: list[Piece]
    places: list[torch.Tensor]

    @cached_property
    def alike(self) -> list[Alike]:
        """Return the pieces, those together that have and see about as many tokens."""
        found: list[list[Piece]] = []
        for piece in sorted(self.pieces, key=lambda piece: (piece.past_tokens + len(piece), len(piece))):
            if found and _padded_scores(more := [*found[-1], piece]) <= PADDING * sum(
                _padded_scores([one]) for one in more
            ):
                found[-1].append(piece)
            else:
                found.append([piece])
        return [Alike(pieces) for pieces in found]

    def to(self, device: torch.device) -> Packed:
        """Return the same on a device."""
        places = [row.to(device) for row in self.places]
        return Packed(self.ids.to(device), self.positions.to(device), self.pieces, places)


def pack(rows: Sequence[Sequence[int]], *, share: bool = True) -> Packed:
    """Pack rows, each of one token at least; without `share` every row is a tree of its own."""
    # The rows `s s p a`, `s s p b c` and `s s q` become two shared pieces and three of their own:
    #
    #     place     0 1   2   3   4 5   6          piece 4:6 (b c) has the past 0:2, 2:3
    #     id        s s   p   a   b c   q          and the second row stands at the places 0 1 2 4 5
    #     position  0 1   2   3   3 4   2
    ids: list[int] = []
    positions: list[int] = []
    pieces: list[Piece] = []
    places: list[list[int]] = [[] for _ in rows]

    def add(members: Sequence[int], start: int, end: int, past: Stretches) -> Stretches:
        """Append a stretch of the first member's row for all members; return what stands before what follows it."""
        if start == end:
            return past
        begin = len(ids)
        ids.extend(rows[members[0]][start:end])
        positions.extend(range(start, end))
        pieces.append(Piece(begin, len(ids), past))
        for member in members:
            places[member].extend(range(begin, len(ids)))
        return (*past[:-1], (past[-1][0], len(ids))) if past and past[-1][1] == begin else (*past, (begin, len(ids)))

    def grow(members: Sequence[int], start: int, past: Stretches) -> None:
        """Append rows, given in sorted order, that have the first `start` tokens in common and in the list."""
        if len(members) == 1:
            add(members, start, len(rows[members[0]]), past)
            return
        common = _common(rows[members[0]], rows[members[-1]], start)
        if (common - start) * (len(members) - 1) >= WORTH_SHARING:
            past, start = add(members, start, common, past), common
        for token, same in groupby(
            members, lambda member: rows[member][common] if len(rows[member]) > common else None
        ):
            if token is None:  # these rows end here
                for member in same:
                    add([member], start, common, past)
            else:
                grow(list(same), start, past)

    if not share:
        for number, row in enumerate(rows):
            add([number], 0, len(row), ())
    else:
        grow(sorted(range(len(rows)), key=lambda number: list(rows[number])), 0, ())
    return Packed(torch.tensor(ids), torch.tensor(positions), pieces, [torch.tensor(row) for row in places])


def columns_of(pieces: Sequence[Piece]) -> tuple[int, int]:
    """Return how many columns pieces side by side take for their own tokens, and for what stands before them."""
    return max(map(len, pieces)), max(piece.past_tokens for piece in pieces)


def _padded_scores(pieces: Sequence[Piece]) -> float:
    """Count the scores of pieces side by side: each is as long as the longest, and so is what stands before it."""
    own, past = columns_of(pieces)
    return len(pieces) * own * (past + own / 2)


def _common(first: Sequence[int], last: Sequence[int], start: int) -> int:
    """Count the tokens with which two rows begin alike; of sorted rows the first and the last tell it for all."""
    end = min(len(first), len(last))
    return next((place for place in range(start, end) if first[place] != last[place]), end)
