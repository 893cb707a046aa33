"""What the two OpenAI routes take: all that clients send, where it can be done or means nothing; the rest is refused by name."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from serve.schemas import Body, ModelName, SamplingFields, Text, TokenCount

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_LOGPROBS = 20

# Marks fields that cannot be supported, with the values that ask for nothing.
HARMLESS = "x-harmless"


def no_effect() -> Any:
    """Return a field that is taken and changes nothing."""
    return Field(None, description="Taken, and changes nothing.")


def refused(*harmless: Any) -> Any:
    """Return a field that asks for what cannot be done, unless it is null, empty, or one of some values."""
    values = " or ".join(["empty", *(f"`{value}`" for value in harmless)])
    return Field(None, description=f"Refused unless {values}.", json_schema_extra={HARMLESS: list(harmless)})


class ClientBody(Body):
    """A body of OpenAI's clients, or a part of one."""

    @field_validator("*")
    @classmethod
    def _is_supported(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        if isinstance(extra, dict) and HARMLESS in extra and value and value not in cast(list[Any], extra[HARMLESS]):
            raise ValueError("this server does not support it")
        return value


class StreamOptions(ClientBody):
    include_usage: bool = False
    include_obfuscation: Any = no_effect()


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    name: Annotated[str, Field(max_length=64)] = "answer"
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class OpenAIFields(ClientBody, SamplingFields):
    """What both OpenAI routes share; their sampling default is OpenAI's."""

    model: ModelName | None = Field(None, description="A name of /v1/models; null is the default.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the most likely token each time.")
    seed: int | None = Field(
        None, ge=-1, lt=2**63, description="The same seed gives the same text; -1 is none. Answer i gets seed + i."
    )
    top_k: int | None = Field(None, ge=-1, description="Draw among this many likeliest tokens; 0 and -1 are all.")
    max_tokens: TokenCount | None = Field(None, description="Longest answer in tokens.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Answers to each prompt.")
    stream: bool = Field(False, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="`include_usage` adds the usage as the last chunk.")
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=1024, description="Added to the logits of token ids."
    )
    response_format: ResponseFormat | None = Field(
        None, description="`text`, `json_object`, or `json_schema` with a schema that the answer then fits."
    )
    user: Any = no_effect()
    metadata: Any = no_effect()
    store: Any = no_effect()
    service_tier: Any = no_effect()
    safety_identifier: Any = no_effect()
    prompt_cache_key: Any = no_effect()
    prompt_cache_retention: Any = no_effect()
    # Other servers' own, which their clients send with the defaults.
    ignore_eos: Any = refused(False)
    use_beam_search: Any = refused(False)
    length_penalty: Any = refused(1)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_absent(cls, body: Any) -> Any:
        """Drop what is null, and what is empty in a field of which nothing is known."""
        if not isinstance(body, dict):
            return body
        said = {key: value for key, value in body.items() if value is not None}
        return {key: value for key, value in said.items() if key in cls.model_fields or value not in ([], {}, "")}

    @field_validator("top_k")
    @classmethod
    def _all_is_no_limit(cls, top_k: int | None) -> int | None:
        return top_k if top_k and top_k > 0 else None

    @model_validator(mode="after")
    def _options_need_stream(self) -> OpenAIFields:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only allowed with stream: true")
        return self

    def biases(self) -> tuple[tuple[int, float], ...]:
        """Return what is added to the logits of single tokens."""
        return tuple((int(token), bias) for token, bias in self.logit_bias.items())

    def limit(self) -> tuple[str, int | None]:
        """Return the field that bounds the answer, and the bound in tokens."""
        return "max_tokens", self.max_tokens

    def logprobs_asked(self) -> int | None:
        """Return how many likeliest tokens are wanted beside each token, or None when nothing is."""
        raise NotImplementedError


class CompletionRequest(OpenAIFields):
    prompt: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)] = Field(
        description="The exact text to continue, its token ids, or a list of either; no chat template is applied."
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="Longest answer in tokens.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | Literal[False] | None = Field(
        None, description="Log-probabilities of each token and of so many likeliest ones."
    )
    echo: bool = Field(False, description="Begin the text with the prompt, whose tokens are then measured, too.")
    suffix: Any = refused()
    best_of: int | None = Field(None, description="Refused unless it is `n`.")

    @model_validator(mode="after")
    def _all_are_returned(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported unless it is n")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    def logprobs_asked(self) -> int | None:
        """Return how many likeliest tokens are wanted beside each token, or None when nothing is."""
        return None if self.logprobs is False else self.logprobs


class Part(Body):
    """A piece of a message's content; only texts can be read."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal") and re.fullmatch(r"\w{1,40}", kind, re.ASCII):
            raise ValueError(f"parts of the type {kind} are not supported")
        return part


class ChatMessage(ClientBody):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=1024)]
    name: Any = no_effect()
    refusal: str | None = None
    tool_calls: Any = refused()
    function_call: Any = refused()
    audio: Any = refused()

    @model_validator(mode="before")
    @classmethod
    def _as_histories_have_it(cls, message: Any) -> Any:
        """Drop what is empty, as clients send earlier answers back with all their fields."""
        if not isinstance(message, dict):
            return message
        if message.get("role") in ("tool", "function"):
            raise ValueError("tools are not supported")
        kept = {key: value for key, value in message.items() if key == "content" or value not in (None, [], {})}
        is_answer = message.get("role") == "assistant" and {"tool_calls", "function_call", "refusal"} & message.keys()
        if is_answer and kept.get("content") is None:
            kept["content"] = message.get("refusal") or ""
        return kept

    def as_plain(self) -> dict[str, str]:
        """Return role and text, as templates read them."""
        text = self.content if isinstance(self.content, str) else "".join(p.text or p.refusal for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(OpenAIFields):
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)] = Field(
        description="The conversation. When the last message is the assistant's, the answer continues it."
    )
    max_completion_tokens: TokenCount | None = Field(None, description="Longest answer in tokens.")
    logprobs: bool = Field(False, description="Log-probabilities of each token.")
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description="So many likeliest tokens beside each token.")
    echo: Any = refused(False)
    best_of: Any = refused(1)
    tools: Any = refused()
    tool_choice: Any = refused("none", "auto")
    parallel_tool_calls: Any = no_effect()
    functions: Any = refused()
    function_call: Any = refused("none", "auto")
    audio: Any = refused()
    modalities: Any = refused(["text"])
    web_search_options: Any = refused()
    reasoning_effort: Any = refused("none")
    verbosity: Any = refused("medium")
    prediction: Any = no_effect()

    @field_validator("messages")
    @classmethod
    def _asks_something(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        *before, last = messages
        if last.role == "assistant" and before:
            last = before[-1]
        if last.role != "user":
            raise ValueError("the last message must be of the user, or be one of the assistant behind it")
        if not last.as_plain()["content"]:
            raise ValueError("the last message of the user is empty")
        return messages

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed with logprobs: true")
        return self

    def limit(self) -> tuple[str, int | None]:
        """Return the field that bounds the answer, and the bound in tokens."""
        if self.max_completion_tokens:
            return "max_completion_tokens", self.max_completion_tokens
        return super().limit()

    def logprobs_asked(self) -> int | None:
        """Return how many likeliest tokens are wanted beside each token, or None when nothing is."""
        return self.top_logprobs if self.logprobs else None
