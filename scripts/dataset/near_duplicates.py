"""Find prompts that say nearly the same in other words, without taking a shared template for likeness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Cosines of two prompts, tuned on public sets: data/README.md says what they find there and what they miss.
CANDIDATE = 0.4  # usual TF-IDF: worth a closer look
ALIKE = 0.7  # everything that is written counts the same
ALIKE_IN_WHAT_IS_RARE = 0.7  # what is written in many prompts hardly counts: it is a template
FEW = 4  # prompts that may share a text before it starts to count as one
LEAST_PIECES = 6  # of two or three letters too little is known: only slips of spelling make them alike
BLOCK = 256  # prompts compared at once with all others: bounds memory


def find_near(prompts: Sequence[str], ranks: Sequence[int]) -> dict[int, int]:
    """Map the index of each prompt that is close to one of a lower rank to the index of the closest of these.

    `prompts` are words with one space between them. Two are close when most of what is written agrees, and so does most
    of what is rare in it, or only spelling differs. Other numbers make another question.
    """
    first: dict[str, dict[int, int]] = {}
    for index, (prompt, rank) in enumerate(zip(prompts, ranks, strict=True)):
        first.setdefault(prompt, {}).setdefault(rank, index)
    closest = _closest(list(first), [min(of_rank) for of_rank in first.values()])
    found = {}
    for index, (prompt, rank) in enumerate(zip(prompts, ranks, strict=True)):
        # The very same prompt can be on two sides: in two groups, or as a later turn makes two conversations alike.
        twin = prompt if min(first[prompt]) < rank else closest.get(prompt)
        if twin is not None:
            found[index] = first[twin][min(first[twin])]
    return found


def _closest(prompts: Sequence[str], ranks: Sequence[int]) -> dict[str, str]:
    """Return the closest prompt of a lower rank for each that has a close one."""
    import numpy as np

    of_rank = np.array(ranks)
    held, others = np.flatnonzero(of_rank > of_rank.min()), np.flatnonzero(of_rank < of_rank.max())
    closest: dict[str, str] = {}
    if not len(held):
        return closest
    plain, usual, rare = _vectors(prompts)
    enough = rare.getnnz(axis=1) >= LEAST_PIECES
    candidates = usual[others].T.tocsr()
    for start in range(0, len(held), BLOCK):
        block = held[start : start + BLOCK]
        likeness = (usual[block] @ candidates).tocoo()
        worth = likeness.data >= CANDIDATE
        left, right = block[likeness.row[worth]], others[likeness.col[worth]]
        alike = (of_rank[right] < of_rank[left]) & (_cosines(plain, left, right) >= ALIKE)
        left, right, score = left[alike], right[alike], likeness.data[worth][alike]
        same_where_rare = enough[left] & enough[right] & (_cosines(rare, left, right) >= ALIKE_IN_WHAT_IS_RARE)
        for at in np.lexsort((right, -score)):  # the closest first, and of these the first in the data
            one, other = prompts[left[at]], prompts[right[at]]
            if one in closest or _numbers(one) != _numbers(other):
                continue
            if same_where_rare[at] or _differ_in_spelling(one, other):
                closest[one] = other
    return closest


def _vectors(prompts: Sequence[str]) -> list[Any]:
    """Return the prompts as the pieces they are written of, of unit length: all pieces alike, weighted as usual, by rarity."""
    import numpy as np

    pieces = _occurrences([{*_pieces(prompt)} for prompt in prompts])
    times = np.asarray(pieces.sum(axis=0)).ravel()
    written = times <= max(FEW, len(prompts) / 2)  # what most share says nothing about any of them
    rarity = np.log(len(prompts) / np.maximum(1, times - FEW + 1))
    usual = rarity * (times <= max(FEW, len(prompts) / 10))  # what is frequent adds little but most of the work
    weights: list[np.ndarray] = [written, usual, rarity**4]
    return [_of_unit_length(pieces.multiply(each.astype(np.float32)).tocsr()) for each in weights]


def _occurrences(sets: Sequence[set[str]]) -> Any:
    """Return a sparse matrix, (sets, pieces), with a one where a piece is in a set.

    By hand, as importing scikit-learn takes a second, and every command on data would wait for it.
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    columns = {piece: number for number, piece in enumerate(sorted(set().union(*sets)))}
    indices = np.fromiter((columns[piece] for pieces in sets for piece in sorted(pieces)), np.int64)
    starts = np.cumsum([0, *map(len, sets)])
    return csr_matrix((np.ones(len(indices), np.float32), indices, starts), shape=(len(sets), len(columns)))


def _of_unit_length(rows: Any) -> Any:
    """Divide each row by its length; one of zeros stays."""
    import numpy as np

    lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    rows.data /= np.repeat(np.where(lengths > 0, lengths, 1), np.diff(rows.indptr)).astype(np.float32)
    return rows


def _cosines(vectors: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows, (pairs,)."""
    import numpy as np

    return np.asarray(vectors[left].multiply(vectors[right]).sum(axis=1)).ravel()


def _pieces(prompt: str) -> list[str]:
    """Cut words into overlapping pieces, so that an inflected word is still mostly the same."""
    pieces = []
    for word in prompt.split():
        padded = f" {word} "
        size = 2 if max(word) >= "\u2e80" else 4  # Chinese and Japanese write no spaces, and a character is a syllable
        pieces += [padded[at : at + size] for at in range(max(1, len(padded) - size + 1))]
    return pieces


def _numbers(prompt: str) -> list[str]:
    """Return the numbers in a prompt; with more digits it is rather a name, such as that of an order."""
    return sorted(word for word in prompt.split() if word.isdecimal() and len(word) <= 4)


def _differ_in_spelling(one: str, other: str) -> bool:
    """Tell whether two prompts have the same words but for slips: one letter in a word, or a space."""
    from rapidfuzz.distance import OSA

    words, others = Counter(one.split()), Counter(other.split())
    left, right = list((words - others).elements()), list((others - words).elements())
    if "".join(left) == "".join(right):
        return True
    if len(left) != len(right):
        return False
    for word in left:
        slips = [each for each in right if min(len(word), len(each)) >= 4 and OSA.distance(word, each) == 1]
        if not slips:
            return False
        right.remove(slips[0])
    return True
