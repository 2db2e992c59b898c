"""The command line: exit codes, the one JSON object, errors in one shape, and a light start. The jobs are fakes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from kaleidoscope import cli
from kaleidoscope.advice import verdict_sentence
from kaleidoscope.errors import InputError, JobError, LogError
from kaleidoscope.progress import Progress
from kaleidoscope.settings import Settings
from kaleidoscope.vocabulary import Policy, Verdict

HEAVY = ["duckdb", "feast", "interpret", "lightgbm", "matplotlib", "mlflow", "numpy", "pandas", "pyarrow", "scipy"]
HEAVY += ["jinja2", "sklearn", "torch"]

VALUE = {"value": 0.0312, "se": 0.0004, "ci_low": 0.0304, "ci_high": 0.0320, "ess": 12_345.0}
SUMMARY: dict[str, object] = {
    "rows": 1000,
    "variants": 4,
    "positive_rate": 0.03,
    "srm": None,
    "exposure_independence": {"p_value": 0.4, "dependent": False},
    "checks": [
        {"code": "duplicated_rows", "level": "warning", "message": "74 rows are there twice"},
        {"code": "rows_read", "level": "info", "message": "1,000 rows"},
    ],
    "model": {
        "auc": 0.7612,
        "baseline_auc": {"user_only": 0.58, "variant_only": 0.73, "main_effects": 0.75, "lightgbm": None},
    },
    "policy_value": {"uniform": VALUE, "best_single": VALUE, "best_per_context": None, "personalised": VALUE},
    "personalisation_gain": {
        "over": "best_single", "value": 0.01, "se": 0.002, "ci_low": 0.006, "ci_high": 0.014, "permutation_p": 0.01,
    },
    "verdict": "personalise",
}  # fmt: skip


@dataclass
class Job:
    """A job that says how far it is, prints like a careless library, then returns or raises."""

    result: dict[str, object] | Exception = field(default_factory=lambda: dict(SUMMARY))
    asked: dict[str, object] = field(default_factory=dict)

    def learn(
        self, log_path: Path, schema_path: Path, out_dir: Path, *, seed: int, progress: Progress
    ) -> dict[str, object]:
        self.asked = {
            "log": log_path,
            "schema": schema_path,
            "out": out_dir,
            "seed": seed,
            "threads": os.environ.get("OMP_NUM_THREADS"),
        }
        return self._work(progress)

    def simulate(self, out_dir: Path, *, rows: int, seed: int, progress: Progress) -> dict[str, object]:
        self.asked = {"out": out_dir, "rows": rows, "seed": seed}
        return self._work(progress)

    def loop(
        self, out_dir: Path, *, settings: Settings, seed: int, plan: SimpleNamespace, progress: Progress
    ) -> dict[str, object]:
        self.asked = {"out": out_dir, "visits": plan.visits, "seed": seed}
        return self._work(progress)

    def _work(self, progress: Progress) -> dict[str, object]:
        progress.stage("training")
        progress.advance(0.5)
        sys.stdout.write("a library's chatter\n")
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    for name in ("DEBUG", "SEED", "THREADS"):
        monkeypatch.delenv(f"KALEIDOSCOPE_{name}", raising=False)
    fake = Job()
    for name in ("learn", "simulate"):
        module = ModuleType(f"kaleidoscope.commands.{name}")
        setattr(module, f"run_{name}", getattr(fake, name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    demo, report = ModuleType("kaleidoscope.commands.demo"), ModuleType("kaleidoscope.commands.demo_report")
    demo.run_loop, demo.Plan = fake.loop, SimpleNamespace  # type: ignore[attr-defined]
    demo.demo_settings = lambda out, settings: out  # type: ignore[attr-defined]
    report.report_lines = lambda summary, out: [f"a line about {out}"]  # type: ignore[attr-defined]
    report.whereabouts = lambda out, url, scene: [f"{scene} at {url}"]  # type: ignore[attr-defined]
    for module in (demo, report):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "log.csv").touch()
    (tmp_path / "schema.yaml").touch()
    return [str(tmp_path / "log.csv"), "--schema", str(tmp_path / "schema.yaml"), "--out", str(tmp_path / "out")]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> Ran:
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert isinstance(stop.value.code, int)
        return Ran(stop.value.code, *capsys.readouterr())

    return run


def test_learn_passes_on_what_it_was_given(
    run: Run, job: Job, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run("learn", *files, "--seed", "7").code == 0
    assert job.asked == {
        "log": tmp_path / "log.csv",
        "schema": tmp_path / "schema.yaml",
        "out": tmp_path / "out",
        "seed": 7,
        "threads": None,
    }


def test_the_numerical_libraries_are_told_how_many_threads_to_use(
    run: Run, job: Job, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("OMP", "OPENBLAS", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", "64")  # put back after the test
    monkeypatch.setenv("KALEIDOSCOPE_THREADS", "3")
    assert run("learn", *files).code == 0
    assert job.asked["threads"] == "3"


def test_simulate_passes_on_what_it_was_given(run: Run, job: Job, tmp_path: Path) -> None:
    assert run("simulate", "--rows", "5000", "--out", str(tmp_path), "--json").code == 0
    assert job.asked == {"out": tmp_path, "rows": 5000, "seed": 0}


def test_demo_passes_on_what_it_was_given_and_prints_one_object(run: Run, job: Job, tmp_path: Path) -> None:
    ran = run("demo", "--no-serve", "--visits", "50000", "--seed", "3", "--out", str(tmp_path), "--json")
    assert ran.code == 0
    assert job.asked == {"out": tmp_path, "visits": 50_000, "seed": 3}
    assert json.loads(ran.out) == SUMMARY


def test_demo_ends_without_a_server_where_nobody_sits_at_a_terminal(run: Run, job: Job, tmp_path: Path) -> None:
    ran = run("demo", "--out", str(tmp_path))
    assert ran.code == 0
    assert ran.out.endswith(f"\na line about {tmp_path}\n")
    assert job.asked["visits"] == 340_000


@pytest.mark.parametrize("ci", ["", "true"])
def test_demo_goes_on_serving_at_a_terminal_but_not_in_ci(
    run: Run, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str
) -> None:
    served: list[tuple[object, ...]] = []
    ports, app, server = (
        ModuleType(f"kaleidoscope.{n}") for n in ("commands.demo_server", "serving.app", "serving.server")
    )
    ports.check_port = lambda port: served.append(("free", port))  # type: ignore[attr-defined]
    app.create_app = lambda settings: settings  # type: ignore[attr-defined]
    server.serve = lambda *where: served.append(where)  # type: ignore[attr-defined]
    for module in (ports, app, server):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    job.result = {"scene": "fund-card"}
    ran = run("demo", "--out", str(tmp_path), "--port", "8123")
    assert ran.code == 0
    assert served == ([] if ci else [("free", 8123), (tmp_path, "127.0.0.1", 8123)])
    assert ("fund-card at http://127.0.0.1:8123" in ran.out) == (not ci)


def test_the_seed_comes_from_the_settings_unless_given(
    run: Run, job: Job, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_SEED", "11")
    run("learn", *files)
    assert job.asked["seed"] == 11
    run("learn", *files, "--seed", "0")
    assert job.asked["seed"] == 0


def test_people_get_values_verdict_auc_warnings_and_the_reports_path(run: Run, files: list[str]) -> None:
    ran = run("learn", *files)
    assert ran.code == 0
    assert "0.0312" in ran.out and "[0.0304, 0.0320]" in ran.out and "12,345" in ran.out
    assert "too little data" in ran.out
    assert "Gain of personalising over best single: +0.0100 [+0.0060, +0.0140], permutation p = 0.01" in ran.out
    assert verdict_sentence(SUMMARY) in ran.out
    assert "AUC on held-out units: 0.761 (user only 0.580, variant only 0.730, main effects 0.750)" in ran.out
    assert "warning (duplicated_rows): 74 rows are there twice" in ran.out
    assert "1,000 rows" not in ran.out
    assert f"Report: {Path(files[-1]) / 'report.html'}" in ran.out


def test_a_policy_without_a_value_says_why(run: Run, job: Job, files: list[str]) -> None:
    checks = [{"code": "no_context", "level": "info", "message": "the schema names no `context` columns"}]
    job.result = {**SUMMARY, "checks": checks}
    assert "no context columns" in run("learn", *files).out


def test_a_log_that_supports_no_claim_gets_the_reason_instead_of_numbers(
    run: Run, job: Job, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    checks = [{"code": "exposure_depends_on_user", "level": "error", "message": "What was shown depended on the user."}]
    job.result = {
        **SUMMARY, "checks": checks, "policy_value": dict.fromkeys(Policy), "personalisation_gain": None,
        "verdict": "inconclusive",
    }  # fmt: skip
    ran = run("learn", *files)
    assert "No value is given for any way of choosing: which variant was shown depended on the user" in ran.out
    assert "95 % interval" not in ran.out and "Gain" not in ran.out and "effective rows" not in ran.out


def test_a_simulated_log_shows_the_truth_beside_the_estimate_and_says_simulated(
    run: Run, job: Job, tmp_path: Path
) -> None:
    truth = {"uniform": 0.0301, "best_single": 0.0402, "personalised": 0.0503, "oracle": 0.0604}
    job.result = {**SUMMARY, "simulated_truth": truth}
    out = " ".join(run("simulate", "--out", str(tmp_path)).out.split())
    assert "What each policy would have earned (simulated data)" in out and "true value" in out
    assert "Simulated data: nothing here is about real users." in out
    assert all(f"{value:.4f}" in out for value in truth.values())


@pytest.mark.parametrize("verdict", list(Verdict))
def test_people_get_a_sentence_for_every_verdict(
    run: Run, job: Job, files: list[str], monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    job.result = {**SUMMARY, "verdict": verdict, "personalisation_gain": None, "model": None}
    monkeypatch.setenv("COLUMNS", "500")
    ran = run("learn", *files)
    assert verdict_sentence(job.result) in ran.out
    assert "AUC on held-out units: unknown" in ran.out


def test_text_from_a_log_is_not_taken_for_markup(run: Run, job: Job, files: list[str]) -> None:
    job.result = {**SUMMARY, "checks": [{"code": "c", "level": "warning", "message": "value [bold]x[/bold] [/red]"}]}
    assert "value [bold]x[/bold] [/red]" in run("learn", *files).out


def test_json_is_one_object_whatever_libraries_print(run: Run, files: list[str]) -> None:
    ran = run("learn", *files, "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == SUMMARY
    assert ran.out.count("\n") == 1
    assert "a library's chatter" in ran.err


def test_a_summary_that_says_nan_is_an_error_not_bad_json(run: Run, job: Job, files: list[str]) -> None:
    job.result = {**SUMMARY, "rows": float("nan")}
    ran = run("learn", *files, "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["error"]["code"] == "internal"


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (LogError("column 'age' is missing from log.csv"), "bad_log", 2),
        (InputError("no"), "bad_input", 2),
        (JobError("training diverged"), "job_failed", 1),
    ],
)
def test_an_error_has_one_shape(
    run: Run, job: Job, files: list[str], error: Exception, code: str, exit_code: int
) -> None:
    job.result = error
    ran = run("learn", *files, "--json")
    assert ran.code == exit_code
    assert json.loads(ran.out) == {"error": {"code": code, "message": str(error)}}

    ran = run("learn", *files)
    assert ran.code == exit_code
    assert ran.err.splitlines()[-1] == f"Error ({code}): {error}"
    assert "Traceback" not in ran.err


def test_an_unexpected_error_is_internal_and_hints_at_debug(run: Run, job: Job, files: list[str]) -> None:
    job.result = KeyError("oops")
    ran = run("learn", *files, "--json")
    assert ran.code == 1
    error = json.loads(ran.out)["error"]
    assert error["code"] == "internal"
    assert "KeyError: 'oops'" in error["message"] and "KALEIDOSCOPE_DEBUG=1" in error["message"]
    assert "Traceback" not in ran.err


def test_debug_shows_the_traceback_on_stderr(
    run: Run, job: Job, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.result = KeyError("oops")
    monkeypatch.setenv("KALEIDOSCOPE_DEBUG", "1")
    ran = run("learn", *files, "--json")
    assert "Traceback" in ran.err and "in _work" in ran.err
    assert json.loads(ran.out)["error"]["code"] == "internal"


@pytest.mark.parametrize(
    "argv",
    [
        ["learn"],
        ["learn", "nowhere.csv", "--schema", "nowhere.yaml", "--out", "out"],
        ["learn", "--typo"],
        ["simulate", "--out", "out", "--rows", "many"],
        ["demo", "--visits", "10"],
        ["demo", "--seed", "-1"],
        ["teach"],
    ],
)
def test_bad_usage_exits_2(run: Run, job: Job, argv: list[str]) -> None:
    ran = run(*argv)
    assert (ran.code, ran.out) == (2, "")
    assert "Error" in ran.err

    ran = run(*argv, "--json")
    assert ran.code == 2
    assert json.loads(ran.out)["error"]["code"] == "bad_usage"
    assert job.asked == {}


def test_a_bad_setting_is_bad_input_that_names_the_variable(
    run: Run, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_THREADS", "all")
    ran = run("learn", *files, "--json")
    assert ran.code == 2
    assert "KALEIDOSCOPE_THREADS='all'" in json.loads(ran.out)["error"]["message"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_plain_line_per_stage(run: Run, job: Job, files: list[str]) -> None:
    ran = run("learn", *files)
    assert re.fullmatch(r"training \.\.\. \d+\.\d s\n", ran.err)
    assert "training" not in ran.out
    job.result = JobError("out of memory")
    assert re.match(r"training \.\.\. stopped after \d+\.\d s\nError", run("learn", *files).err)
    ran = run("learn", *files, "--json")
    assert "training" not in ran.out + ran.err


def test_progress_bars_show_on_a_terminal_and_never_with_json(
    run: Run, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run("learn", *files)
    assert "training" in terminal.getvalue() and "100%" in terminal.getvalue()

    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    run("learn", *files, "--json")
    assert "training" not in quiet.getvalue()


def test_version(run: Run) -> None:
    ran = run("--version")
    assert ran.code == 0
    assert ran.out.split()[0] == "kaleidoscope" and ran.out.split()[1][0].isdigit()


@pytest.mark.parametrize(
    "start",
    ["import kaleidoscope", "from kaleidoscope.cli import main; main(['--help'])", "import kaleidoscope.__main__"],
)
def test_the_start_is_light(start: str) -> None:
    program = f"import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules)); {start}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert "kaleidoscope" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kaleidoscope", "learn", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "bad_usage"
