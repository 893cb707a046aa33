"""Answers that fit a JSON schema: llguidance says which tokens may come next, and the sampler chooses among them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

from serve.errors import ServingError

if TYPE_CHECKING:
    import torch

MAX_SCHEMA_BYTES = 32 * 1024
MAX_SCHEMA_DEPTH = 16
COMPILE_SECONDS = 5.0
# Regular expressions of a client are code that runs here, so no schema brings one.
REFUSED_KEYS = {"pattern", "patternProperties"}
# Values below these keys are data, in which a `pattern` is only a word.
DATA_KEYS = {"const", "enum", "default", "examples", "example", "dependentRequired"}
# Below these keys stand names that the client chose, each with a schema.
NAMED_SCHEMAS = {"properties", "$defs", "definitions", "dependentSchemas"}
# Written as Python's json does, as in most text that models read. Free white space would let a model write it for ever.
FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """Follow one answer and say which tokens may come next."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def copy(self) -> Constraint:
        """Return the same for another answer."""
        return Constraint(self.matcher.deep_copy())

    def allowed(self, width: int, device: torch.device) -> torch.Tensor:
        """Return the tokens that may come next, bool (V,); V may be larger than the tokenizer."""
        import numpy
        import torch

        bits = numpy.frombuffer(self.matcher.compute_bitmask(), dtype=numpy.uint8)
        self._check()
        mask = torch.from_numpy(numpy.unpackbits(bits, bitorder="little").astype(bool))
        allowed = torch.zeros(width, dtype=torch.bool)
        allowed[: len(mask)] = mask[:width]
        return allowed.to(device)

    def take(self, token: int) -> None:
        """Note the token that was chosen."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise ValueError(f"the schema cannot be followed: {self.matcher.get_error()}")


class SchemaCompiler:
    """Make constraints from schemas, off the event loop and within a limit of time."""

    def __init__(self, tokenizer: Any, stop_ids: set[int]) -> None:
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self._compiling = ThreadPoolExecutor(2, "schemas")

    async def compile(self, schema: dict[str, Any] | None, param: str) -> Constraint:
        """Return a constraint for an answer that fits the schema; None is any JSON object.

        Raises: ServingError naming what is not supported.
        """
        if schema is not None:
            check_schema(schema, param)
        text = json.dumps({"type": "object"} if schema is None else schema)
        compiling = asyncio.get_running_loop().run_in_executor(self._compiling, self._compile, text)
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                matcher = await asyncio.shield(compiling)
        except ValueError as error:
            raise _unsupported(f"the schema cannot be read: {' '.join(str(error).split())[:200]}", param) from None
        except TimeoutError:
            raise _unsupported(f"the schema could not be prepared within {COMPILE_SECONDS:g} s", param) from None
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise _unsupported(f"the schema is not supported: {reason}", param)
        return Constraint(matcher)

    @cached_property
    def _vocabulary(self) -> Any:
        from llguidance import hf

        return hf.from_tokenizer(self.tokenizer, eos_token=sorted(self.stop_ids))

    def _compile(self, schema: str) -> Any:
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=FORM)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if not matcher.is_error():
            matcher.deep_copy().compute_bitmask()  # some limits are only met where the first token is looked for
        return matcher


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Refuse a schema that is too large, too deep, or brings regular expressions.

    Raises: ServingError with the place and the limit.
    """
    size = len(json.dumps(schema, ensure_ascii=False).encode())
    if size > MAX_SCHEMA_BYTES:
        raise _unsupported(f"the schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are supported", param)
    for keyword, depth in _keywords(schema, 1):
        if depth > MAX_SCHEMA_DEPTH:
            raise _unsupported(f"the schema is more than {MAX_SCHEMA_DEPTH} levels deep", param)
        if keyword in REFUSED_KEYS:
            raise _unsupported(f"the schema uses `{keyword}`, which is not supported", param)


def _keywords(schema: dict[str, Any], depth: int) -> Iterator[tuple[str, int]]:
    """Yield every keyword of a schema and of those below it, and how deep it stands."""
    for keyword, value in schema.items():
        yield keyword, depth
        below = value if isinstance(value, list) else [value]
        if keyword in NAMED_SCHEMAS and isinstance(value, dict):
            below = list(value.values())
        for part in below:
            if isinstance(part, dict) and keyword not in DATA_KEYS:
                yield from _keywords(part, depth + 1)


def _unsupported(message: str, param: str) -> ServingError:
    return ServingError(422, "unsupported_schema", message, param)
