"""What requests may say. Everything is strict, bounded and finite, and an unknown field is refused."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from scripts.dataset.records import Message as PlainMessage
from scripts.dataset.records import takes_turns
from scripts.pairs.votes import Outcome
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

    prompt_field: ClassVar[str] = "prompt"

    temperature: float = Field(0.0, ge=0, le=2, description="0 takes the most likely token each time.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the likeliest tokens that together reach this.")
    top_k: int | None = Field(None, ge=1, description="Draw among this many likeliest tokens.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Draw among tokens at least so likely, relative to the likeliest."
    )
    repetition_penalty: float = Field(1.0, gt=0, le=2, description="Above 1 makes tokens seen before less likely.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Lowers the logit of each token the answer has.")
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Lowers a token's logit for each time the answer has it."
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="The same seed gives the same text (exactly so in fp32). Answer i gets seed + i.",
    )
    stop: StopText | Stops | None = Field(None, description="The answer ends before the first of these texts.")

    def sampling(self, number: int = 0) -> Sampling:
        """Return the engine's form for one of several answers to a prompt."""
        seed = None if self.seed is None or self.seed < 0 else self.seed + number
        return Sampling(
            self.temperature, self.top_p, self.top_k or 0, self.repetition_penalty, seed, self.min_p,
            self.presence_penalty, self.frequency_penalty, self.biases(),
        )  # fmt: skip

    def biases(self) -> tuple[tuple[int, float], ...]:
        """Return what is added to the logits of single tokens."""
        return ()

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def limit(self) -> tuple[str, int | None]:
        """Return the field that bounds the answer, and the bound in tokens."""
        return "max_new_tokens", getattr(self, "max_new_tokens", None)


class GenerateRequest(SamplingFields):
    prompt: Text = Field(description="One user turn; with `raw`, the exact text to continue.")
    adapter: ModelName | None = Field(None, description="base, sft, dpo or another served name; null is the default.")
    max_new_tokens: TokenCount | None = Field(None, description="Longest answer in tokens.")
    stream: bool = Field(False, description="Answer as server-sent events.")
    raw: bool = Field(False, description="Send the prompt without the chat template.")
    n: int = Field(1, ge=1, le=4, description="Answers to the prompt, under `answers` where there are several.")


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


def _ends_with_user(prompt: list[Message]) -> list[Message]:
    if not takes_turns([message.role for message in prompt], last="user"):
        raise ValueError("wanted [system,] user, assistant, … ending with user")
    return prompt


Conversation = Annotated[list[Message], Field(min_length=1, max_length=1024), AfterValidator(_ends_with_user)]


class VoteRequest(Body):
    """A person's choice between two answers; stored as a preference record."""

    prompt: Conversation
    chosen: Text
    rejected: Text
    chosen_model: ModelName
    rejected_model: ModelName
    seed: int | None = None

    @model_validator(mode="after")
    def _differ(self) -> VoteRequest:
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text")
        return self


class ThumbRequest(Body):
    """A thumb on one answer; stored as a record that scripts.train_kto reads."""

    prompt: Conversation
    completion: Text
    label: bool = Field(description="true for a thumb up, false for a thumb down.")
    model: ModelName
    seed: int | None = None


class QueueVoteRequest(Body):
    """What a person says of the samples of one prompt of the queue."""

    key: Text = Field(description="The prompt, by the key under which /v1/queue gave it.")
    adapter: Text = Field(description="The sha256 that /v1/queue gave.")
    samples: Annotated[list[Text], Field(min_length=1, max_length=64)] = Field(description="The samples, as given.")
    outcome: Outcome = Field(description="`undone` takes back an earlier vote on the same samples.")
    best: int | None = Field(None, description="Number of a sample, from 0, with the outcome `best`.")
    worst: int | None = Field(None, description="Number of a sample, from 0, with the outcome `best`.")
    own: str | None = Field(None, description="An answer better than all samples, with the outcome `own`.")


class QueueItem(BaseModel):
    key: str
    messages: list[PlainMessage]
    samples: list[str]
    margin: float


class QueueAnswer(BaseModel):
    """The next prompt, that of the smallest margin between the samples' implicit rewards, and how far the queue is."""

    adapter: str
    item: QueueItem | None
    drawing: bool = Field(description="More samples are being drawn; ask again in a second.")
    ready: int = Field(description="Prompts whose samples are drawn.")
    votes: int
    pairs: int
    left: int
    held_out: int
    skipped: dict[str, int]


class AdapterRequest(Body):
    """An adapter to serve from now on."""

    name: ModelName = Field(description="The name by which requests choose it: letters, digits and _.")
    path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="Its folder below serve.adapters_root."
    )
