"""Tools as clients describe them, for the tests of calls: with and without a server."""

from __future__ import annotations

from typing import Any

USER: Any = {"role": "user", "content": "hi"}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Seoul", "a//b %"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
STRICT: Any = {"type": "function", "function": {"name": "city", "parameters": CITY, "strict": True}}
