"""What the environment decides: one frozen `Settings`, built once at an entry point and passed down.

Nothing else in the platform reads environment variables. docs/settings.md documents every field.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from kaleidoscope.errors import InputError

PREFIX = "KALEIDOSCOPE_"


class Settings(BaseSettings):
    """The settings, each from the environment variable `KALEIDOSCOPE_<FIELD>`; an empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    data_dir: Path | None = Field(
        default=None, description="Folder with the public logs that tests and benchmarks read"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads a job may use; unset: all cores")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice a job makes")
    database_url: str = Field(
        default="sqlite:///kaleidoscope.db",
        description="SQLAlchemy URL of the platform's database: SQLite, or postgresql+psycopg://…",
    )
    files_dir: Path = Field(default=Path("kaleidoscope-files"), description="Folder of uploaded images")
    business: str | None = Field(default=None, description="The business that commands work in, unless --business says")
    user: str | None = Field(default=None, description="Who is working on the command line, unless --as says")
    debug: bool = Field(default=False, description="Show the traceback of an unexpected error")


def load_settings() -> Settings:
    """Return the settings of this process's environment.

    Raises:
        InputError: a variable holds something its setting cannot be; the message names the variable.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(
            f"{PREFIX}{'_'.join(map(str, problem['loc'])).upper()}={problem['input']!r}: {problem['msg']}"
            for problem in error.errors()
        )
        raise InputError(f"{problems}. docs/settings.md says what each setting may be.") from error
