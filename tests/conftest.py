"""Shared by all tests: how tests on real data find it, and what happens when it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kaleidoscope.settings import load_settings

# On top of the profile that Hypothesis has chosen, which is another one in CI: a busy machine is no error.
settings.register_profile(
    "patient", parent=settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for `data_dir` reads real data, marked so or not."""
    for item in items:
        if "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_data)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("real_data") is not None:
        _require_data_dir()


@pytest.fixture
def data_dir() -> Path:
    """The folder of real logs, KALEIDOSCOPE_DATA_DIR."""
    return _require_data_dir()


def _require_data_dir() -> Path:
    folder = load_settings().data_dir
    if folder is not None:
        if not folder.is_dir():
            pytest.fail(f"KALEIDOSCOPE_DATA_DIR is {folder}, which is not a folder", pytrace=False)
        return folder
    if os.environ.get("CI", "").lower() not in {"", "0", "false"}:
        pytest.fail("KALEIDOSCOPE_DATA_DIR is not set, and in CI tests on real data must run", pytrace=False)
    pytest.skip("needs real data: set KALEIDOSCOPE_DATA_DIR (docs/settings.md)")
