"""From logits to tokens and from tokens to text, one request at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Below this temperature the most likely token wins with certainty in any float type.
GREEDY_BELOW = 1e-4
# A nucleus rarely holds more candidates; only when it does is the whole vocabulary sorted.
CANDIDATES = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


class Sampler:
    """Choose tokens for one request with a generator of its own, so that neighbours in the batch change nothing."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.random = random.Random(sampling.seed)

    @property
    def takes_argmax(self) -> bool:
        """Return whether the batch's own argmax is this request's token."""
        return self.sampling.greedy and self.sampling.repetition_penalty == 1

    def choose(self, logits: torch.Tensor, context: Sequence[int]) -> int:
        """Choose one token. logits: (V,); context: the ids that a repetition penalty looks at."""
        import torch

        s = self.sampling
        logits = logits.float()
        if s.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(context)), dtype=torch.long, device=logits.device)
            score = logits[seen]
            logits = logits.index_put(
                (seen,), torch.where(score > 0, score / s.repetition_penalty, score * s.repetition_penalty)
            )
        if s.greedy:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / s.temperature, -1)
        ids = None
        if s.top_k or s.top_p < 1:
            vocabulary = len(probabilities)
            top, ids = probabilities.topk(min(s.top_k or CANDIDATES, vocabulary))
            if not s.top_k and float(top.sum()) < s.top_p:
                top, ids = probabilities.sort(descending=True)
            if s.top_k:
                top = top / top.sum()
            # A token stays while those before it have not reached top_p, so the first always stays.
            probabilities = top * (top.cumsum(-1) - top < s.top_p)
        cumulative = probabilities.double().cumsum(-1)
        # random() stays below 1, so the index that is drawn lies before the end.
        index = int(torch.searchsorted(cumulative, self.random.random() * float(cumulative[-1]), right=True))
        return int(ids[index]) if ids is not None else index


class TextStream:
    """Turn tokens into text that never has to be taken back: whole characters, and no beginning of a stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.decoded = self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that is now certain."""
        self.ids.append(token)
        piece = self.decoder.step(self.tokenizer.backend_tokenizer, token) or ""
        self.decoded += piece
        return self._release(piece)

    def end(self) -> str:
        """Return what was held back, with a half character as the replacement character."""
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        tail = whole[len(self.decoded) :] if whole.startswith(self.decoded) else ""
        return self._release(tail, last=True)

    def _release(self, piece: str, last: bool = False) -> str:
        text = self.held + piece
        matches = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return text[: min(matches)]
        certain = len(text) if last else self._possible_stop(text)
        self.held = text[certain:]
        return text[:certain]

    def _possible_stop(self, text: str) -> int:
        """Return the first index from which on the text may be the beginning of a stop string."""
        return next(
            (at for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in self.stops)),
            len(text),
        )
