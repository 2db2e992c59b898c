"""What the environment decides: one frozen `Settings`, built once at an entry point and passed down.

Nothing else in the platform reads environment variables. docs/settings.md documents every field.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
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
    log_url: str = Field(
        default="sqlite:///kaleidoscope-log.db",
        description="SQLAlchemy URL of the database that decisions and events go to first",
    )
    log_dir: Path = Field(default=Path("kaleidoscope-log"), description="Folder of the log's closed days, in Parquet")
    models_dir: Path = Field(default=Path("kaleidoscope-models"), description="Folder of exported models")
    reports_dir: Path = Field(default=Path("kaleidoscope-reports"), description="Folder of scenes' attribution reports")
    keys: SecretStr | None = Field(
        default=None,
        description="Secrets that sign and draw decisions, NAME:SECRET,…, the current one first; unset: `keys_file`",
    )
    keys_file: Path = Field(
        default=Path("kaleidoscope-keys"), description="File with such secrets, made where there is none"
    )
    decision_window_s: int = Field(
        default=3600, ge=1, le=86_400 * 30, description="Equal requests within so many seconds get equal answers"
    )
    refresh_s: float = Field(
        default=2.0, gt=0, le=300, description="How often a server looks whether another release or token is live"
    )
    requests_per_s: float = Field(
        default=1000.0, gt=0, description="Decisions and batches of events a second that a token may ask of one process"
    )
    model_timeout_ms: float = Field(
        default=50.0, gt=0, description="Time to rank in; a model that takes longer again and again gets a pause"
    )
    cors_origins: str | None = Field(default=None, description="Origins whose pages may ask for decisions, by commas")
    metrics_url: str | None = Field(
        default=None, description="Where the server's /metrics are, for guardrails on errors and latency"
    )
    feature_dir: Path = Field(default=Path("kaleidoscope-features"), description="Folder of the feature store's data")
    feature_url: SecretStr | None = Field(
        default=None, description="URL of a Redis that online features are kept in; unset: SQLite in `feature_dir`"
    )
    mlflow_url: str | None = Field(default=None, description="URL of an MLflow server; unset: a local database")
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
