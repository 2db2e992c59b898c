"""Everything Kaleidoscope raises on purpose.

KaleidoscopeError
├── InputError            what the caller gave is wrong (CLI exit code 2)
│   ├── SchemaError       the log schema (YAML) does not say what it should
│   └── LogError          the log does not hold what the schema says
└── JobError              the job could not be done (CLI exit code 1)
"""

from __future__ import annotations

from typing import ClassVar


class KaleidoscopeError(Exception):
    """Base of the tree: a stable code, an HTTP status, and a message that names the remedy."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    @property
    def message(self) -> str:
        """What was wrong, where, and what to do."""
        return str(self)

    def as_dict(self) -> dict[str, object]:
        """The one JSON shape of an error, on the command line and over HTTP."""
        return {"error": {"code": self.code, "message": self.message}}


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


class JobError(KaleidoscopeError):
    """The input was fine, the job failed."""

    code = "job_failed"
    http_status = 500
    exit_code = 1
