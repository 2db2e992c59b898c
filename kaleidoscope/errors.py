"""Everything Kaleidoscope raises on purpose.

KaleidoscopeError
├── InputError            what the caller gave is wrong (CLI exit code 2)
│   ├── SchemaError       the log schema (YAML) does not say what it should
│   ├── LogError          the log does not hold what the schema says
│   ├── TooLargeError     an upload or a request is larger than it may be
│   └── TooComplexError   a question that would take too long to answer
├── AccessError           the caller may not do this
│   ├── UnauthenticatedError   nobody knows who is calling
│   └── ForbiddenError         the caller's role does not allow it
├── TooManyRequestsError  the caller asks too often; waiting helps
├── NotFoundError         there is no such thing in the caller's business
├── ConflictError         somebody changed it first, it exists already, or its state does not allow this
└── JobError              the job could not be done (CLI exit code 1)
    └── UnavailableError  the database cannot be reached or is too busy; trying again may help
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class KaleidoscopeError(Exception):
    """Base of the tree: a stable code, an HTTP status, and a message that names the remedy."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = details

    @property
    def message(self) -> str:
        """What was wrong, where, and what to do."""
        return str(self)

    def as_dict(self) -> dict[str, object]:
        """The one JSON shape of an error, on the command line and over HTTP; `details` only where there are any."""
        details = {} if self.details is None else {"details": dict(self.details)}
        return {"error": {"code": self.code, "message": self.message, **details}}


class InputError(KaleidoscopeError):
    """What the caller gave cannot be used; nothing was done."""

    code = "bad_input"
    http_status = 400
    exit_code = 2


class SchemaError(InputError):
    """The schema file is not a log schema."""

    code = "bad_schema"


class LogError(InputError):
    """The log contradicts its schema."""

    code = "bad_log"


class TooLargeError(InputError):
    """An upload or a request is larger than it may be."""

    code = "too_large"
    http_status = 413


class TooComplexError(InputError):
    """Answering would take more work than one question may."""

    code = "too_complex"


class AccessError(KaleidoscopeError):
    """The caller may not do this; nothing was done."""

    code = "no_access"
    http_status = 403
    exit_code = 2


class UnauthenticatedError(AccessError):
    """No token, or one that is unknown, expired or revoked."""

    code = "unauthenticated"
    http_status = 401


class ForbiddenError(AccessError):
    """The caller is known, and has no role that allows this."""

    code = "forbidden"


class TooManyRequestsError(KaleidoscopeError):
    """The caller asks more often than it may; after `retry_after_s` seconds it may again."""

    code = "too_many_requests"
    http_status = 429
    exit_code = 2

    def __init__(self, message: str, retry_after_s: float = 1.0, *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, details=details)
        self.retry_after_s = retry_after_s


class NotFoundError(KaleidoscopeError):
    """There is no such thing, or it belongs to another business."""

    code = "not_found"
    http_status = 404
    exit_code = 2


class ConflictError(KaleidoscopeError):
    """It was changed in between (`details` has `yours` and `current`), exists, or is in the wrong state for this."""

    code = "conflict"
    http_status = 409
    exit_code = 2


class JobError(KaleidoscopeError):
    """The input was fine, the job failed."""

    code = "job_failed"
    http_status = 500
    exit_code = 1


class UnavailableError(JobError):
    """The database is away or locked for too long; the same call may succeed later."""

    code = "unavailable"
    http_status = 503
