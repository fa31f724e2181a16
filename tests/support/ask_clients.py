"""What real client packages do with a server: each a stream, a call of a tool, an answer that follows a schema.

Runs in its own environment (requirements/clients.txt): python ask_clients.py CLIENT URL. Prints one JSON object: what came of each.
Needs no project code. The model is a small one that cannot call tools by itself: the client makes it call (tool_choice).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel, ConfigDict

MODEL = "stories"
USER: Any = [{"role": "user", "content": "Tell me of a cat."}]
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 60}


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    age: int


SCHEMA: Any = {
    "type": "object", "additionalProperties": False, "required": ["kind", "age"],
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
}  # fmt: skip
TOOL: Any = {"type": "function", "function": {"name": "pet", "description": "Tell of a pet", "parameters": SCHEMA}}
CHOICE: Any = {"type": "function", "function": {"name": "pet"}}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}


def of_openai(url: str) -> dict[str, Any]:
    import openai

    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
    ask: Any = client.chat.completions.create
    chunks = list(ask(model=MODEL, messages=USER, stream=True, **SAMPLING))
    call = ask(model=MODEL, messages=USER, tools=[TOOL], tool_choice=CHOICE, **SAMPLING).choices[0].message
    made = call.tool_calls[0]
    # and the turn that it makes goes back as it came
    result = {"role": "tool", "tool_call_id": made.id, "content": "a cat"}
    after = ask(model=MODEL, messages=[*USER, call, result], tools=[TOOL], **SAMPLING).choices[0].message.content
    schema = ask(model=MODEL, messages=USER, response_format=FORMAT, **SAMPLING).choices[0].message.content
    return {
        "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "call": json.loads(made.function.arguments), "after": after, "schema": json.loads(schema),
    }  # fmt: skip


def of_litellm(url: str) -> dict[str, Any]:
    import litellm  # type: ignore[import-not-found]

    def ask(**more: Any) -> Any:
        return litellm.completion(
            model=f"openai/{MODEL}", api_base=url, api_key="x", messages=USER, num_retries=0, **SAMPLING, **more
        )

    return {
        "stream": "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True)),
        "call": json.loads(ask(tools=[TOOL], tool_choice=CHOICE).choices[0].message.tool_calls[0].function.arguments),
        "schema": json.loads(ask(response_format=FORMAT).choices[0].message.content),
    }


def of_langchain(url: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI  # type: ignore[import-not-found]

    model = ChatOpenAI(model=MODEL, base_url=url, api_key="x", max_retries=0, temperature=0, max_tokens=60)
    schema = {**SCHEMA, "title": "pet", "description": "A pet"}
    return {
        "stream": "".join(str(chunk.content) for chunk in model.stream("Tell me of a cat.")),
        "call": model.bind_tools([TOOL], tool_choice="pet").invoke("Tell me of a cat.").tool_calls[0]["args"],
        "schema": model.with_structured_output(schema, method="json_schema").invoke("Tell me of a cat."),
    }


def of_llama_index(url: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage  # type: ignore[import-not-found]
    from llama_index.llms.openai_like import OpenAILike  # type: ignore[import-not-found]

    model = OpenAILike(
        model=MODEL, api_base=url, api_key="x", max_retries=0, is_chat_model=True, is_function_calling_model=True,
        context_window=512, temperature=0, max_tokens=60,
    )  # fmt: skip
    turns = [ChatMessage(role="user", content="Tell me of a cat.")]
    call = model.chat(turns, tools=[TOOL], tool_choice=CHOICE).message.additional_kwargs["tool_calls"][0]
    return {
        "stream": "".join(chunk.delta or "" for chunk in model.stream_chat(turns)),
        "call": json.loads(call.function.arguments),
        "schema": json.loads(str(model.chat(turns, response_format=FORMAT).message.content)),
    }


def of_instructor(url: str) -> dict[str, Any]:
    import instructor  # type: ignore[import-not-found]
    import openai

    def ask(mode: Any) -> dict[str, Any]:
        client: Any = instructor.from_openai(openai.OpenAI(base_url=url, api_key="x", max_retries=0), mode=mode)
        kind: Any = KindOfPet
        made: dict[str, Any] = client.chat.completions.create(
            model=MODEL, messages=USER, response_model=kind, max_retries=0, **SAMPLING
        ).model_dump()
        return made

    client: Any = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="x", max_retries=0), mode=instructor.Mode.TOOLS
    )
    partial = client.chat.completions.create_partial(model=MODEL, messages=USER, response_model=KindOfPet, **SAMPLING)
    return {
        "stream": str([pet.model_dump() for pet in partial][-1]),
        "call": ask(instructor.Mode.TOOLS),
        "schema": ask(instructor.Mode.JSON_SCHEMA),
    }


class KindOfPet(BaseModel):
    """A pet."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.update(SCHEMA))
    kind: str
    age: int


if __name__ == "__main__":
    print(json.dumps(globals()[f"of_{sys.argv[1]}"](sys.argv[2])))
