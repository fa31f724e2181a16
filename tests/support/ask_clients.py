"""Real client packages against a server: each streams, calls a tool, and gets an answer that follows a schema.

Runs in its own environment (requirements/clients.txt): python ask_clients.py CLIENT URL. Prints one JSON object: what
came of each. Needs no project code. The model is a small one that cannot call tools by itself:
the client makes it call (tool_choice).
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

from pydantic import BaseModel, ConfigDict

MODEL = "stories"
USER: Any = [{"role": "user", "content": "Tell me of a cat."}]
# a logit_bias that ends an object at once: the test knows the tokens
SHORT: Any = json.loads(os.environ.get("SHORT", "{}"))
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 60}


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")
    kind: str
    age: int


SCHEMA: Any = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind", "age"],
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
}
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
        "call": json.loads(made.function.arguments),
        "after": after,
        "schema": json.loads(schema),
    }


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

    def ask(mode: Any, kind: Any, **more: Any) -> dict[str, Any]:
        client: Any = instructor.from_openai(openai.OpenAI(base_url=url, api_key="x", max_retries=0), mode=mode)
        made: dict[str, Any] = client.chat.completions.create(
            model=MODEL, messages=USER, response_model=kind, max_retries=0, **SAMPLING, **more
        ).model_dump()
        return made

    client: Any = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="x", max_retries=0), mode=instructor.Mode.TOOLS
    )
    partial = client.chat.completions.create_partial(model=MODEL, messages=USER, response_model=KindOfPet, **SAMPLING)
    return {
        "stream": str([pet.model_dump() for pet in partial][-1]),
        "call": ask(instructor.Mode.TOOLS, KindOfPet),
        "schema": ask(instructor.Mode.JSON_SCHEMA, KindOfPet),
        # JSON mode promises an object and no more: its schema stands in a system message,
        # which a small model cannot follow
        "json": ask(instructor.Mode.JSON, Anything, logit_bias=SHORT),
    }


def of_open_webui(url: str) -> dict[str, Any]:
    """What Open WebUI's server sends, in its order of names (open-webui 0.6: backend/open_webui/routers/openai.py and
    tasks.py, utils/middleware.py and tools.py): it is a program with a database and no package that a test can call."""
    headers = {
        "Authorization": "Bearer x",
        "Content-Type": "application/json",
        "X-OpenWebUI-User-Name": "Ana",
        "X-OpenWebUI-User-Id": "u1",
        "X-OpenWebUI-User-Email": "ana@example.com",
        "X-OpenWebUI-User-Role": "user",
        "X-OpenWebUI-Chat-Id": "c1",
    }

    def asked(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=120) as answer:
            if not answer.headers["Content-Type"].startswith("text/event-stream"):
                return json.loads(answer.read())
            lines = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
            assert lines.pop() == "[DONE]"
            return [json.loads(line) for line in lines]

    [model] = asked("/models")["data"]
    assert model["id"] == MODEL and model["object"] == "model"
    streamed = {"stream": True, "model": MODEL, "stream_options": {"include_usage": True}, **SAMPLING}
    chunks = asked("/chat/completions", {**streamed, "messages": [{"role": "system", "content": "Be kind."}, *USER]})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    # a tool server's tools say twice that they are functions;
    # tool_choice and response_format come from a model's custom parameters
    spec = {"type": "function", **TOOL["function"]}
    tooled = {**streamed, "messages": USER, "tools": [{"type": "function", "function": spec}]}
    deltas = [
        chunk["choices"][0]["delta"]
        for chunk in asked("/chat/completions", {**tooled, "tool_choice": CHOICE})
        if chunk["choices"]
    ]
    made: dict[str, Any] = {}
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", [])):
        # the pieces of a call are put together as its middleware does, and go back with their index
        call = made.setdefault("call", {**piece, "function": {**piece["function"], "arguments": ""}})
        call["function"]["arguments"] += piece["function"].get("arguments", "")
    turns = [*USER, {"role": "assistant", "content": "", "tool_calls": [made["call"]]},
             {"role": "tool", "tool_call_id": made["call"]["id"], "content": "a cat"}]  # fmt: skip
    after = asked("/chat/completions", {**tooled, "messages": turns})
    schema = asked("/chat/completions", {**streamed, "messages": USER, "response_format": FORMAT})
    # tasks in the background: a title, tags, questions to go on with
    task = {"model": MODEL, "messages": USER, "stream": False, "max_completion_tokens": 40}
    title = asked("/chat/completions", task)["choices"][0]["message"]["content"]
    tags = asked(
        "/chat/completions", {**task, "metadata": {"task": "tags_generation", "task_body": {"x": [1]}, "chat_id": "c1"}}
    )

    def text(chunks: Any) -> str:
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])

    return {
        "stream": text(chunks),
        "call": json.loads(made["call"]["function"]["arguments"]),
        "after": text(after),
        "schema": json.loads(text(schema)),
        "title": title,
        "tags": tags["choices"][0]["message"]["content"],
    }


class Anything(BaseModel):
    """An object."""

    model_config = ConfigDict(extra="allow")


class KindOfPet(BaseModel):
    """A pet."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.update(SCHEMA))
    kind: str
    age: int


if __name__ == "__main__":
    print(json.dumps(globals()[f"of_{sys.argv[1]}"](sys.argv[2])))
