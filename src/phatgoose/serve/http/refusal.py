"""Saying no, in the format of OpenAI's errors."""

from starlette.responses import JSONResponse


class Refusal(Exception):
    """An answer that is an error; `reason` is its label in metrics and log."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = message.encode("utf-8", "backslashreplace").decode()  # whatever it quotes
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason
        self.param, self.headers = param, headers

    def response(self) -> JSONResponse:
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "BadRequestError"),
            "param": self.param,
            "code": self.status,
        }
        return JSONResponse({"error": error}, status_code=self.status, headers=self.headers)


# As vLLM names them.
_TYPES = {
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "BadRequestError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
