"""Tests on real data skip visibly without it, fail without it in CI, and run with it."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
TESTS = """
    import pytest

    @pytest.mark.real_data
    def test_marked():
        pass

    def test_asks_for_the_folder(data_dir):
        assert (data_dir / "README.md").exists()

    def test_needs_no_data():
        pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("KALEIDOSCOPE_DATA_DIR", raising=False)
    # Without the Hypothesis plugin, which takes seconds to load and is not what is tested.
    pytester.makeini("[pytest]\nmarkers = real_data: reads real logs\naddopts = -p no:hypothesispytest")
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(TESTS)
    return pytester


def test_skips_visibly_without_the_data(suite: pytest.Pytester) -> None:
    result = suite.runpytest("-rs")
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["*needs real data: set KALEIDOSCOPE_DATA_DIR*"])


@pytest.mark.parametrize("ci", ["true", "1"])
def test_fails_without_the_data_in_ci(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str) -> None:
    monkeypatch.setenv("CI", ci)
    result = suite.runpytest()
    counts = result.parseoutcomes()
    assert counts == {"passed": 1, "errors": 2}
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*in CI tests on real data must run*"])


@pytest.mark.parametrize("ci", ["", "false", "0"])
def test_an_empty_or_false_ci_is_not_ci(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str) -> None:
    monkeypatch.setenv("CI", ci)
    suite.runpytest().assert_outcomes(passed=1, skipped=2)


def test_runs_with_the_data(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    (suite.path / "README.md").touch()
    monkeypatch.setenv("KALEIDOSCOPE_DATA_DIR", str(suite.path))
    monkeypatch.setenv("CI", "true")
    suite.runpytest().assert_outcomes(passed=3)


def test_fails_when_the_folder_is_not_there(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_DATA_DIR", str(suite.path / "nowhere"))
    result = suite.runpytest()
    assert result.parseoutcomes() == {"passed": 1, "errors": 2}
    result.stdout.fnmatch_lines(["*nowhere, which is not a folder*"])


def test_the_folder_alone_marks_a_test(suite: pytest.Pytester) -> None:
    result = suite.runpytest("-m", "real_data")
    result.assert_outcomes(skipped=2, deselected=1)
