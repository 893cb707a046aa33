"""Find prompts that say nearly the same in other words, without taking a shared template for likeness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ALIKE = 0.75  # cosine of what two prompts are written of
ALIKE_IN_WHAT_IS_RARE = 0.6  # and of what in them is rare
FEW = 4  # prompts that share a text before it counts as the data's template
BLOCK = 256  # prompts compared at once with all others: bounds memory


def find_near(prompts: Sequence[str], ranks: Sequence[int]) -> dict[int, int]:
    """Map the index of each prompt that is close to one of a lower rank to the index of the closest of these.

    `prompts` are words with one space between them. Two are close when most of what they are written of agrees, and so
    does most of what is rare in it: a text that many prompts share weighs less and less. Other numbers make another
    question.
    """
    first: dict[str, dict[int, int]] = {}
    for index, (prompt, rank) in enumerate(zip(prompts, ranks, strict=True)):
        first.setdefault(prompt, {}).setdefault(rank, index)
    distinct = list(first)
    lowest = [min(of_rank) for of_rank in first.values()]
    closest = _closest(distinct, lowest)
    found = {}
    for index, (prompt, rank) in enumerate(zip(prompts, ranks, strict=True)):
        least = min(first[prompt])
        if least < rank:  # the very same prompt, which another group has too
            found[index] = first[prompt][least]
        elif prompt in closest:
            other = first[closest[prompt]]
            found[index] = other[min(other)]
    return found


def _closest(prompts: Sequence[str], ranks: Sequence[int]) -> dict[str, str]:
    """Return the closest prompt of a lower rank for each that has a close one."""
    import numpy as np

    ranks_of = np.array(ranks)
    held, others = np.flatnonzero(ranks_of > ranks_of.min()), np.flatnonzero(ranks_of < ranks_of.max())
    if not len(held):
        return {}
    plain, rare = _vectors(prompts)
    candidates = rare[others].T.tocsr()
    closest: dict[str, str] = {}
    for start in range(0, len(held), BLOCK):
        block = held[start : start + BLOCK]
        likeness = (rare[block] @ candidates).tocoo()
        close = likeness.data >= ALIKE_IN_WHAT_IS_RARE
        left, right = block[likeness.row[close]], others[likeness.col[close]]
        overall = np.asarray(plain[left].multiply(plain[right]).sum(axis=1)).ravel()
        order = np.lexsort((right, -likeness.data[close]))  # the closest first, and of these the first in the data
        for at in order:
            one, other = prompts[left[at]], prompts[right[at]]
            if overall[at] >= ALIKE and ranks[right[at]] < ranks[left[at]] and _numbers(one) == _numbers(other):
                closest.setdefault(one, other)
    return closest


def _vectors(prompts: Sequence[str]) -> tuple[Any, Any]:
    """Return each prompt as the pieces it is written of, and as the same weighted by how rare they are; unit length."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    pieces = CountVectorizer(analyzer=_pieces, binary=True, dtype=np.float32).fit_transform(prompts)
    times = np.asarray(pieces.sum(axis=0)).ravel()
    rarity = np.log(len(prompts) / np.maximum(1, times - FEW + 1)).clip(0) ** 2
    common = times > max(FEW, len(prompts) / 2)
    return normalize(_scaled(pieces, ~common)), normalize(_scaled(pieces, rarity))


def _scaled(pieces: Any, weights: np.ndarray) -> Any:
    return pieces.multiply(weights.astype("float32")).tocsr()


def _pieces(prompt: str) -> list[str]:
    """Cut words into overlapping pieces, so that a misspelt or inflected word is still mostly the same."""
    pieces = []
    for word in prompt.split():
        padded = f" {word} "
        size = 2 if max(word) >= "\u2e80" else 4  # Chinese and Japanese write no spaces, and a character is a syllable
        pieces += [padded[at : at + size] for at in range(max(1, len(padded) - size + 1))]
    return pieces


def _numbers(prompt: str) -> list[str]:
    """Return the numbers in a prompt; more digits are rather a name, such as that of an order."""
    return sorted(word for word in prompt.split() if word.isdecimal() and len(word) <= 4)
