"""From logits to tokens and from tokens to text, one request at a time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Below this temperature the most likely token wins with certainty in any float type.
GREEDY_BELOW = 1e-4


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

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
        s = self.sampling
        return s.greedy and not self._penalises

    @property
    def draws_plainly(self) -> bool:
        """Return whether the token is drawn from the logits as they are, by temperature, top_k and top_p."""
        return not self.sampling.greedy and not self._penalises and not self.sampling.min_p

    @property
    def _penalises(self) -> bool:
        s = self.sampling
        return bool(s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty or s.logit_bias)

    def choose(
        self,
        logits: torch.Tensor,
        prompt: Sequence[int],
        answer: Sequence[int] = (),
        allowed: torch.Tensor | None = None,
    ) -> int:
        """Choose one token.

        logits: (V,); allowed: the tokens that a grammar allows now, bool (V,). A repetition penalty looks at prompt and
        answer, presence and frequency penalties look at the answer alone, as those of other servers do.
        """
        import torch

        s = self.sampling
        logits = self._penalised(logits.float(), prompt, answer)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        if s.greedy:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / s.temperature, -1)
        if s.min_p:
            probabilities = probabilities * (probabilities >= s.min_p * probabilities.max())
            probabilities = probabilities / probabilities.sum()
        return _draw(probabilities[None], [self])[0]

    def _penalised(self, logits: torch.Tensor, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Return the logits with biases and penalties, in the order of vLLM."""
        import torch

        s, device = self.sampling, logits.device
        if s.logit_bias:
            tokens, biases = zip(*s.logit_bias, strict=True)
            logits = logits.index_add(0, torch.tensor(tokens, device=device), torch.tensor(biases, device=device))
        if s.repetition_penalty != 1:
            seen = torch.tensor(sorted({*prompt, *answer}), dtype=torch.long, device=device)
            score = logits[seen]
            logits = logits.index_put(
                (seen,), torch.where(score > 0, score / s.repetition_penalty, score * s.repetition_penalty)
            )
        if answer and (s.presence_penalty or s.frequency_penalty):
            counts = Counter(answer)
            penalties = [s.presence_penalty + s.frequency_penalty * count for count in counts.values()]
            ids = torch.tensor(list(counts), device=device)
            logits = logits.index_add(0, ids, -torch.tensor(penalties, device=device))
        return logits


def choose_together(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Choose a token for each row of logits (B, V) whose sampler draws plainly: the one that it would choose alone."""
    import torch

    tokens = [0] * len(samplers)
    alike: dict[tuple[int, bool], list[int]] = {}  # rows that take the same steps
    for row, sampler in enumerate(samplers):
        alike.setdefault((sampler.sampling.top_k, sampler.sampling.top_p < 1), []).append(row)
    for rows in alike.values():
        some = [samplers[row] for row in rows]
        temperatures = torch.tensor([each.sampling.temperature for each in some], device=logits.device)[:, None]
        for row, token in zip(rows, _draw((logits[rows].float() / temperatures).softmax(-1), some), strict=True):
            tokens[row] = token
    return tokens


def _draw(probabilities: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw a token from each row of probabilities (B, V); all rows have the same top_k, and a top_p or none."""
    import torch

    from scripts.model.generation import choose_among_likeliest

    top_k, device = samplers[0].sampling.top_k, probabilities.device
    top_p = torch.tensor([each.sampling.top_p for each in samplers], device=device)[:, None]
    drawn = torch.tensor([each.random.random() for each in samplers], dtype=torch.float64, device=device)[:, None]
    if not top_k and samplers[0].sampling.top_p == 1:
        return _places(probabilities, drawn)[:, 0].tolist()

    def place(top: torch.Tensor, rows: Any) -> torch.Tensor:
        if top_k:
            top = top / top.sum(-1, keepdim=True)
        # A token stays while those before it have not reached top_p, so the first always stays.
        return _places(top * (top.cumsum(-1) - top < top_p[rows]), drawn[rows])

    return choose_among_likeliest(probabilities, top_k, lambda top: top.sum(-1) < top_p[:, 0], place)


def _places(probabilities: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Return where numbers from 0 to below 1 fall, (B, 1); none is 1, so the place lies before the end."""
    import torch

    cumulative = probabilities.double().cumsum(-1)
    return torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability in nats, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def measure(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probability of one token for each row of logits, (T, V), before penalties and temperature."""
    import torch

    logps = torch.log_softmax(logits.float(), -1)
    chosen = logps.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if not top:
        return [TokenLogprob(token, logp) for token, logp in zip(tokens, chosen, strict=True)]
    values, ids = logps.topk(min(top, logps.shape[-1]))
    pairs = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*row) for row in zip(tokens, chosen, pairs, strict=True)]


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
