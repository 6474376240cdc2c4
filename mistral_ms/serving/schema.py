"""What clients ask for, in OpenAI's names; what is not offered is refused, not ignored."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast

from pydantic import Field, StrictBool, StrictInt, field_validator, model_validator

from mistral_ms.config.base import Frozen
from mistral_ms.config.generation import (
    LARGEST_REPETITION_PENALTY,
    LEAST_REPETITION_PENALTY,
)

Ids: TypeAlias = list[StrictInt]
COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` for completions."""


class StreamOptions(Frozen):
    """What a stream has beside its text.

    Attributes:
        include_usage: a last chunk counts tokens.
    """

    include_usage: bool = False


class Request(Frozen):
    """What both kinds share.

    Attributes:
        model: the served one's name.
        max_tokens: the most new tokens.
        temperature: None is the server's default.
        top_p: likewise.
        top_k: likewise; not OpenAI's, but that of other servers.
        repetition_penalty: likewise.
        seed: of the random draws; None draws one.
        stop: strings before which the answer ends.
        stream: server-sent events.
        stream_options: of a stream.
        n: answers to each prompt.
        frequency_penalty: not offered, as are presence_penalty and logit_bias.
        user: has no effect, as have metadata, store and service_tier.
    """

    model: str
    max_tokens: StrictInt | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(
        default=None, ge=LEAST_REPETITION_PENALTY, le=LARGEST_REPETITION_PENALTY
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    @field_validator("frequency_penalty", "presence_penalty", mode="before")
    @classmethod
    def _zero(cls, value: Any) -> Any:
        """0.0, too, which is no Literal[0]."""
        return 0 if value == 0 and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _stops_are_few(self) -> Request:
        if any(not stop for stop in self.stops):
            raise ValueError("stop: a stop string must not be empty")
        if len(self.stops) > 16:
            raise ValueError("stop: at most 16 strings")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def told_tokens(self) -> int | None:
        """The most new tokens, where the request says how many."""
        return self.max_tokens

    @property
    def new_tokens(self) -> int | None:
        """The most new tokens; None: as many as there are positions."""
        return self.told_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return False

    @property
    def alternatives(self) -> int:
        """How many likely tokens are told in the place of each."""
        return 0


class TextPart(Frozen):
    """A part of a message.

    Attributes:
        type: only text.
        text: the text.
    """

    type: Literal["text"]
    text: str


class Message(Frozen):
    """A turn of a conversation.

    Attributes:
        role: whose it is; the chat format knows which.
        content: its text, whole or in parts.
        name: for chat templates that take it.
    """

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def as_dict(self) -> dict[str, str]:
        """For a chat format."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": text, **named}


class TextFormat(Frozen):
    """The shape of an answer.

    Attributes:
        type: only text.
    """

    type: Literal["text"]


class ChatRequest(Request):
    """The body of ``/v1/chat/completions``.

    Attributes:
        messages: the conversation.
        max_completion_tokens: the newer name of ``max_tokens``.
        logprobs: tell log-probabilities.
        top_logprobs: and those of so many likely tokens.
        response_format: only text.
        tools: not offered.
    """

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: list[Any] | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("tools are not supported here")
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens")
        return self

    @property
    def told_tokens(self) -> int | None:
        """See the base."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """See the base."""
        return bool(self.logprobs)

    @property
    def alternatives(self) -> int:
        """See the base."""
        return self.top_logprobs or 0


class CompletionRequest(Request):
    """The body of ``/v1/completions``.

    Attributes:
        prompt: a text or token ids, or several of them: each has an answer.
        logprobs: tell log-probabilities, and those of so many likely tokens.
        echo: not offered, as are best_of and suffix.
    """

    prompt: str | list[str] | Ids | list[Ids]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = False
    best_of: Literal[1] | None = 1
    suffix: Literal[""] | None = None

    @field_validator("echo")
    @classmethod
    def _no_echo(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("the prompt cannot be repeated here")
        return value

    @property
    def prompts(self) -> list[str | Ids]:
        """All of them."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt or isinstance(prompt[0], int):
            return [cast(Ids, prompt)]
        return cast("list[str | Ids]", prompt)

    @property
    def new_tokens(self) -> int | None:
        """See the base."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """See the base."""
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        """See the base."""
        return self.logprobs or 0
