"""The description of the endpoint, OpenAPI 3.1; its schemas are those of messages.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from scripts.openai import messages


def description() -> dict[str, Any]:
    """OpenAPI 3.1, its schemas from messages.py."""
    kinds = [
        (messages.CompletionRequest, "validation"),
        (messages.ChatRequest, "validation"),
        (messages.Completion, "serialization"),
        (messages.ChatCompletion, "serialization"),
        (messages.Models, "serialization"),
        (messages.Model, "serialization"),
        (messages.Health, "serialization"),
        (messages.Error, "serialization"),
    ]
    names, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    errors = {
        "400": "The request is not valid, or asks for what is not supported",
        "401": "The API key is not known",
        "404": "There is no such model",
        "408": "The body came too slowly",
        "413": "The body is too large",
        "429": "Too many requests are in progress or waiting",
        "500": "The engine failed",
        "503": "The engine is not there",
    }

    def content(kind: type[BaseModel], mode: str = "serialization") -> dict[str, Any]:
        return {"application/json": {"schema": names[kind, mode]}}  # type: ignore[index]

    def operation(summary: str, answer: dict[str, Any], statuses: Sequence[str], **more: Any) -> dict[str, Any]:
        told = {status: {"description": errors[status], "content": content(messages.Error)} for status in statuses}
        return {
            "summary": summary,
            "responses": {"200": {"description": "The answer", "content": answer}, **told},
            **more,
        }

    def question(summary: str, body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
        # each event is a chunk as JSON, or [DONE]
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
        given = {"required": True, "content": content(body, "validation")}
        streamed = {**content(answer), "text/event-stream": {"schema": event}}
        return {"post": operation(summary, streamed, list(errors), requestBody=given)}

    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    models = operation("The model", content(messages.Models), ["401"])
    model = operation("One model", content(messages.Model), ["401", "404"], parameters=[name])
    health = operation("Whether tokens come out of the engine", content(messages.Health), ["503"])
    page = operation("A page to try the model", {"text/html": {"schema": {"type": "string"}}}, [])
    return {
        "openapi": "3.1.0",
        "info": {"title": "trtllm-bake", "version": "1", "description": "OpenAI's API for the model that is served"},
        "paths": {
            "/v1/models": {"get": models},
            "/v1/models/{model}": {"get": model},
            "/v1/completions": question("Continue a text", messages.CompletionRequest, messages.Completion),
            "/v1/chat/completions": question("Answer a conversation", messages.ChatRequest, messages.ChatCompletion),
            "/health": {"get": health},
            "/": {"get": page},
        },
        "components": {"schemas": schemas["$defs"], "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }
