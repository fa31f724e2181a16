"""What clients of the OpenAI API send and get, as pydantic models: they check requests and are the OpenAPI description.

Names, defaults and ranges are OpenAI's (https://platform.openai.com/docs/api-reference/chat/create and
/completions/create). What a request asks for and this server cannot do is refused by name; arguments that change no
answer (user, metadata, ...) are ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

# OpenAI's own limit of alternatives; the engine may allow fewer
MAX_CHOICES = 128
# A stop string is looked for in every piece of text, so it has the limit of a word of Triton's clients (sent.py)
MAX_STOPS, MAX_STOP_BYTES = 16, 512
# Lists end at these lengths and at their first mistake: a body of 4 MB once made four million reports,
# and 38 seconds of work
MAX_PROMPTS, MAX_TOKENS, MAX_TURNS, MAX_BIASES = 1024, 1 << 17, 4096, 1024
# OpenAI's own limit of tools, and of their names
MAX_TOOLS, TOOL_NAME = 128, r"^[a-zA-Z0-9_-]{1,64}$"
# Answers of guided_choice
MAX_CHOICES_OF = 1024
# what a name in an error's place looks like; pydantic's own alternatives (str, list[str]) are not names of the API
NAME = re.compile(r"(?!str$)[a-z_]+")


# JSON has one kind of number: 5.0 is a whole number too
Whole = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
]
TokenId = Annotated[int, Field(ge=0)]


class NotSupported:
    """For a known argument that this server does not support: null and OpenAI's defaults pass.

    In an annotation: `Annotated[Any, NotSupported("medium")]`.
    """

    def __init__(self, *defaults: Any) -> None:
        self.defaults = defaults

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        def check(value: Any, info: core_schema.ValidationInfo) -> None:
            # 1 is not True
            if value is not None and not any(type(value) is type(one) and value == one for one in self.defaults):
                raise PydanticCustomError("not_supported", "not supported")

        return core_schema.with_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.defaults], "description": "Not supported: this asks for nothing"}


TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class Strict(BaseModel):
    """Strict: unknown keys are refused, and "5" is not a number."""

    # NaN and Infinity are not JSON, but Python's parsers take them
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """The first unknown key ends the check: pydantic would report each,
        and a body of 2.5 MB can have a quarter of a million."""
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields and name != "schema" or name == "schema_":
                    raise PydanticCustomError("extra_forbidden", "{name}", {"name": str(name)[:64]})
        return data


def _biases(value: Any) -> Any:
    """The first mistake ends the check, as in lists: pydantic would report every mistake."""
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
    include_usage: bool | None = None
    # pads chunks against eavesdroppers who count bytes; newer clients ask for it, and it changes no text
    include_obfuscation: bool | None = None


class Sampling(Strict):
    """The arguments that completions and chat have in common."""

    model: str = Field(description="The id that /v1/models gives")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: Whole | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        None, description="The answer holds none of them"
    )
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_biases)] = Field(
        None, max_length=MAX_BIASES, description="Token id to what is added to its logit, -100 to 100"
    )
    # not OpenAI's, but TensorRT-LLM's and vLLM's
    top_k: Whole | None = Field(None, ge=0, lt=1 << 31)
    # the least value that float32 can hold
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: Whole | None = Field(None, ge=0, lt=1 << 31)
    # accepted and ignored: they change no answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # vLLM's
    min_p: float | None = Field(None, ge=0, le=1, description="Torch engine only")
    ignore_eos: bool | None = Field(
        None, description="The answer has max_tokens tokens, even if the model ends earlier"
    )
    request_id: str | None = None
    priority: Whole | None = None
    # known and not supported: OpenAI's, then vLLM's
    modalities: Annotated[Any, NotSupported(["text"])] = None
    audio: Annotated[Any, NotSupported()] = None
    prediction: Annotated[Any, NotSupported()] = None
    reasoning_effort: Annotated[Any, NotSupported("medium")] = None
    verbosity: Annotated[Any, NotSupported("medium")] = None
    web_search_options: Annotated[Any, NotSupported()] = None
    guided_json: str | dict[str, Any] | None = Field(None, description="A JSON schema that the answer follows")
    guided_regex: str | None = Field(None, min_length=1)
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES_OF, fail_fast=True)] | None = None
    guided_grammar: Annotated[Any, NotSupported()] = None
    structured_outputs: Annotated[Any, NotSupported()] = None
    use_beam_search: Annotated[Any, NotSupported(False)] = None
    length_penalty: Annotated[Any, NotSupported(1, 1.0)] = None
    stop_token_ids: Annotated[Any, NotSupported([])] = None
    include_stop_str_in_output: Annotated[Any, NotSupported(False)] = None
    skip_special_tokens: Annotated[Any, NotSupported(True)] = None
    spaces_between_special_tokens: Annotated[Any, NotSupported(True)] = None
    prompt_logprobs: Annotated[Any, NotSupported()] = None
    truncate_prompt_tokens: Annotated[Any, NotSupported()] = None
    logits_processors: Annotated[Any, NotSupported([])] = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        longest = max((len(stop.encode()) for stop in ([value] if isinstance(value, str) else value or [])), default=0)
        if longest > MAX_STOP_BYTES:
            raise ValueError(f"a stop string has {longest} bytes; one may have {MAX_STOP_BYTES}")
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: (
        str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Whole | None = Field(None, ge=0, lt=1 << 31, description="Default 16; 0 only with echo")
    echo: bool | None = Field(None, description="The answer begins with the prompt; with logprobs: torch engine only")
    logprobs: Whole | None = Field(None, ge=0, le=5, description="0: of the chosen tokens; more: torch engine only")
    best_of: Whole | None = Field(
        None, ge=1, le=MAX_CHOICES, description="How many answers are made; the likeliest n are returned"
    )
    suffix: Annotated[Any, NotSupported("")] = None


def refuse_kinds(data: Any, *kinds: str, name: str = "type") -> Any:
    """What OpenAI documents and this server does not do is "not supported", not unknown. data: what stands where one of its kinds may."""
    if isinstance(data, dict) and data.get(name) in kinds:
        raise PydanticCustomError("not_supported", "{kind}", {"kind": data[name]})
    return data


class TextPart(Strict):
    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return refuse_kinds(data, "image_url", "input_audio", "file", "refusal", "audio_url", "video_url")

    type: Literal["text"]
    text: str
    # Anthropic's, which some clients send to every server: it changes no answer
    cache_control: Any = None


class CalledFunction(Strict):
    name: str = Field(min_length=1, max_length=256)
    arguments: str = Field(description="JSON, of an object")


class ToolCall(Strict):
    """A call that the model made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    # what a streamed call carries
    index: Whole | None = None


class Message(Strict):
    """One turn of a conversation."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return refuse_kinds(data, "function", name="role")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_TURNS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    cache_control: Any = None
    # what an assistant's turn carries when it comes back as it was sent
    refusal: Annotated[Any, NotSupported()] = None
    annotations: Annotated[Any, NotSupported([])] = None
    audio: Annotated[Any, NotSupported()] = None
    function_call: Annotated[Any, NotSupported()] = None
    reasoning_content: Annotated[Any, NotSupported("")] = None

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing; only an assistant's turn with tool_calls has none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to turns of the role assistant")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("tool_call_id is missing; a turn of the role tool says which call it answers")
        return self

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


class Function(Strict):
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; it goes to the model as it is")
    # Open WebUI's tool servers say it here too
    type: Literal["function"] | None = None
    strict: bool | None = Field(None, description="Its arguments follow its schema")

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = (value or {}).get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise ValueError(f"the type of arguments is object, not {str(kind)[:40]!r}")
        return value


class Tool(Strict):
    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return refuse_kinds(data, "custom")

    type: Literal["function"]
    function: Function
    cache_control: Any = None


class NamedFunction(Strict):
    name: str = Field(pattern=TOOL_NAME)


class NamedTool(Strict):
    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return refuse_kinds(data, "allowed_tools", "custom")

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    # pydantic's own models have a `schema`
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    # an answer follows its schema in any case
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, which needs it")
        return self

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return refuse_kinds(data, "grammar", "python", "structural_tag")


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]
    max_tokens: Whole | None = Field(None, ge=1, lt=1 << 31)
    max_completion_tokens: Whole | None = Field(None, ge=1, lt=1 << 31, description="Default: as many as fit")
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20, description="More than 0: torch engine only")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends after its first call")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="More names for the model's template")
    # known and not supported: OpenAI's (tools have taken the place of functions), then vLLM's
    functions: Annotated[Any, NotSupported([])] = None
    function_call: Annotated[Any, NotSupported("none", "auto")] = None
    add_generation_prompt: Annotated[Any, NotSupported(True)] = None
    continue_final_message: Annotated[Any, NotSupported(False)] = None
    add_special_tokens: Annotated[Any, NotSupported(False)] = None
    chat_template: Annotated[Any, NotSupported()] = None
    documents: Annotated[Any, NotSupported([])] = None
    echo: Annotated[Any, NotSupported(False)] = None
    best_of: Annotated[Any, NotSupported(1)] = None


# --- what clients get ------------------------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    # null for the prompt's first token, which has no token before it
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TokenLogprob(BaseModel):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[Any]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AnswerCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Answer(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    # only if the model called some
    tool_calls: list[AnswerCall] = []


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
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
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]
    # answers that are in progress or wait, and how many the engine makes at a time
    requests: int
    slots: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody
