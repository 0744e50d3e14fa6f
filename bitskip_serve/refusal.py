"""Requests that are not served: an HTTP status and one line, in OpenAI's form."""

from __future__ import annotations

from typing import Any

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 408: "invalid_request_error",
    413: "invalid_request_error", 500: "server_error", 503: "unavailable_error",
}  # fmt: skip


class Refusal(Exception):
    """Why a request is not served."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        """param: the field of the body that is at fault."""
        super().__init__(message)
        self.message, self.param, self.status = message, param, status

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's errors."""
        return error_body(self.status, self.message, self.param)


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
