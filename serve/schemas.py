"""What requests may say. Everything is strict, bounded and finite, and an unknown field is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from scripts.dataset.records import takes_turns
from serve.sampling import Sampling

Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[StopText], Field(max_length=4)]
ModelName = Annotated[str, Field(max_length=256)]
TokenCount = Annotated[int, Field(ge=1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class SamplingFields(Body):
    """How tokens are chosen, in every request that generates."""

    temperature: float = Field(0.0, ge=0, le=2, description="0 takes the most likely token each time.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the likeliest tokens that together reach this.")
    top_k: int | None = Field(None, ge=1, description="Draw among this many likeliest tokens.")
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="Above 1 makes tokens seen before less likely.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="The same seed gives the same text (exactly so in fp32)."
    )
    stop: StopText | Stops | None = Field(None, description="The answer ends before the first of these texts.")

    def sampling(self) -> Sampling:
        """Return the engine's form."""
        return Sampling(self.temperature, self.top_p, self.top_k or 0, self.repetition_penalty, self.seed)

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class GenerateRequest(SamplingFields):
    prompt: Text = Field(description="One user turn; with `raw`, the exact text to continue.")
    adapter: ModelName | None = Field(None, description="base, sft, dpo or another served name; null is the default.")
    max_new_tokens: TokenCount | None = Field(None, description="Longest answer in tokens.")
    stream: bool = Field(False, description="Answer as server-sent events.")
    raw: bool = Field(False, description="Send the prompt without the chat template.")


class CompareRequest(SamplingFields):
    prompt: Text
    adapters: Annotated[list[ModelName], Field(min_length=1, max_length=8)] | None = Field(
        None, description="Which models answer; null is all."
    )
    max_new_tokens: TokenCount | None = None


class ScoreRequest(Body):
    prompt: Text
    answer: Text = Field(description="The answer whose probability is measured.")
    adapter: ModelName | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class GenerateAnswer(BaseModel):
    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    adapter: str


class CompareAnswer(BaseModel):
    answers: list[GenerateAnswer]


class ScoreAnswer(BaseModel):
    """Sums over the answer's tokens, in nats; the implicit reward is beta x (logprob - reference_logprob)."""

    adapter: str
    logprob: float
    tokens: int
    reference: str
    reference_logprob: float
    beta: float
    implicit_reward: float


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str


class StreamOptions(Body):
    include_usage: bool = False


class OpenAIFields(SamplingFields):
    """What both OpenAI routes share; their sampling default is OpenAI's."""

    model: ModelName | None = Field(None, description="A name of /v1/models; null is the default.")
    temperature: float = Field(1.0, ge=0, le=2)
    max_tokens: TokenCount | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> OpenAIFields:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self


class CompletionRequest(OpenAIFields):
    prompt: Text = Field(description="The exact text to continue; no chat template is applied.")


class ChatRequest(OpenAIFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: TokenCount | None = None

    @field_validator("messages")
    @classmethod
    def _ends_with_user(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role != "user":
            raise ValueError("the last message must be of the user")
        if not messages[-1].content:
            raise ValueError("the last message is empty")
        return messages


class VoteRequest(Body):
    """A person's choice between two answers; stored as a preference record."""

    prompt: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    chosen: Text
    rejected: Text
    chosen_model: ModelName
    rejected_model: ModelName
    seed: int | None = None

    @field_validator("prompt")
    @classmethod
    def _alternates(cls, prompt: list[Message]) -> list[Message]:
        if not takes_turns([message.role for message in prompt], last="user"):
            raise ValueError("wanted [system,] user, assistant, … ending with user")
        return prompt

    @model_validator(mode="after")
    def _differ(self) -> VoteRequest:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text")
        return self
