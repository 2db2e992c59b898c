"""`kaleidoscope portrait`: what people and machines get, and texts that try to be something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kaleidoscope import cli
from kaleidoscope.database import Database
from kaleidoscope.portraits import store_portrait
from tests.kaleidoscope.people import person
from tests.kaleidoscope.portrait_cells import cell, cells, found, run
from tests.kaleidoscope.stock import stocked

NASTY = "[red]x[/red]\x1b[2J\u202e"


@pytest.fixture
def stored(sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Scene `welcome` with a portrait, in a folder of its own."""
    stocked(sqlite)
    with sqlite.transaction(person("ann")) as session:
        nasty = cell({"level": NASTY}, {"image_style": "flat"}, **found(0.3, 0.1, 0.5))
        store_portrait(session, "welcome", run(simulated=True), cells([nasty]))
    monkeypatch.chdir(tmp_path)
    url = sqlite.url.render_as_string(hide_password=False)
    for name, value in {"DATABASE_URL": url, "BUSINESS": "acme", "USER": "ann"}.items():
        monkeypatch.setenv(f"KALEIDOSCOPE_{name}", value)
    return sqlite


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["portrait", *words])
    out, err = capsys.readouterr()
    assert stop.value.code == code, (out, err)
    return err if code else out


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    document = json.loads(said(capsys, *words, "--json"))
    assert isinstance(document, dict)
    return document


def test_portraits_are_listed_and_called_simulated(stored: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert "90,000" in said(capsys, "list", "welcome") and "2026-11-01 – 2026-11-15" in said(capsys, "list", "welcome")
    (one,) = told(capsys, "list", "welcome")["items"]
    assert (one["number"], one["author"], one["simulated"]) == (1, "ann", True)
    assert "SIMULATED" in said(capsys, "show", "welcome")


def test_a_portrait_is_shown_by_segment_and_in_chinese(stored: Database, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "show", "welcome", "--segment", "age=[30, 40)")
    assert "+50 % (+20 % to +80 %)" in shown and "level=beginner" not in shown
    assert "statistics +, ebm +" in shown and "Users with age from 30 to below 40" in shown
    assert "图片风格“扁平”" in said(capsys, "show", "welcome", "--segment", "age=[30, 40)", "--language", "zh")
    items = told(capsys, "show", "welcome", "--everyone")["items"]
    assert len(items) == 4 and all(item["segment"] == {} for item in items)
    page = told(capsys, "show", "welcome", "--limit", "2")
    rest = told(capsys, "show", "welcome", "--limit", "2", "--cursor", page["next_cursor"])
    assert len(rest["items"]) == 2 and rest["items"] != page["items"]


def test_what_visitors_typed_steers_no_terminal(stored: Database, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "show", "welcome", "--limit", "500")
    assert "[red]x[/red]" in shown and not set(shown) & set("\x1b\u202e\r")
    designed = said(capsys, "design", "welcome", "--attribute", "level=\x1b[2Jevil")
    assert not set(designed) & set("\x1b\u202e\r")
    assert "\x1b" not in said(capsys, "design", "welcome", "--attribute", "\x1b[2Jevil=3", code=2)


def test_a_design_says_what_is_known_and_what_was_never_tried(
    stored: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = said(capsys, "design", "welcome", "--attribute", "age=30", "--attribute", "level=beginner")
    assert shown.startswith("For users with age=30 and level=beginner, by portrait 1 of scene welcome (of simulated")
    assert "conservative 95 % interval" in shown and "Never tried enough, in materials of the scene:" in shown
    assert "NO" in shown and "Often enough means" in shown and "not adjusted for tags shown together" in shown
    answer = told(capsys, "design", "welcome", "--attribute", "age=", "--language", "zh")
    assert answer["attributes"] == {"age": None} and answer["segments"] == [{"age": "missing"}]
    assert "age 未知" in answer["says"][0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["design", "welcome", "--attribute", "aeg=3"], "There are: age, level"),
        (["design", "welcome", "--attribute", "age"], "is not NAME=VALUE"),
        (["show", "welcome", "--segment", "age=[1, 2)"], "has no segment"),
        (["show", "welcome", "--number", "7"], "There is no portrait"),
        (["show", "welcome", "--at", "yesterday"], "'yesterday' is no time"),
        (["design", "welcome", "--at", "2026-11-03", "--number", "1"], "Give one of them"),
        (["show", "nowhere"], "There is no scene 'nowhere'"),
        (["export", "welcome", "x.txt"], "says no format"),
    ],
)
def test_what_cannot_be_is_said(
    stored: Database, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert says in said(capsys, *words, code=2)


def test_a_portrait_is_asked_for_by_a_day_or_a_moment(
    stored: Database, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for at in ("2026-11-15", "2026-11-03T20:00+08:00", "2026-11-03 12:00"):
        assert told(capsys, "show", "welcome", "--at", at)["portrait"]["number"] == 1
        assert told(capsys, "design", "welcome", "--at", at)["portrait"]["number"] == 1
    assert "of portrait 1" in said(capsys, "export", "welcome", "p.csv", "--at", "2026-11-01")
    nowhere = said(capsys, "show", "welcome", "--at", "2026-11-15T00:01", code=2)
    assert "has no portrait of 2026-11-15 00:01 UTC" in nowhere and "1 of 2026-11-01 – 2026-11-15" in nowhere


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_an_export_overwrites_only_when_it_is_told(
    stored: Database, capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str
) -> None:
    file = f"p.{suffix}"
    assert f"Wrote {file}: {len(cells()) + 1} cells" in said(capsys, "export", "welcome", file)
    before = (tmp_path / file).read_bytes()
    assert "--overwrite" in said(capsys, "export", "welcome", file, "--language", "zh", code=2)
    assert (tmp_path / file).read_bytes() == before
    written = told(capsys, "export", "welcome", file, "--language", "zh", "--overwrite")
    assert written["cells"] == len(cells()) + 1 and (tmp_path / file).read_bytes() != before
