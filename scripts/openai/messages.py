"""What clients of the OpenAI API send and get, as pydantic models: they check requests and are the OpenAPI description.

Names, defaults and ranges are OpenAI's (https://platform.openai.com/docs/api-reference/chat/create and /completions/create). What a
request asks for and this server cannot do is refused by name; what changes no answer (user, metadata, ...) is taken and left alone.
"""

import re
from typing import Annotated, Any, Dict, List, Literal, Optional, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

# OpenAI's own limit of alternatives; how many fit is the engine's concern
MAX_CHOICES = 128
# A stop string is looked for in every piece of text: as long as a word may be for Triton's clients (sent.py)
MAX_STOPS, MAX_STOP_BYTES = 16, 512
# Lists end at these lengths and at their first mistake: a body of 4 MB once made four million reports, and 38 seconds of work
MAX_PROMPTS, MAX_TOKENS, MAX_TURNS, MAX_BIASES = 1024, 1 << 17, 4096, 1024
# what a name in an error's place looks like; pydantic's own alternatives (str, list[str]) are no names of the API
NAME = re.compile(r"(?!str$)[a-z_]+")


# JSON has one kind of number: 5.0 is as whole as 5
Whole = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
]
TokenId = Annotated[int, Field(ge=0)]


TokenIds = Annotated[List[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Texts = Annotated[List[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class Strict(BaseModel):
    """No key is unknown, no "5" is a number."""

    # NaN and Infinity are no JSON, but Python's parsers take them
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """The first unknown key ends it: pydantic would report each, and a body of 2.5 MB has a quarter of a million."""
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    raise PydanticCustomError("extra_forbidden", "{name}", {"name": str(name)[:64]})
        return data


def _biases(value: Any) -> Any:
    """The first mistake ends it, as in lists: pydantic would report each."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise ValueError(f"it has {len(value)} token ids; at most {MAX_BIASES} are taken")
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError(f"its keys are token ids; {token[:20]!r} is none")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise ValueError(f"a bias is a number; that of {token} is none")
        if not -100 <= bias <= 100:
            raise ValueError(f"a bias lies between -100 and 100; {str(bias)[:20]} does not")
    return value


class StreamOptions(Strict):
    include_usage: Optional[bool] = None
    # pads chunks against eavesdroppers who count bytes; it is asked for by newer clients and changes no text
    include_obfuscation: Optional[bool] = None


class Sampling(Strict):
    """What both ways of asking have in common."""

    model: str = Field(description="The id that /v1/models gives")
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None
    n: Optional[Whole] = Field(None, ge=1, le=MAX_CHOICES)
    temperature: Optional[float] = Field(None, ge=0, le=2, description="1 where nothing is said; 0 is greedy")
    top_p: Optional[float] = Field(None, ge=0, le=1)
    presence_penalty: Optional[float] = Field(None, ge=-2, le=2)
    frequency_penalty: Optional[float] = Field(None, ge=-2, le=2)
    seed: Optional[Whole] = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Union[str, Annotated[List[str], Field(max_length=MAX_STOPS, fail_fast=True)], None] = Field(
        None, description="None of it is in the answer"
    )
    logit_bias: Annotated[Optional[Dict[str, float]], BeforeValidator(_biases)] = Field(
        None, max_length=MAX_BIASES, description="Token id to what is added to its logit, -100 to 100"
    )
    # not OpenAI's, but TensorRT-LLM's and vLLM's
    top_k: Optional[Whole] = Field(None, ge=0, lt=1 << 31)
    # from what does not vanish in float32
    repetition_penalty: Optional[float] = Field(None, ge=0.01, le=100)
    min_tokens: Optional[Whole] = Field(None, ge=0, lt=1 << 31)
    # taken and left alone: they change no answer
    user: Optional[str] = None
    metadata: Optional[Dict[str, Any]] = None
    store: Optional[bool] = None
    service_tier: Optional[str] = None
    safety_identifier: Optional[str] = None
    prompt_cache_key: Optional[str] = None
    # OpenAI's, not supported: null says that it is not asked for
    modalities: None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Union[str, List[str], None]) -> Union[str, List[str], None]:
        longest = max((len(stop.encode()) for stop in ([value] if isinstance(value, str) else value or [])), default=0)
        if longest > MAX_STOP_BYTES:
            raise ValueError(f"a stop string has {longest} bytes; one may have {MAX_STOP_BYTES}")
        return value

    @property
    def stops(self) -> List[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: Union[
        str, Texts, TokenIds, Annotated[List[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ]
    max_tokens: Optional[Whole] = Field(None, ge=1, lt=1 << 31, description="16 where nothing is said")
    echo: Optional[bool] = None
    logprobs: Optional[Whole] = Field(None, ge=0, le=5, description="0: of the chosen tokens; more is not supported")
    best_of: Optional[Whole] = Field(None, ge=1, le=MAX_CHOICES)
    suffix: Optional[str] = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Union[str, Annotated[List[TextPart], Field(max_length=MAX_TURNS, fail_fast=True)]]
    name: Optional[str] = None
    # what an assistant's turn carries when it comes back as it was sent
    refusal: None = None
    annotations: Optional[List[Any]] = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: Optional[List[Any]] = Field(None, max_length=0)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[List[Message], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]
    max_tokens: Optional[Whole] = Field(None, ge=1, lt=1 << 31)
    max_completion_tokens: Optional[Whole] = Field(
        None, ge=1, lt=1 << 31, description="As many as fit where nothing is said"
    )
    logprobs: Optional[bool] = None
    top_logprobs: Optional[Whole] = Field(None, ge=0, le=20, description="0; more is not supported")
    response_format: Optional[ResponseFormat] = None
    tools: Optional[List[Any]] = Field(None, max_length=0, description="Not supported")
    tool_choice: Optional[Literal["none", "auto"]] = None
    parallel_tool_calls: Optional[bool] = None
    functions: Optional[List[Any]] = Field(None, max_length=0, description="Not supported")
    function_call: Optional[Literal["none", "auto"]] = None


# --- what clients get ------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: List[str]
    token_logprobs: List[float]
    top_logprobs: None
    text_offset: List[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Optional[CompletionLogprobs]
    finish_reason: Optional[Literal["stop", "length"]]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: List[CompletionChoice]
    usage: Optional[Usage]


class TokenLogprob(BaseModel):
    token: str
    bytes: List[int]
    logprob: float
    top_logprobs: List[Any]


class ChatLogprobs(BaseModel):
    content: List[TokenLogprob]
    refusal: None


class Answer(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: Optional[ChatLogprobs]
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: List[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    # not OpenAI's: tokens of prompt and answer together (vLLM's name for it), and whether chat is possible
    max_model_len: int
    has_chat_template: bool


class Models(BaseModel):
    object: Literal["list"]
    data: List[Model]


class Health(BaseModel):
    status: Literal["ok"]
    # answers that are in progress or wait, and how many the engine makes at a time
    requests: int
    slots: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: Optional[str]
    code: Optional[str]


class Error(BaseModel):
    error: ErrorBody
