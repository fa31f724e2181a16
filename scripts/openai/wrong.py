"""Errors for clients, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """status: HTTP's; param: the argument at fault; code: OpenAI's word for it; headers by keyword, with _ for -."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy(message: str) -> ApiError:
    """The client asks for too much at once; a moment later there may be room."""
    return ApiError(429, message, code="rate_limit_exceeded", Retry_After="1")
