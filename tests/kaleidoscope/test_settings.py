"""Settings come from the environment, are frozen, and say which variable is wrong."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from kaleidoscope.errors import InputError
from kaleidoscope.settings import PREFIX, Settings, load_settings


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"{PREFIX}{name.upper()}", raising=False)


def test_defaults_need_no_environment() -> None:
    assert load_settings().model_dump(mode="json") == {
        "data_dir": None,
        "threads": None,
        "seed": 0,
        "database_url": "sqlite:///kaleidoscope.db",
        "files_dir": "kaleidoscope-files",
        "log_url": "sqlite:///kaleidoscope-log.db",
        "log_dir": "kaleidoscope-log",
        "models_dir": "kaleidoscope-models",
        "reports_dir": "kaleidoscope-reports",
        "keys": None,
        "keys_file": "kaleidoscope-keys",
        "decision_window_s": 3600,
        "refresh_s": 2.0,
        "requests_per_s": 1000.0,
        "model_timeout_ms": 50.0,
        "cors_origins": None,
        "metrics_url": None,
        "feature_dir": "kaleidoscope-features",
        "feature_url": None,
        "mlflow_url": None,
        "business": None,
        "user": None,
        "debug": False,
    }


def test_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_DATA_DIR", "/data")
    monkeypatch.setenv("KALEIDOSCOPE_THREADS", "2")
    monkeypatch.setenv("KALEIDOSCOPE_SEED", "3")
    monkeypatch.setenv("KALEIDOSCOPE_DEBUG", "1")
    assert load_settings() == Settings(data_dir=Path("/data"), threads=2, seed=3, debug=True)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_DATA_DIR", "")
    monkeypatch.setenv("KALEIDOSCOPE_SEED", "")
    assert load_settings().data_dir is None
    assert load_settings().seed == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [("KALEIDOSCOPE_THREADS", "0"), ("KALEIDOSCOPE_SEED", "-1"), ("KALEIDOSCOPE_DEBUG", "perhaps")],
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"{variable}='{value}'"):
        load_settings()


def test_settings_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load_settings().seed = 1


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="extra"):
        Settings(sede=1)
