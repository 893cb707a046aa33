"""Log-probabilities as OpenAI's two routes write them: tokens as texts, with the likeliest in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from serve.sampling import TokenLogprob

# A token is written behind another one: some tokenizers drop the space before a text's first token.
ANCHOR = "a"
REPLACEMENT = "\ufffd"


def chat_logprobs(tokenizer: Any, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the logprobs of a chat answer."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token),
            "logprob": logprob,
            "bytes": list(token_bytes(tokenizer, token)),
        }

    content = [
        {**entry(token.token, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Any, prompt: tuple[int, list[TokenLogprob]] | None, tokens: Sequence[TokenLogprob], top: int, offset: int
) -> dict[str, Any]:
    """Return the logprobs of a completion, of which some may be the prompt's.

    prompt: its first token, which nothing predicts, and those behind it; offset: characters before the first text.
    """
    first, measured = prompt or (None, [])
    texts = [] if first is None else [token_text(tokenizer, first)]
    logprobs: list[float | None] = [None] * len(texts)
    tops: list[dict[str, float] | None] = [None] * len(texts)
    for token in [*measured, *tokens]:
        texts.append(token_text(tokenizer, token.token))
        logprobs.append(token.logprob)
        tops.append(_by_text(tokenizer, [*token.top, (token.token, token.logprob)]) if top else None)
    offsets, at = [], offset
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops if top else None, "text_offset": offsets}


def _by_text(tokenizer: Any, pairs: Iterable[tuple[int, float]]) -> dict[str, float]:
    """Return the likeliest first; where two tokens have the same text, the likelier counts."""
    by_text: dict[str, float] = {}
    for token, logprob in pairs:
        by_text.setdefault(token_text(tokenizer, token), logprob)
    return by_text


@lru_cache(maxsize=65_536)
def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of a token within a longer text; a part of a character becomes the replacement character."""
    anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, both = tokenizer.decode(anchor, **options), tokenizer.decode([*anchor, token], **options)
    return str(both[len(before) :]) if both.startswith(before) else str(tokenizer.decode([token], **options))


@lru_cache(maxsize=65_536)
def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes of a token, which may be a part of a character."""
    text = token_text(tokenizer, token)
    if REPLACEMENT not in text:
        return text.encode()
    name = tokenizer.convert_ids_to_tokens(token) or ""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", name):  # sentencepiece's bytes
        return bytes.fromhex(match[1])
    alphabet = _byte_alphabet()
    return bytes(alphabet[character] for character in name) if set(name) <= alphabet.keys() else text.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Return the byte for each character in which byte-level tokenizers write it, as GPT-2 began to."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(others)}
