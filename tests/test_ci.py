"""`.ci/run` lints and tests, fails when either does, and finds the real data beside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "run"
# Stands in for make: says what it was asked and what it saw, fails where it is told to.
FAKE_MAKE = """#!/bin/sh
echo "$1 CI=$CI DATA=$KALEIDOSCOPE_DATA_DIR"
test "$1" != "$FAILS"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text(FAKE_MAKE)
    (tmp_path / "bin" / "make").chmod(0o755)
    return checkout


def run(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in {"CI", "KALEIDOSCOPE_DATA_DIR"}}
    path = f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [checkout / ".ci" / "run"],
        cwd=checkout.parent,
        env={**inherited, "PATH": path, "FAILS": "nothing", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_lints_and_tests_as_ci(checkout: Path) -> None:
    done = run(checkout)
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["lint CI=true DATA=", "test CI=true DATA="]


@pytest.mark.parametrize("target", ["lint", "test"])
def test_fails_when_either_fails_and_still_runs_both(checkout: Path, target: str) -> None:
    done = run(checkout, FAILS=target)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2


def test_finds_the_data_beside_the_checkout(checkout: Path) -> None:
    data = checkout.parent / "shared" / "data"
    data.mkdir(parents=True)
    assert f"DATA={data}" in run(checkout).stdout
    assert "DATA=/elsewhere" in run(checkout, KALEIDOSCOPE_DATA_DIR="/elsewhere").stdout
