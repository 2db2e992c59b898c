"""The demo runs the whole loop and says that it is simulated. One small run of a loud world serves most tests."""

from __future__ import annotations

import inspect
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from kaleidoscope import cli
from kaleidoscope.commands import demo
from kaleidoscope.commands.demo import Plan, run_loop
from kaleidoscope.commands.demo_report import report_lines, whereabouts
from kaleidoscope.commands.demo_server import Client, Server, check_port, variables
from kaleidoscope.database import open_database
from kaleidoscope.errors import InputError, JobError
from kaleidoscope.progress import Silent
from kaleidoscope.release import live_at
from kaleidoscope.serving import decider
from kaleidoscope.settings import Settings, load_settings
from kaleidoscope.simulation import WORLD, PopulationSpec, read_population
from kaleidoscope.terminal import print_lines
from tests.kaleidoscope.people import person

PLAN = Plan(
    visits=9_000, explore_days=5, stage_days=0.75, compare_days=2, http_visits=60, timed=200, min_stage_units=40
)


def loud_world(folder: Path) -> PopulationSpec:
    """The default world with a click rate of 25 % and three times its findings: little traffic shows them."""
    raw = yaml.safe_load(WORLD.read_text())
    raw["base_ctr"] = 0.25
    for term in (term for finding in raw["findings"] for term in finding["terms"]):
        if "effect" in term:
            term["effect"] *= 3
        for line in term.get("along", {}).values():
            line.update({at: 3 * size for at, size in line.items()})
    path = folder / "loud.yaml"
    path.write_text(yaml.safe_dump(raw))
    return read_population(path)


# What is drawn depends on the keys and on the hours: with others, all that is said of it below would be chance.
UNTIL = datetime(2026, 11, 26, 12, tzinfo=UTC)
KEY = "0123456789abcdef0123"


@dataclass(frozen=True)
class Ran:
    folder: Path
    summary: dict[str, Any]
    settings: Settings
    begun: datetime


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("KALEIDOSCOPE_")]:
            patch.delenv(name)
        patch.setattr(decider, "secrets", SimpleNamespace(token_urlsafe=lambda _: KEY))
        # The server decides as this process does only while its model is in time, and a busy machine is no error.
        folder, begun = tmp_path_factory.mktemp("demo") / "out", datetime.now(UTC)
        base, world = Settings(model_timeout_ms=60_000), loud_world(folder.parent)
        summary = run_loop(folder, settings=base, seed=0, progress=Silent(), plan=PLAN, world=world, now=UNTIL)
        yield Ran(folder, summary, demo.demo_settings(folder, base), begun)


def printed(capsys: pytest.CaptureFixture[str], *lines: Any) -> str:
    print_lines(*lines)
    return capsys.readouterr().out


# ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_model_beats_the_baseline_in_a_world_that_has_something_to_personalise(ran: Ran) -> None:
    buckets = ran.summary["buckets"]
    assert set(buckets) == {"control", "random", "model"}
    for found in buckets.values():
        assert {"exposures", "clicks", "ctr", "lift", "ci_low", "ci_high"} <= set(found)
        assert found["ctr"] == found["clicks"] / found["exposures"]
    assert buckets["control"]["lift"] is None
    assert buckets["model"]["ci_low"] > 0
    assert buckets["model"]["ci_low"] < buckets["model"]["fixed"]["ci_low"] < buckets["model"]["lift"]
    assert buckets["random"]["lift"] < buckets["model"]["lift"]
    assert ran.summary["srm"]["flagged"] is False


def test_it_says_who_prefers_what_and_which_findings_that_recovers(
    ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences, found = ran.summary["insights"], ran.summary["preferences"]
    assert len(sentences) == len(found["insights"]) > 0
    assert found["exposures"] == ran.summary["model"]["exposures"]  # of what training has read
    assert found["planted"] >= 0.75 * len(sentences)
    for sentence, insight in zip(sentences, found["insights"], strict=True):
        assert sentence.startswith("Users with ") and all(f"{d}={v}" in sentence for d, v in insight["tag"].items())
    assert len(found["findings"]) == 6 and sum(found["findings"].values()) >= 4
    assert found["findings"]["button-by-age"] is True
    out = printed(capsys, *report_lines(ran.summary, ran.folder))
    assert f"from {found['exposures']:,} random exposures to simulated users" in out
    assert out.count("Users with ") == min(len(sentences), 5)
    n = sum(found["findings"].values())
    assert f"Of its 6 published findings {n} were recovered with the right sign" in out


def test_the_share_of_the_oracles_lift_is_what_the_world_knows(ran: Ran) -> None:
    truth, ranked = ran.summary["truth"], ran.summary["truth"]["ranked"]
    assert ranked["uniform"] < ranked["best_single"] < ranked["shown"] < ranked["oracle"]
    share = (ranked["shown"] - ranked["control"]) / (ranked["oracle"] - ranked["control"])
    assert ran.summary["share_of_oracle_lift"] == pytest.approx(share)
    assert 0.6 < share < 1
    assert truth["with_exploration"]["share_of_oracle_lift"] < share
    assert 0.4 < ran.summary["share_of_oracle_personalisation"] < share
    # What was observed is what was true, but for chance.
    assert ran.summary["buckets"]["model"]["ctr"] == pytest.approx(truth["with_exploration"]["shown"], abs=0.06)


def test_the_gate_and_the_guard_let_the_model_to_all_of_the_traffic(ran: Ran) -> None:
    assert ran.summary["model"]["gate"]["verdict"] == "promote"
    assert [(stage["share"], stage["step"]) for stage in ran.summary["canary"]] == [(0.2, "advance"), (0.5, "advance")]
    assert all(stage["ctr_drop"] == 0 and stage["fallback_rate"] == 0 for stage in ran.summary["canary"])
    caller = person("ann", business="demo")
    with (
        open_database(ran.settings.database_url) as database,
        database.transaction(caller, write=False) as session,
    ):
        live = live_at(session, ran.summary["scene"])
    assert live is not None
    assert (live.stable, live.candidate, live.actor) == (2, None, "guard")


def test_the_log_holds_every_decision_and_event_and_its_closed_days_are_in_parquet(ran: Ran) -> None:
    summary, events = ran.summary, ran.summary["events"]
    assert 8_000 < summary["visits"] < 10_500
    # Whoever comes back within the hour is shown the same, by the same decision.
    assert 0.9 * summary["visits"] < summary["decisions"] < summary["visits"]
    assert events["accepted"] > 2 * summary["visits"]
    assert events.keys() <= {"accepted", "unexposed", "orphaned"}
    parts = sorted(ran.folder.glob("log/demo/scene=fund-card/day=*/*.parquet"))
    assert len(parts) == summary["compacted"]["days"] >= 3
    # Simulated time has ended; then the server answers in real time.
    until = datetime.fromisoformat(summary["experiment"]["until"])
    assert ran.begun < until < ran.begun + timedelta(minutes=10)


def test_the_server_is_waited_for_until_it_serves_nobody_the_earlier_release(monkeypatch: pytest.MonkeyPatch) -> None:
    client, asked = object.__new__(Client), list[str]()
    monkeypatch.setattr(client, "_server", SimpleNamespace(check=lambda: None, log="server.log"), raising=False)

    def evaluate(_: str, unit: str, __: object) -> dict[str, Any]:
        asked.append(unit)
        return {"metadata": {"release": 2 if unit == "in the canary" or len(asked) > 4 else 1}}

    monkeypatch.setattr(client, "evaluate", evaluate)
    client.wait_for_release("home", 2, ["in the canary", "not in it"])
    assert asked == ["in the canary", "not in it"] * 3


def test_the_server_decides_over_http_as_the_loop_does(ran: Ran) -> None:
    http = ran.summary["http"]
    assert http["decisions"] == PLAN.http_visits
    assert http["events"] >= 2 * PLAN.http_visits
    assert http["same_as_in_process"] >= http["decisions"] - 3  # an hour may begin between the two
    assert 0 < http["p50_ms"] <= http["p99_ms"]
    assert 30 < ran.summary["decisions_timed"] <= PLAN.timed
    assert 0 < ran.summary["decision_p50_ms"] <= ran.summary["decision_p99_ms"]
    assert "Traceback" not in (ran.folder / "server.log").read_text()


def test_everything_is_marked_as_simulated(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran.summary["simulated"] is ran.summary["experiment"]["simulated"] is True
    assert json.loads((ran.folder / "summary.json").read_text()) == json.loads(json.dumps(ran.summary))
    assert "simulated" in (ran.folder / "SIMULATED.txt").read_text()
    out = printed(capsys, *report_lines(ran.summary, ran.folder))
    assert out.startswith("SIMULATED: ")
    model = ran.summary["buckets"]["model"]
    assert f"{model['exposures']:,}" in out and f"+{100 * model['lift']:.0f} %" in out
    assert "The model is better than the baseline" in out and "of the oracle's lift" in out
    assert str(ran.folder / "summary.json") in out


def test_the_folder_is_a_platform_that_every_command_can_use(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = sorted((ran.folder / "pictures").glob("*.png"))
    assert len(pictures) == 10
    with PIL.Image.open(pictures[0]) as picture:
        assert picture.size == (450, 300)
    assert stat.S_IMODE((ran.folder / "token").stat().st_mode) == 0o600
    lines = (ran.folder / "settings.env").read_text().splitlines()
    assert lines == [f"{name}={value}" for name, value in variables(ran.settings).items()]
    for line in lines:
        monkeypatch.setenv(*line.split("=", 1))
    assert load_settings() == ran.settings


# ── what may go otherwise ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_the_gate_keeps_back_is_not_released_and_the_demo_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = {"name": "better_than_uniform", "ok": False, "message": "It gains nothing."}
    trained = {
        "version": "v", "folder": "f", "log": {"exposures": 900}, "metrics": {}, "mlflow": {}, "timings_s": {},
        "gate": {"verdict": "keep", "checks": [check], "gains": {}},
    }  # fmt: skip
    monkeypatch.setattr(demo, "run_train", lambda *_, **__: trained)
    plan = Plan(visits=2_000, explore_days=1, stage_days=0.1, compare_days=1, http_visits=10)
    summary = run_loop(tmp_path / "out", settings=Settings(), seed=0, progress=Silent(), plan=plan)
    assert summary["release"] == 1
    assert summary["canary"] == []
    assert set(summary["buckets"]) == {"control", "random"}
    assert summary["share_of_oracle_lift"] is None
    assert summary["decision_p99_ms"] is None
    assert summary["preferences"]["exposures"] > 0
    out = printed(capsys, *report_lines(summary, tmp_path))
    assert "The gate kept the model back, and nothing was personalised: It gains nothing." in out
    assert "oracle" not in out


def test_the_command_plans_what_the_demo_plans() -> None:
    assert inspect.signature(cli.demo).parameters["visits"].default == Plan().visits


def test_stages_that_too_few_users_would_see_are_left_out() -> None:
    assert Plan().stages == (0.05, 0.2, 0.5, 1.0)
    assert PLAN.stages == (0.2, 0.5, 1.0)
    assert Plan(visits=1_000).stages == (1.0,)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds what no demo has made"):
        run_loop(tmp_path, settings=Settings(), seed=0, progress=Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_folder_of_an_earlier_demo_is_emptied(tmp_path: Path) -> None:
    demo._empty(tmp_path / "demo")
    (tmp_path / "demo" / "log").mkdir()
    (tmp_path / "demo" / "kaleidoscope.db").touch()
    (tmp_path / "precious").mkdir()
    (tmp_path / "demo" / "link").symlink_to(tmp_path / "precious")
    demo._empty(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["SIMULATED.txt"]
    assert (tmp_path / "precious").is_dir()


def test_a_server_that_ends_by_itself_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    program = "import sys; sys.exit('starting\\nout of luck')"
    with log.open("wb") as stream, subprocess.Popen([sys.executable, "-c", program], stderr=stream) as process:
        process.wait(60)
    with pytest.raises(JobError, match=r"has ended: out of luck .*server\.log"):
        Server(process, 1, log).check()


def test_a_port_that_is_taken_is_named_before_the_work() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: .*--port"):
            check_port(port)
    check_port(port)


def test_the_end_says_how_to_go_on() -> None:
    lines = whereabouts(Path("my demo"), "http://127.0.0.1:8000", "fund-card")
    text = "\n".join(lines)
    assert "http://127.0.0.1:8000/healthz" in text
    assert "$(cat 'my demo/token')" in text and ". 'my demo/settings.env'" in text


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promise(tmp_path: Path) -> None:
    shares, personal, insights, planted = [], [], 0, 0
    for seed in range(3):
        summary = run_loop(tmp_path / "out", settings=Settings(), seed=seed, progress=Silent())
        buckets = summary["buckets"]
        assert summary["decisions"] >= 200_000
        assert summary["model"]["exposures"] >= 150_000
        assert summary["http"]["decisions"] >= 2_000
        assert sum(found["exposures"] for found in buckets.values()) >= 60_000
        assert buckets["model"]["ci_low"] > 0
        assert buckets["random"]["ci_low"] < 0
        assert summary["srm"]["flagged"] is False
        assert sum(summary["preferences"]["findings"].values()) == 6
        insights += len(summary["insights"])
        planted += summary["preferences"]["planted"]
        shares.append(summary["share_of_oracle_lift"])
        personal.append(summary["share_of_oracle_personalisation"])
    assert np.mean(shares) >= 0.85 and min(shares) >= 0.8
    assert np.mean(personal) >= 0.6
    assert planted >= 0.9 * insights > 0
