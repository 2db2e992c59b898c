"""The operator's commands: what people and machines get, exit codes, and texts that try to be something else."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import typer

from kaleidoscope import cli
from kaleidoscope.terminal import printable

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "wealth"
COMMON = {"--business", "--as", "--json", "--help"}
GROUPS = (
    "business", "database", "events", "experiment", "features", "intervention", "job", "material",
    "model", "portrait", "release", "scene", "taxonomy", "token", "variant",
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@dataclass(frozen=True)
class Shell:
    """Runs commands as somebody; `ok` expects success, `fails` an error of a kind."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, line: str, *more: str, user: str = "ann") -> Ran:
        argv = [*line.split(), *more]
        if argv[0] != "database":
            argv += ["--as", user]
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert isinstance(stop.value.code, int)
        return Ran(stop.value.code, *self.capsys.readouterr())

    def ok(self, line: str, *more: str, user: str = "ann") -> str:
        ran = self(line, *more, user=user)
        assert (ran.code, ran.err) == (0, ""), ran
        return ran.out

    def json(self, line: str, *more: str, user: str = "ann") -> dict[str, Any]:
        ran = self(line, *more, "--json", user=user)
        assert ran.code == 0, ran
        return ran.json

    def fails(self, code: str, line: str, *more: str, user: str = "ann") -> str:
        """The message; both faces say the same, with exit code 2 and no traceback."""
        ran = self(line, *more, user=user)
        assert (ran.code, ran.out) == (2, ""), ran
        assert "Traceback" not in ran.err
        told = self(line, *more, "--json", user=user)
        assert told.code == 2
        error = told.json["error"]
        assert error["code"] == code
        if code != "bad_usage":
            assert ran.err.strip() == printable(f"Error ({code}): {error['message']}").strip()
        assert isinstance(error["message"], str)
        return error["message"]


STAGES = {
    "empty": [],
    "acme": ["business create acme --name Acme --as ann"],
    # The materials of the wealth example, as drafts of ann.
    "library": [
        f"material import {EXAMPLE}/materials.csv --files {EXAMPLE}/images --as ann",
        f"material add layout beside {EXAMPLE}/layouts/beside.yaml --as ann",
        f"material add layout above {EXAMPLE}/layouts/above.yaml --as ann",
    ],
    # Its scene, of approved materials, with its variants as drafts.
    "scene": [
        "material submit --all --as ann",
        "material approve --all --as rex",
        f"scene apply {EXAMPLE}/scene.yaml --as ann",
        "variant make wealth-home --as ann",
    ],
    "approved": ["variant submit wealth-home --all --as ann", "variant approve wealth-home --all --as rex"],
}


@pytest.fixture(scope="session")
def stages(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per stage, each reached by commands from the one before; tests get copies."""
    folders, folder = {}, tmp_path_factory.mktemp("stages")
    before = folder / "begin"
    before.mkdir()
    shutil.copy(sqlite_template, before / "kaleidoscope.db")
    for stage, lines in STAGES.items():
        folders[stage] = shutil.copytree(before, folder / stage)
        with pytest.MonkeyPatch.context() as patch:
            work_in(patch, folders[stage])
            for line in lines:
                with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
                    cli.main(line.split())
                assert stop.value.code == 0, line
        before = folders[stage]
    return folders


def work_in(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.chdir(folder)
    for name in ("DEBUG", "USER", "DATABASE_URL", "FILES_DIR"):
        patch.delenv(f"KALEIDOSCOPE_{name}", raising=False)
    patch.setenv("KALEIDOSCOPE_BUSINESS", "acme")


@pytest.fixture
def shell(
    request: pytest.FixtureRequest,
    stages: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Shell:
    """A folder as it is after a stage: an empty database, unless one of the fixtures below is asked for."""
    stage = next((s for s in reversed(STAGES) if s in request.fixturenames), "empty")
    shutil.copytree(stages[stage], tmp_path, dirs_exist_ok=True)
    work_in(monkeypatch, tmp_path)
    return Shell(capsys)


@pytest.fixture
def acme(shell: Shell) -> Shell:
    """The business acme."""
    return shell


@pytest.fixture
def library(shell: Shell) -> Shell:
    """With the materials of the wealth example, as drafts of ann."""
    return shell


@pytest.fixture
def scene(shell: Shell) -> Shell:
    """With its materials approved, and its scene's variants as drafts."""
    return shell


@pytest.fixture
def approved(shell: Shell) -> Shell:
    """With its variants approved."""
    return shell


# ── the commands as such ────────────────────────────────────────────────────────────────────────────────────────────


def leaves(command: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command that does something, by the words one types."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return {path: command}
    return {words: leaf for name, one in inner.items() for words, leaf in leaves(one, (*path, name)).items()}


COMMANDS = {
    words: leaf for words, leaf in leaves(typer.main.get_command(cli.app)).items() if words[0] in (*GROUPS, "audit")
}


def options(command: Any) -> set[str]:
    return {p.opts[0] for p in command.params if p.opts[0].startswith("--")}


def test_every_group_is_there() -> None:
    assert {words[0] for words in COMMANDS} == {*GROUPS, "audit"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_takes_the_common_options_and_explains_itself(words: tuple[str, ...]) -> None:
    wanted = {"--json"} if words[0] == "database" else COMMON - {"--help"}
    assert wanted <= options(COMMANDS[words])
    assert COMMANDS[words].help
    for parameter in COMMANDS[words].params:
        if parameter.opts[0].startswith("--"):
            assert parameter.help, parameter.opts


@pytest.mark.parametrize("words", [w for w in COMMANDS if len(w) > 1], ids=" ".join)
def test_every_command_and_option_is_documented(words: tuple[str, ...]) -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    section = page.split(f"\n## `kaleidoscope {words[0]}`\n")[1].partition("\n## ")[0]
    name = " ".join(words[1:])
    rows = re.findall(rf"^\| `{name}(?: [^`]+)?` \|([^|]*)\|", section, flags=re.MULTILINE)
    assert len(rows) == 1, f"docs/cli.md: {len(rows)} rows for {' '.join(words)}"
    assert set(re.findall(r"--[a-z-]+", rows[0])) == options(COMMANDS[words]) - COMMON


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_alone_shows_its_commands(shell: Shell, group: str) -> None:
    with pytest.raises(SystemExit):
        cli.main([group, "--help"])
    said = shell.capsys.readouterr().out
    for words in COMMANDS:
        if words[0] == group:
            assert words[1] in said


@pytest.mark.parametrize("argv", ["--help", "release --help", "material add copy --help"])
def test_help_loads_no_database_and_nothing_heavy(argv: str) -> None:
    program = (
        "import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules));"
        f" from kaleidoscope.cli import main; main({argv.split()!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert "kaleidoscope.operator_cli" in loaded
    assert loaded.isdisjoint({"alembic", "numpy", "PIL", "pyarrow", "scipy", "sqlalchemy", "yaml"})


# ── database ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_schema_is_made_and_told(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    status = shell.json("database status")
    assert status["revision"] is None and status["up_to_date"] is False
    assert "kaleidoscope database upgrade" in shell.ok("database status")
    assert "is upgraded from nothing" in shell.ok("database upgrade")
    again = shell.json("database upgrade")
    assert again["before"] == again["revision"] == status["needed"]
    assert shell.json("database status")["up_to_date"] is True


def test_the_schema_of_the_log_is_told_and_upgraded_too(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    monkeypatch.setenv("KALEIDOSCOPE_LOG_URL", f"sqlite:///{tmp_path}/its-log.db")
    assert shell.json("database upgrade")["log"] is None
    (tmp_path / "its-log.db").touch()  # as a server of an earlier version left one behind
    status = shell.json("database status")
    assert (status["up_to_date"], status["log"]["up_to_date"]) == (True, False)
    assert "kaleidoscope database upgrade" in shell.ok("database status")
    said = shell.ok("database upgrade")
    assert "new.db is up to date" in said and "its-log.db is upgraded from nothing" in said
    assert shell.json("database status")["log"]["up_to_date"] is True


def test_a_database_that_cannot_be_is_an_error_not_a_traceback(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_DATABASE_URL", "mysql://nowhere/x")
    assert "neither sqlite nor postgresql" in shell.fails("bad_input", "database status")
    assert "neither sqlite nor postgresql" in shell.fails("bad_input", "business list")
    monkeypatch.setenv("KALEIDOSCOPE_DATABASE_URL", "sqlite:////nowhere/at/all.db")
    ran = shell("business list --json")
    assert ran.code == 1 and ran.json["error"]["code"] == "unavailable"


def test_a_wrong_folder_is_said_and_gets_no_database(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for line in ("business list", "material show c1", "material submit --all", "token list --installation"):
        message = shell.fails("not_found", line)
        assert str(elsewhere / "kaleidoscope.db") in message and "right folder" in message
    with pytest.raises(SystemExit) as stop:
        cli.main(["worker", "--once"])
    assert (stop.value.code, "right folder" in shell.capsys.readouterr().err) == (2, True)
    assert list(elsewhere.iterdir()) == []
    made = shell("business create acme")
    assert (made.code, made.err) == (0, f"Made the database {elsewhere / 'kaleidoscope.db'}.\n")
    assert shell.json("business list")["items"][0]["name"] == "acme"  # the id, where no name is given
    assert "right folder" not in shell.fails("not_found", "business show nobody")


def test_a_token_of_the_installation_may_come_before_any_business(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_DATABASE_URL", f"sqlite:///{tmp_path}/new.db")
    assert shell("token create --user ops --role admin --installation --json").json["secret"]
    assert shell.json("token list --installation")["items"][0]["user"] == "ops"


# ── businesses, tokens, audit ───────────────────────────────────────────────────────────────────────────────────────


def test_a_business_is_founded_listed_shown_and_changed(shell: Shell, tmp_path: Path) -> None:
    assert "No businesses." in shell.ok("business list")
    made = shell.json("business create acme --two-person-publish --name", "Acme Ltd")
    assert (made["id"], made["name"], made["two_person_publish"]) == ("acme", "Acme Ltd", True)
    shell.ok("business create other --name Other")
    assert [b["id"] for b in shell.json("business list")["items"]] == ["acme", "other"]
    assert "Acme Ltd" in shell.ok("business list") and "Acme Ltd" in shell.ok("business show")
    assert shell.json("business show other")["name"] == "Other"
    (tmp_path / "p.yaml").write_text("- {name: rate, source: product, max_length: 9, fallback: {en: good}}\n")
    changed = shell.json("business set --one-person-publish --placeholders p.yaml --name New")
    assert (changed["two_person_publish"], changed["name"]) == (False, "New")
    assert [p["name"] for p in changed["placeholders"]] == ["rate"]
    assert "{rate}" in shell.ok("business show acme")


def test_lists_go_on_where_they_ended(shell: Shell) -> None:
    for name in ("a1", "a2", "a3"):
        shell.ok(f"business create {name} --name X")
    page = shell.json("business list --limit 2")
    assert [b["id"] for b in page["items"]] == ["a1", "a2"]
    assert f"--cursor {page['next_cursor']}" in shell.ok("business list --limit 2")
    rest = shell.json(f"business list --limit 2 --cursor {page['next_cursor']}")
    assert [b["id"] for b in rest["items"]] == ["a3"] and rest["next_cursor"] is None
    assert "cursor" in shell.fails("bad_input", "business list --cursor nonsense")


def test_what_cannot_be_is_refused_with_what_to_do(acme: Shell, tmp_path: Path) -> None:
    assert "already" in acme.fails("conflict", "business create acme --name Again")
    assert "lower-case" in acme.fails("bad_input", "business create Acme!Ltd --name X")
    assert "business create" in acme.fails("not_found", "business show nobody")
    acme.fails("conflict", "business set --version 9 --name X")
    (tmp_path / "p.yaml").write_text("{a: 1}")
    assert "give a list" in acme.fails("bad_input", "business set --placeholders p.yaml")
    (tmp_path / "p.yaml").write_text("[: - {")
    assert "not valid YAML" in acme.fails("bad_input", "business set --placeholders p.yaml")
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in acme.fails("bad_input", "business set --placeholders p.yaml")


def test_a_business_has_to_be_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KALEIDOSCOPE_BUSINESS")
    for line in (
        "business show",
        "material list",
        "scene list",
        "audit",
        "taxonomy show",
        "token create --user x --role admin",
    ):
        assert "--business" in shell.fails("bad_input", line)


@pytest.mark.parametrize(
    "line",
    [
        "material list",
        "scene list",
        "audit",
        "taxonomy show",
        "taxonomy versions",
        "token create --user x --role admin",
    ],
)
def test_a_business_has_to_be_there(shell: Shell, line: str) -> None:
    shell.fails("not_found", f"{line} --business nobody")


def test_who_works_comes_from_the_option_the_setting_or_the_login(
    acme: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "login")
    monkeypatch.setenv("KALEIDOSCOPE_USER", "setting")

    def author(*argv: str) -> str:
        with pytest.raises(SystemExit):
            cli.main(["material", "add", "copy", *argv, "--json"])
        return str(json.loads(capsys.readouterr().out)["author"])

    assert author("c1", "--title", "One", "--as", "option") == "option"
    assert author("c2", "--title", "Two") == "setting"
    monkeypatch.delenv("KALEIDOSCOPE_USER")
    assert author("c3", "--title", "Three") == "login"
    assert "on one line" in acme.fails("bad_input", "material list", user="two\nlines")


def test_a_token_is_shown_once_and_ends_when_revoked(acme: Shell) -> None:
    made = acme.json("token create --user bff --role viewer --role editor --days 7")
    assert made["secret"].startswith("kld_") and made["token"]["roles"] == ["editor", "viewer"]
    assert made["secret"] not in acme.ok("token list") and made["token"]["id"] in acme.ok("token list")
    assert acme.json("token list")["items"][0]["user"] == "bff"
    assert "kld_" in acme.ok("token create --user other --role admin")
    assert "Revoked" in acme.ok(f"token revoke {made['token']['id']}")
    assert "revoked" in acme.ok("token list")
    acme.fails("not_found", "token revoke nothing")
    assert "days" in acme.fails("bad_input", "token create --user bff --role viewer --days -3")
    acme.fails("bad_usage", "token create --user bff --role emperor")


def test_the_installation_has_tokens_of_its_own(acme: Shell) -> None:
    made = acme.json("token create --user ops --role admin --installation")
    assert made["token"]["business"] is None
    assert acme.json("token list")["items"] == []
    assert [t["id"] for t in acme.json("token list --installation")["items"]] == [made["token"]["id"]]
    acme.fails("not_found", f"token revoke {made['token']['id']}")
    assert acme.json(f"token revoke --installation {made['token']['id']}")["revoked_at"]


def test_the_trail_says_who_did_what(acme: Shell) -> None:
    acme.ok("material add copy c1 --title Hello")
    acme.ok("material submit c1", user="eve")
    trail = acme.json("audit --entity materials --key c1")["items"]
    assert [(e["actor"], e["action"]) for e in trail] == [("eve", "changed"), ("ann", "created")]
    said = acme.ok("audit --entity materials")
    assert "state: draft → in_review" in said and "eve" in said
    page = acme.json("audit --limit 1")
    assert len(page["items"]) == 1
    assert acme.json(f"audit --limit 1 --cursor {page['next_cursor']}")["items"][0]["seq"] < page["items"][0]["seq"]
    assert "No changes." in acme.ok("audit --key nothing")


def test_the_trail_fits_a_terminal_and_is_whole_for_machines(acme: Shell) -> None:
    acme.ok("business set --name", "x" * 200)
    said = acme.ok("audit --entity businesses --limit 1")
    assert "changed businesses acme, name: Acme → xxx" in said and max(map(len, said.splitlines())) < 140
    assert acme.json("audit --entity businesses --limit 1")["items"][0]["after"]["name"] == "x" * 200
    acme.ok("material add copy c1 --title Hello")
    acme.ok("material submit c1")
    acme.ok("material approve c1", user="rex")
    said = acme.ok("audit --entity materials --limit 1")
    assert "reviewer: none → rex" in said and "reviewed at" not in said  # the time stands in its own column
    assert "reviewed_at" in acme.json("audit --entity materials --limit 1")["items"][0]["after"]


# ── taxonomy ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_vocabulary_goes_out_and_comes_back(acme: Shell, tmp_path: Path) -> None:
    assert "image_style" in acme.ok("taxonomy show") and acme.json("taxonomy show")["number"] == 1
    assert "Wrote v.yaml" in acme.ok("taxonomy export v.yaml")
    text = (tmp_path / "v.yaml").read_text()
    assert acme.ok("taxonomy export").strip() == text.strip()
    assert "nothing would change" in acme.fails("bad_input", "taxonomy import v.yaml")
    (tmp_path / "v.yaml").write_text(text.replace("id: flat,", "id: flat_art,"))
    message = acme.fails("bad_input", "taxonomy import v.yaml")
    assert "flat" in message
    (tmp_path / "m.yaml").write_text("image_style=flat: image_style=flat_art\n")
    made = acme.json("taxonomy import v.yaml --mapping m.yaml --note better --expected 1")
    assert made["number"] == 2 and made["mapping"] == {"image_style=flat": ["image_style=flat_art"]}
    assert [v["number"] for v in acme.json("taxonomy versions")["items"]] == [2, 1]
    assert "better" in acme.ok("taxonomy versions")
    assert acme.json("taxonomy map 1 2")["mapping"] == {"image_style=flat": ["image_style=flat_art"]}
    assert "image_style=flat_art" in acme.ok("taxonomy map 1 2")
    assert "stayed as it is" in acme.ok("taxonomy map 2 2")
    acme.fails("bad_input", "taxonomy map 2 1")
    assert "flat_art" not in acme.ok("taxonomy show --number 1")
    acme.fails("not_found", "taxonomy show --number 9")
    acme.fails("conflict", "taxonomy import v.yaml --expected 1")


def test_a_change_is_shown_before_it_is_made(library: Shell, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "- {op: split, dimension: image_style, value: flat, into: [{id: plain, labels: {en: Plain, zh: 平}},"
        " {id: bold, labels: {en: Bold, zh: 重}}]}\n"
    )
    dry = library.json("taxonomy evolve c.yaml --dry-run")
    assert [a["material"] for a in dry["affected"]] == [
        "advisor-flat", "chart-flat", "family-flat", "growth-flat", "piggy-flat",
    ]  # fmt: skip
    assert dry["affected"][0]["unknown"] == {"image_style=flat": ["image_style=bold", "image_style=plain"]}
    said = library.ok("taxonomy evolve c.yaml --dry-run")
    assert "5 materials would need new tags" in said and "piggy-flat" in said
    assert library.json("taxonomy show")["number"] == 1
    assert library.json("taxonomy evolve c.yaml --note split")["number"] == 2
    assert library.json("taxonomy show")["number"] == 2
    assert "flat" in library.fails("bad_input", "taxonomy evolve c.yaml")
    library.fails("bad_usage", "taxonomy evolve nowhere.yaml")


def test_what_names_a_changed_tag_is_shown(approved: Shell, tmp_path: Path) -> None:
    approved.ok("intervention add wealth-home no-gold --kind block --tag main_colour=gold --segment age=young")
    (tmp_path / "c.yaml").write_text(
        "- {op: rename, dimension: main_colour, value: gold, id: golden}\n"
        "- {op: rename, dimension: image_style, value: realistic, id: photo}\n"
    )
    said = approved.ok("taxonomy evolve c.yaml --dry-run")
    assert "scene wealth-home: intervention no-gold: main_colour=gold becomes main_colour=golden." in said
    dry = approved.json("taxonomy evolve c.yaml --dry-run")
    rules = {r["constraint"] or r["intervention"]: r["becomes"] for r in dry["rules"]}
    assert rules["no-gold"] == {"main_colour=gold": "becomes main_colour=golden"} and len(rules) > 1
    made = approved.json("taxonomy evolve c.yaml")
    assert made["number"] == 2 and (made["rules"], made["mapping"]) == (dry["rules"], dry["mapping"])
    (tmp_path / "c.yaml").write_text("- {op: retire, dimension: motion}\n")
    assert "written anew" not in approved.ok("taxonomy evolve c.yaml")


# ── materials ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_materials_of_every_kind_are_added_and_shown(acme: Shell, tmp_path: Path) -> None:
    copy = acme.json(
        "material add copy c1 --title", "Hello {first_name}", "--tag", "benefit=coupon", "--language", "zh"
    )
    assert (copy["content"]["title"], copy["content"]["language"]) == ("Hello {first_name}", "zh")
    assert [(t["dimension"], t["value"]) for t in copy["tags"]] == [("benefit", "coupon")]
    image = acme.json(f"material add image i1 {EXAMPLE}/images/chart-flat.webp --alt Bars")
    assert (image["content"]["width"], image["content"]["alt"]) == (640, "Bars")
    assert list(tmp_path.glob("kaleidoscope-files/acme/*/*.webp"))
    layout = acme.json(f"material add layout l1 {EXAMPLE}/layouts/above.yaml")
    assert layout["content"]["width"] == 360
    style = acme.json("material add style s1 --property font_size --value 21 --applies-to copy.title")
    assert style["content"]["value"] == 21
    acme.ok("material add style s2 --property color --value #112233")
    listed = acme.ok("material list")
    for word in (
        "Hello {first_name}",
        "640 × 480 px Bars",
        "360 × 470 px",
        "copy.title: font_size 21",
        "everything: color",
    ):
        assert word in listed
    for id in ("c1", "i1", "l1", "s1", "s2"):
        assert acme.json(f"material show {id}")["id"] == id
        assert id in acme.ok(f"material show {id}")
    assert [m["id"] for m in acme.json("material list --kind style")["items"]] == ["s1", "s2"]
    assert [m["id"] for m in acme.json("material list --tag benefit=coupon")["items"]] == ["c1"]
    assert acme.json("material list --state approved")["items"] == []


def test_a_material_that_cannot_be_is_refused(acme: Shell, tmp_path: Path) -> None:
    acme.ok("material add copy c1 --title Hello")
    assert "already" in acme.fails("conflict", "material add copy c1 --title Other")
    assert "'c1'" in acme.fails("conflict", "material add copy c2 --title Hello")
    acme.ok("material add copy c2 --title Hello --allow-duplicate")
    assert "Did you mean {first_name}" in acme.fails("bad_input", "material add copy c3 --title {frist_name}")
    assert "is not NAME=VALUE" in acme.fails("bad_input", "material add copy c3 --title X --tag flat")
    assert "dimension" in acme.fails("bad_input", "material add copy c3 --title X --tag stile=flat")
    assert "no number" in acme.fails("bad_input", "material add style s --property font_size --value big")
    assert "colour" in acme.fails("bad_input", "material add style s --property color --value red")
    (tmp_path / "evil.webp").write_text("<svg onload=alert(1)>")
    acme.fails("bad_input", "material add image i evil.webp")
    (tmp_path / "l.yaml").write_text("- a\n- b\n")
    assert "an object" in acme.fails("bad_input", "material add layout l l.yaml")
    (tmp_path / "l.yaml").write_text("width: 10\nheight: 10\nroot: {type: text, show: copy.title, font_size: 4, x: 1}")
    assert "root.x" in acme.fails("bad_input", "material add layout l l.yaml")
    acme.fails("bad_usage", "material add image i nowhere.png")
    acme.fails("not_found", "material show nothing")
    acme.fails("not_found", "material tag nothing benefit=coupon")


def test_tagging_replaces_the_dimensions_it_names(acme: Shell) -> None:
    acme.ok(
        "material add copy c1 --title Hello --tag benefit=coupon --tag benefit=lottery --tag headline=recommendation"
    )
    changed = acme.json("material tag c1 benefit=red_packet yield=past_year")
    assert [f"{t['dimension']}={t['value']}" for t in changed["tags"]] == [
        "benefit=red_packet", "headline=recommendation", "yield=past_year",
    ]  # fmt: skip
    assert "benefit" not in acme.ok("material tag c1 benefit=")
    acme.fails("conflict", "material tag c1 benefit=coupon --version 1")
    assert "Did you mean" in acme.fails("bad_input", "material tag c1 benefit=cupon")


def test_a_material_is_changed_and_needs_review_again(library: Shell, tmp_path: Path) -> None:
    library.ok("material submit --all")
    library.ok("material approve --all", user="rex")
    (tmp_path / "c.yaml").write_text("{title: Earn more, language: en}")
    changed = library.json("material change en-yield --content c.yaml --version 3")
    assert (changed["content"]["title"], changed["content"]["subtitle"], changed["state"]) == ("Earn more", "", "draft")
    assert {t["dimension"] for t in changed["tags"]} == {"headline", "plain_language", "safety", "yield"}
    library.fails("conflict", "material change en-yield --content c.yaml --version 3")
    shown = library.json("material show zh-yield")["content"]
    (tmp_path / "c.json").write_text(json.dumps({**shown, "button": "Go"}))
    assert library.json("material change zh-yield --content c.json")["content"] == {**shown, "button": "Go"}
    tags = library.json("material change zh-yield --tag benefit=coupon")["tags"]
    assert [(t["dimension"], t["value"]) for t in tags] == [("benefit", "coupon")]
    before = library.json("material show chart-flat")["content"]
    told = library.json("material change chart-flat --alt Bars")
    assert told["content"] == {**before, "alt": "Bars"} and told["state"] == "draft"
    PIL.Image.new("RGB", (70, 50), "red").save(tmp_path / "new.png")
    other = library.json("material change chart-flat --picture new.png")["content"]
    assert (other["width"], other["alt"]) == (70, "Bars") and other["file"] != before["file"]
    assert "Earn more" in library.ok("material change en-yield --content c.yaml")


def test_a_change_of_a_material_that_cannot_be_is_refused(library: Shell, tmp_path: Path) -> None:
    assert "--content" in library.fails("bad_input", "material change en-yield")
    (tmp_path / "c.yaml").write_text("{title: X, colour: red}")
    assert "colour" in library.fails("bad_input", "material change en-yield --content c.yaml")
    assert "leave" in library.fails("bad_input", "material change chart-flat --content c.yaml --alt X")
    assert "is copy" in library.fails("bad_input", "material change en-yield --alt X")
    (tmp_path / "c.yaml").write_text("- X")
    assert "an object" in library.fails("bad_input", "material change en-yield --content c.yaml")
    (tmp_path / "c.yaml").write_text("{kind: style, property: color, value: '#112233'}")
    assert "cannot become style" in library.fails("bad_input", "material change en-yield --content c.yaml")
    library.fails("not_found", "material change nothing --alt X")
    library.fails("bad_usage", "material change en-yield --content nowhere.yaml")


def test_an_import_does_everything_or_nothing_unless_partial(acme: Shell, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(
        "id,kind,title,file,tags\nc1,copy,Hello,,benefit=coupon\nc2,copy,{nobody},,\ni1,image,,../../etc/passwd,\n"
    )
    message = acme.fails("bad_input", "material import m.csv")
    assert "2 of 3 rows are wrong" in message and "row 3 (c2)" in message and "row 4 (i1)" in message
    details = acme("material import m.csv --json").json["error"]["details"]
    assert [row["row"] for row in details["rows"]] == [3, 4]
    assert acme.json("material list")["items"] == []
    report = acme.json("material import m.csv --partial")
    assert (report["created"], report["failed"]) == (1, 2)
    assert "1 unchanged" in (said := acme.ok("material import m.csv --partial")) and "row 3 (c2)" in said
    (tmp_path / "m.csv").write_text("id,kind,title\nc8,copy,{nobody}\nc9,copy,{nobody}\n")
    assert "every row is wrong" in acme.fails("bad_input", "material import m.csv --partial")
    details = acme("material import m.csv --partial --json").json["error"]["details"]
    assert [row["id"] for row in details["rows"]] == ["c8", "c9"]
    (tmp_path / "m.csv").write_text("id;art\n")
    assert "column" in acme.fails("bad_input", "material import m.csv")
    acme.fails("bad_usage", "material import nowhere.csv")
    acme.fails("bad_usage", "material import m.csv --files nowhere")


def test_the_example_is_imported_and_a_second_time_changes_nothing(library: Shell) -> None:
    again = library.json(f"material import {EXAMPLE}/materials.csv --files {EXAMPLE}/images")
    assert (again["created"], again["changed"], again["unchanged"]) == (0, 0, 20)
    assert len(library.json("material list --limit 100")["items"]) == 22


def test_materials_are_reviewed_by_somebody_else(library: Shell) -> None:
    assert library.json("material submit en-yield zh-yield") == {"moved": 2, "skipped": {}, "notes": []}
    assert "Submitted 20." in library.ok("material submit --all")
    own = library.ok("material approve en-yield")
    assert "Approved 0." in own and "Skipped 1: your own: somebody else has to review it" in own
    assert library.json("material approve --all --kind copy", user="rex")["moved"] == 10
    assert "reason" in library.fails("bad_input", "material reject city-realistic", user="rex")
    assert library.json("material reject city-realistic --reason", "too dark", user="rex")["moved"] == 1
    assert "too dark" in library.ok("material show city-realistic")
    assert library.json("material retire city-realistic")["moved"] == 1
    assert library.json("material restore city-realistic", user="bob")["moved"] == 1
    assert library.json("material show city-realistic")["author"] == "ann"
    library.fails("not_found", "material submit nothing")


@pytest.mark.parametrize("move", ["submit", "approve", "reject", "retire", "restore"])
def test_a_step_says_for_what(scene: Shell, move: str) -> None:
    assert "--all" in scene.fails("bad_input", f"material {move}")
    assert "--all" in scene.fails("bad_input", f"material {move} en-yield --all")
    assert "--all" in scene.fails("bad_input", f"material {move} en-yield --kind copy")
    assert "--all" in scene.fails("bad_input", f"variant {move} wealth-home")
    assert "--all" in scene.fails("bad_input", f"variant {move} wealth-home --all --clean")


# ── scenes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_scene_is_kept_as_code(library: Shell, tmp_path: Path) -> None:
    file = EXAMPLE / "scene.yaml"
    assert "would be made" in library.ok(f"scene diff {file}")
    dry = library.json(f"scene apply {file} --dry-run")
    assert dry["creates"] and not dry["applied"] and library.json("scene list")["items"] == []
    assert "No scenes." in library.ok("scene list")
    assert "is made" in library.ok(f"scene apply {file}")
    assert (
        "nothing to change" in library.ok(f"scene apply {file}") and library.json(f"scene diff {file}")["changes"] == []
    )
    assert library.json("scene show wealth-home")["version"] == 1
    library.ok("scene export wealth-home s.yaml")
    assert library.json("scene diff s.yaml")["changes"] == []
    assert library.ok("scene export wealth-home").strip() == (tmp_path / "s.yaml").read_text().strip()
    (tmp_path / "s.yaml").write_text((tmp_path / "s.yaml").read_text() + "cap: 50\n")
    assert library.json("scene apply s.yaml --version 1")["changes"] == ["+ cap: 50"]
    (tmp_path / "s.yaml").write_text((tmp_path / "s.yaml").read_text().replace("cap: 50", "cap: 60"))
    library.fails("conflict", "scene apply s.yaml --version 1")
    assert "10 copy × 10 image × 2 layout" in library.ok("scene list")
    shown = library.ok("scene show wealth-home")
    assert "forbid copy.yield=* with image.subject=person" in shown and "none made" in shown


def test_a_scene_that_cannot_be_is_refused(library: Shell, tmp_path: Path) -> None:
    for text, said in (
        ("scene: s\nname: S\nslotz: []\n", "slotz"),
        ("scene: s\nscene: t\nname: S\n", "given twice"),
        ("name: S\n", "begins with `scene: ID`"),
        ("scene: s\nname: S\nslots: [{name: copy, kind: copy, materials: [nobody]}]\n", "no material 'nobody'"),
        ("scene: [", "not valid YAML"),
    ):
        (tmp_path / "s.yaml").write_text(text)
        assert said in library.fails("bad_input", "scene apply s.yaml")
    library.fails("not_found", "scene show nothing")
    library.fails("not_found", "scene export nothing")
    library.fails("not_found", "scene count nothing")
    library.fails("bad_usage", "scene apply nowhere.yaml")


def test_the_combinations_are_counted_and_what_is_odd_is_said(scene: Shell) -> None:
    counted = scene.json("scene count wealth-home")
    assert (counted["combinations"], counted["legal"]) == (200, 150)
    assert counted["findings"] == [] and len(counted["ruled_out"]) == 2
    said = scene.ok("scene count wealth-home")
    assert "150 of 200 combinations (10 copy × 10 image × 2 layout) are legal." in said
    assert "advisor-flat" in said


def test_the_traffic_plan_is_an_estimate_or_says_what_is_missing(scene: Shell, tmp_path: Path) -> None:
    scene.json("scene plan wealth-home")
    scene.ok("scene plan wealth-home")
    text = (EXAMPLE / "scene.yaml").read_text().partition("traffic:")[0]
    (tmp_path / "s.yaml").write_text(text)
    scene.ok("scene apply s.yaml")
    assert "traffic" in scene.fails("bad_input", "scene plan wealth-home")


# ── variants ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_variants_are_made_listed_and_shown(scene: Shell) -> None:
    again = scene.json("variant make wealth-home")
    assert (again["legal"], again["created"], again["kept"]) == (150, 0, 150)
    assert "150 kept" in scene.ok("variant make wealth-home")
    page = scene.json("variant list wealth-home --limit 500")
    assert len(page["items"]) == 150
    flat = scene.json(
        "variant list wealth-home --limit 500", "--where", "image.image_style=flat", "--where", "copy:zh-quota"
    )
    assert len(flat["items"]) == 9
    remarked = [v for v in page["items"] if v["remarks"]]
    for option, count in (("--remarked", len(remarked)), ("--clean", 150 - len(remarked))):
        assert len(scene.json(f"variant list wealth-home --limit 500 {option}")["items"]) == count
    first = page["items"][0]
    assert first["id"] in scene.ok("variant list wealth-home --limit 1")
    shown = scene.json(f"variant show wealth-home {first['id'][:8]}")
    assert shown["id"] == first["id"] and any(tag.startswith("image_style=") for tag in shown["tags"])
    assert first["id"] in scene.ok(f"variant show wealth-home {first['id']}")
    assert "No variants." in scene.ok("variant list wealth-home --state approved")
    scene.fails("not_found", "variant show wealth-home ffff")
    scene.fails("not_found", "variant list nothing")
    assert (
        "did you mean" in scene.fails("bad_input", "variant list wealth-home --where", "image.image_stile=flat").lower()
    )


def test_variants_are_reviewed_in_bulk(scene: Shell) -> None:
    assert scene.json("variant submit wealth-home --all") == {"moved": 150, "skipped": {}, "notes": []}
    assert "Skipped 150" in scene.ok("variant submit wealth-home --all")
    rejected = scene.json(
        "variant reject wealth-home --where", "copy:zh-quota", "--where", "layout:above", "--reason", "no", user="rex"
    )
    assert rejected["moved"] == 8
    assert scene.json("variant approve wealth-home --state in_review", user="rex")["moved"] == 142
    one = scene.json("variant list wealth-home --state rejected --limit 1")["items"][0]["id"]
    assert scene.json(f"variant retire wealth-home --id {one}")["moved"] == 1
    assert scene.json(f"variant restore wealth-home --id {one}")["moved"] == 1
    counts = scene.json("scene show wealth-home")["variants"]
    assert counts == {"draft": 1, "approved": 142, "rejected": 7}
    assert "142 approved" in scene.ok("scene show wealth-home")


# ── interventions ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_rules_are_added_listed_and_ended(approved: Shell) -> None:
    made = approved.json(
        "intervention add wealth-home no-gold --kind block --tag main_colour=gold --segment age=young --segment city=sh"
        " --from 2026-01-01 --until 2099-01-01T00:00+08:00 --priority 5 --note careful"
    )
    assert made["target"] == {"tag": {"main_colour": "gold"}} and made["segment"] == {"age": "young", "city": "sh"}
    assert (made["starts_at"], made["ends_at"]) == ("2026-01-01T00:00:00Z", "2098-12-31T16:00:00Z")
    assert made["conflicts"] == [] and made["priority"] == 5
    first = approved.json("variant list wealth-home --limit 1")["items"][0]["id"]
    pinned = approved.ok(f"intervention add wealth-home one --kind pin --variant {first[:10]} --segment age=old")
    assert first in pinned and "next release" in pinned
    assert [r["id"] for r in approved.json("intervention list wealth-home")["items"]] == ["no-gold", "one"]
    assert [r["id"] for r in approved.json("intervention list wealth-home --at 2025-01-01")["items"]] == ["one"]
    assert "main_colour=gold, for age=young, city=sh" in approved.ok("intervention list wealth-home")
    assert approved.json("intervention end wealth-home no-gold")["ended"] is True
    assert "Ended" in approved.ok("intervention end wealth-home no-gold")
    assert "ended" in approved.ok("intervention list wealth-home")


def test_what_is_given_of_a_rule_is_changed_and_the_rest_stays(approved: Shell) -> None:
    approved.ok(
        "intervention add wealth-home r --kind block --tag main_colour=gold --segment age=young --priority 5"
        " --until 2099-01-01"
    )
    changed = approved.json("intervention change wealth-home r --segment city=sh --note careful --version 1")
    assert (changed["segment"], changed["note"], changed["version"]) == ({"city": "sh"}, "careful", 2)
    assert (changed["target"], changed["priority"]) == ({"tag": {"main_colour": "gold"}}, 5)
    approved.fails("conflict", "intervention change wealth-home r --priority 1 --version 1")
    said = approved.ok("intervention change wealth-home r --everybody --material chart-flat --priority 0 --until", "")
    assert "Changed block r: material chart-flat, for everybody" in said
    now = approved.json("intervention list wealth-home")["items"][0]
    assert (now["segment"], now["ends_at"], now["priority"], now["note"]) == ({}, None, 0, "careful")
    assert "say what to change" in approved.fails("bad_input", "intervention change wealth-home r")
    assert "one of them" in approved.fails("bad_input", "intervention change wealth-home r --everybody --segment a=b")
    approved.fails("not_found", "intervention change wealth-home nothing --priority 1")


def test_conflicts_are_shown_before_a_rule_is_changed(approved: Shell) -> None:
    approved.ok("intervention add wealth-home pin-flat --kind pin --tag image_style=flat")
    approved.ok("intervention add wealth-home no-gold --kind block --tag main_colour=gold --segment age=young --force")
    line = "intervention change wealth-home no-gold --material chart-flat --everybody"
    assert "pin-flat" in (message := approved.fails("conflict", line)) and "Nothing was changed" in message
    assert approved.json("intervention list wealth-home")["items"][0]["segment"] == {"age": "young"}
    assert approved.json(f"{line} --force")["conflicts"][0]["code"] == "pin_against_block"


def test_conflicts_are_shown_before_a_rule_is_added(approved: Shell) -> None:
    approved.ok("intervention add wealth-home pin-flat --kind pin --tag image_style=flat")
    line = "intervention add wealth-home no-flat --kind block --material chart-flat"
    message = approved.fails("conflict", line)
    assert "pin-flat" in message and "--force" in message
    conflicts = approved(f"{line} --json").json["error"]["details"]["conflicts"]
    assert conflicts[0]["code"] == "pin_against_block"
    assert len(approved.json("intervention list wealth-home")["items"]) == 1
    assert "pin-flat" in approved.ok(f"{line} --force")
    assert len(approved.json("intervention list wealth-home")["items"]) == 2


def test_a_rule_that_cannot_be_is_refused(approved: Shell) -> None:
    add = "intervention add wealth-home r --kind block"
    assert "exactly one" in approved.fails("bad_input", add)
    assert "exactly one" in approved.fails("bad_input", f"{add} --material chart-flat --tag image_style=flat")
    assert "2026-11-28T20:00+08:00" in approved.fails("bad_input", f"{add} --material chart-flat --until tomorrow")
    assert "is over" in approved.fails("bad_input", f"{add} --material chart-flat --until 2020-01-01")
    assert "NAME=VALUE" in approved.fails("bad_input", f"{add} --material chart-flat --segment young")
    approved.fails("bad_input", f"{add} --material nothing --force")
    approved.fails("not_found", f"{add} --variant ffff")
    approved.fails("not_found", "intervention list nothing")
    approved.fails("not_found", "intervention end wealth-home nothing")
    approved.fails("bad_usage", "intervention add wealth-home r --kind hide --material chart-flat")


# ── releases ────────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD = "--metric error_rate=0.001 --metric click_rate=0.04"


def test_a_release_goes_from_draft_to_full_and_back(approved: Shell) -> None:
    drafted = approved.json(f"release draft wealth-home --plan {EXAMPLE}/plan.yaml --note first")
    assert (drafted["number"], drafted["state"], drafted["variants"], drafted["note"]) == (1, "draft", 150, "first")
    assert approved.json("release live wealth-home") == {"scene": "wealth-home", "live": None}
    assert "Nothing was live" in approved.ok("release live wealth-home")
    started = approved.json("release start wealth-home 1", user="pat")
    assert (started["action"], started["candidate"], started["share"], started["actor"]) == ("start", 1, 0.05, "pat")
    assert "click_rate: 0.01" in approved.fails(
        "conflict", "release advance wealth-home --metric error_rate=0.001 --metric click_rate=0.01"
    )
    assert "not measured" in approved.fails("conflict", "release advance wealth-home --healthy")
    assert "to 50 %" in approved.ok(f"release advance wealth-home {GOOD}")
    assert approved.json(f"release advance wealth-home {GOOD}")["stable"] == 1
    assert "release 1 is stable" in approved.ok("release live wealth-home")

    live = approved.json("release live wealth-home")["live"]
    assert (live["share"], live["stable_share"], live["seq"]) == (0, 1, 3)
    assert "entry 3 of the ledger" in approved.ok("release live wealth-home")
    assert "1 (100 %)" in approved.ok("release ledger wealth-home")

    Path("p.yaml").write_text("shares: {control: 0.75, random: 0.25}\n")
    approved.ok("release draft wealth-home --plan p.yaml --note second")
    shown = approved.json("release show wealth-home 2")
    assert shown["content"]["shares"] == {"control": 0.75, "random": 0.25, "model": 0.0, "challenger": 0.0}
    assert shown["content"]["variants"] == 150
    said = approved.ok("release show wealth-home 2")
    assert "control 75 %, random 25 %" in said and "150, made of 22 materials" in said
    assert len(approved.json("release show wealth-home 2 --content")["content"]["variants"]) == 150
    approved.ok("release start wealth-home 2 --expected-seq 3")
    approved.fails("conflict", "release pause wealth-home --reason lunch --expected-seq 3")
    assert "paused" in approved.ok("release pause wealth-home --reason lunch")
    assert "paused" in approved.fails("conflict", "release advance wealth-home --healthy")
    assert approved.json("release resume wealth-home")["paused"] is False
    assert approved.json("release advance wealth-home --healthy")["stage"] == 1
    back = approved.json("release rollback wealth-home --reason", "clicks fell")
    assert (back["stable"], back["candidate"], back["reason"]) == (1, None, "clicks fell")
    assert [(r["number"], r["state"]) for r in approved.json("release list wealth-home")["items"]] == [
        (2, "rolled_back"), (1, "full"),
    ]  # fmt: skip
    assert "rolled back" in approved.ok("release list wealth-home")
    ledger = approved.json("release ledger wealth-home")["items"]
    assert [e["seq"] for e in ledger] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert "clicks fell" in approved.ok("release ledger wealth-home")
    at = approved.json("release live wealth-home", "--at", ledger[3]["at"])["live"]
    assert (at["stable"], at["candidate"], at["paused"]) == (1, 2, True)
    assert approved.json("release live wealth-home --at 2020-01-01")["live"] is None


def test_a_draft_without_a_plan_keeps_what_the_last_release_said(approved: Shell) -> None:
    said = approved.ok("release draft wealth-home --random 0.25")
    assert "Guardrails: none" in said and "Stages: 1 %, 5 %, 20 %, 50 %, 100 %." in said
    approved.ok(f"release draft wealth-home --plan {EXAMPLE}/plan.yaml")
    said = approved.ok("release draft wealth-home --random 0.1")
    assert "The rest is as in release 2." in said and "Buckets: control 90 %, random 10 %." in said
    assert "Guardrails: error_rate at most 0.01 over 600 s; click_rate at least 0.02" in said
    assert "Stages: 5 %, 50 %, 100 %." in said
    same = approved.json("release draft wealth-home")
    assert (same["plan_of"], same["plan"]["shares"]["random"], len(same["plan"]["guardrails"])) == (3, 0.1, 2)
    model = approved.json("release draft wealth-home --model 1 --model-version m1 --without-random", "a test")
    assert (model["plan"]["model_version"], len(model["plan"]["guardrails"])) == ("m1", 2)
    # What only those shares needed goes with them; nobody said again why nothing is random.
    assert "without_random" in approved.fails("bad_input", "release draft wealth-home --control 1")
    back = approved.json("release draft wealth-home --random 0.5")["plan"]
    assert (back["model_version"], back["without_random"]) == (None, None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions put to somebody at a terminal, who says yes."""
    from kaleidoscope.operator_cli import frame

    questions: list[str] = []

    def yes(text: str, **_: object) -> bool:
        questions.append(text)
        return True

    monkeypatch.setattr(frame, "_at_a_terminal", lambda: True)
    monkeypatch.setattr(typer, "confirm", yes)
    return questions


def test_a_step_at_a_terminal_is_made_from_what_was_shown(
    approved: Shell, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        approved.ok("release draft wealth-home --random 0.5")
        approved.ok(f"release start wealth-home {number}")
        ran = approved("release advance wealth-home --healthy")
        assert ran.code == 0 and "in canary with 1 % of the traffic" in ran.err
        for _ in range(3):
            approved.ok("release advance wealth-home --healthy --yes")
    assert asked == ["Move it to its next stage?"] * 2

    def meanwhile(text: str, **_: object) -> bool:
        """Somebody else rolls back before the answer."""
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
            cli.main(["release", "rollback", "wealth-home", "--reason", "bad", "--yes", "--as", "pat"])
        return True

    monkeypatch.setattr(typer, "confirm", meanwhile)
    ran = approved("release rollback wealth-home --reason bad")
    assert ran.code == 2 and "moved meanwhile, by pat" in ran.err
    assert approved.json("release live wealth-home")["live"]["stable"] == 1  # one step back, not two


def test_machines_and_those_who_name_the_entry_are_not_asked(approved: Shell, asked: list[str]) -> None:
    approved.fails("conflict", "release rollback wealth-home --reason why")  # nothing is live: nothing to show
    approved.ok("release draft wealth-home --random 0.5")
    approved.ok("release start wealth-home 1")
    assert approved.json("release advance wealth-home --healthy")["seq"] == 2
    assert "entry 3 of the ledger" in approved.ok("release advance wealth-home --healthy --expected-seq 2")
    assert approved("release rollback wealth-home --reason why --expected-seq 2").code == 2
    assert asked == []


def test_retiring_what_is_live_says_so(approved: Shell) -> None:
    approved.ok("release draft wealth-home --random 0.5")
    approved.ok("release start wealth-home 1")
    [note] = approved.json("material retire chart-flat")["notes"]
    assert "chart-flat" in note and "release 1" in note
    assert "Note: " in approved.ok("material retire piggy-flat")


def test_what_differs_between_releases_is_said(approved: Shell) -> None:
    approved.ok("release draft wealth-home --random 0.5")
    approved.ok("release draft wealth-home --random 0.5")
    assert "They show the same." in approved.ok("release diff wealth-home 1 2")
    approved.ok("variant retire wealth-home --where copy:zh-quota")
    approved.ok("release draft wealth-home --random 0.4")
    found = approved.json("release diff wealth-home 1 3")
    assert len(found["variants_removed"]) == 18 and found["variants_added"] == []
    assert {c["what"]: (c["before"], c["after"]) for c in found["changes"]}["share of random"] == ("50 %", "40 %")
    assert "18 variants removed" in approved.ok("release diff wealth-home 1 3")
    approved.fails("not_found", "release diff wealth-home 1 9")


def test_health_may_come_from_a_monitor(approved: Shell, tmp_path: Path) -> None:
    approved.ok(f"release draft wealth-home --plan {EXAMPLE}/plan.yaml")
    approved.ok("release start wealth-home 1")
    health = {
        "ok": True,
        "checks": [
            {"metric": "error_rate", "value": 0.001, "ok": True},
            {"metric": "click_rate", "value": 0.03, "ok": True},
        ],
        "observed_at": datetime.now(UTC).isoformat(),
    }
    (tmp_path / "h.json").write_text(json.dumps(health))
    assert approved.json("release advance wealth-home --health h.json")["share"] == 0.5
    approved.fails("conflict", "release advance wealth-home --health h.json")  # seen before this stage began
    for text in ("{", '{"ok": true}', json.dumps({**health, "observed_at": "2026-01-01T00:00:00"})):
        (tmp_path / "h.json").write_text(text)
        approved.fails("bad_input", "release advance wealth-home --health h.json")
    bad = "release advance wealth-home --metric error_rate=0.5 --metric click_rate=0.04"
    back = approved.json(f"{bad} --rollback-if-unhealthy")
    assert (back["action"], back["stable"], back["candidate"]) == ("roll_back", None, None)


def test_a_release_that_cannot_be_is_refused(approved: Shell, tmp_path: Path) -> None:
    assert "--plan" in approved.fails("bad_input", "release draft wealth-home")
    assert "leave" in approved.fails("bad_input", f"release draft wealth-home --plan {EXAMPLE}/plan.yaml --random 0.1")
    assert "sum to" in approved.fails("bad_input", "release draft wealth-home --random 0.5 --control 0.1")
    assert "without_random" in approved.fails("bad_input", "release draft wealth-home --control 1")
    assert "model_version" in approved.fails("bad_input", "release draft wealth-home --random 0.5 --model 0.5")
    made = approved.json("release draft wealth-home --model 1 --model-version m1 --without-random", "a test")
    assert made["number"] == 1 and "a test" in approved.ok("release show wealth-home 1")
    (tmp_path / "p.yaml").write_text("shares: {random: 1}\nstages: [0.5, 0.1]\nguardrial: []\n")
    message = approved.fails("bad_input", "release draft wealth-home --plan p.yaml")
    assert "p.yaml.guardrial" in message
    approved.fails("not_found", "release draft nothing --random 0.5")
    approved.fails("not_found", "release show wealth-home 9")
    assert "no release 9 of scene 'wealth-home'" in approved.fails("not_found", "release start wealth-home 9")
    assert "no scene 'nothing'" in approved.fails("not_found", "release show nothing 1")
    approved.fails("not_found", "release live nothing")
    approved.fails("conflict", "release rollback wealth-home --reason why")
    approved.fails("conflict", "release pause wealth-home --reason why")
    approved.fails("conflict", "release advance wealth-home --healthy")
    assert "--healthy" in approved.fails("bad_input", "release advance wealth-home")
    approved.ok("release start wealth-home 1")
    assert "no guardrail 'clicks'" in approved.fails("bad_input", "release advance wealth-home --metric clicks=1")
    assert "say why" in approved.fails("bad_input", "release rollback wealth-home --reason", " ")
    assert "is no time" in approved.fails("bad_input", "release live wealth-home --at noon")
    approved.fails("bad_usage", "release rollback wealth-home")
    approved.fails("bad_usage", "release start wealth-home one")
    approved.fails("bad_usage", "release start wealth-home 0")


def test_two_people_publish_where_the_business_wants_it(approved: Shell) -> None:
    approved.ok("business set --two-person-publish")
    approved.ok("release draft wealth-home --random 0.5")
    assert "two people" in approved.fails("forbidden", "release start wealth-home 1")
    approved.ok("release start wealth-home 1", user="pat")


# ── many variants ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def large(acme: Shell, tmp_path: Path) -> Shell:
    """A library of 20 copies, 20 images, 5 layouts and 26 styles, all approved."""
    rows = ["id,kind,title,file,content,tags"]
    for n in range(20):
        rows.append(f"c{n},copy,Offer number {n},,,benefit={('coupon', 'lottery')[n % 2]}")
        PIL.Image.new("RGB", (64, 64), (n, 255 - n, 7 * n)).save(tmp_path / f"i{n}.png")
        rows.append(f"i{n},image,,i{n}.png,,image_style={('flat', 'realistic')[n % 2]}")
    for n in range(5):
        regions = [
            {"type": "text", "show": "copy.title", "font_size": 16 + n},
            {"type": "image", "show": "image", "ratio": 1.0, "size": 200.0},
        ]
        layout = {"width": 600, "height": 200, "root": {"type": "row", "regions": regions}}
        rows.append(f'l{n},layout,,,"{json.dumps(layout).replace(chr(34), chr(34) * 2)}",')
    for n in range(10):
        for name, applies in (("color", "copy.title"), ("background", "")):
            style = {
                "property": name,
                "value": f"#{(0, 0xFFFFFF)[name == 'background'] ^ n:06x}",
                "applies_to": applies,
            }
            rows.append(f'{name[:1]}{n}s,style,,,"{json.dumps(style).replace(chr(34), chr(34) * 2)}",')
    for n in range(6):
        style = {"property": "corner_radius", "value": n}
        rows.append(f'r{n}s,style,,,"{json.dumps(style).replace(chr(34), chr(34) * 2)}",')
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    assert acme.json("material import m.csv")["created"] == 71
    acme.ok("material submit --all")
    acme.ok("material approve --all", user="rex")
    return acme


def write_scene(path: Path, slots: dict[str, tuple[str, list[str]]], **more: object) -> None:
    listed = [{"name": name, "kind": kind, "materials": ids} for name, (kind, ids) in slots.items()]
    document = {"scene": path.stem, "name": path.stem, "slots": listed, **more}
    path.write_text(json.dumps(document))  # JSON is YAML


COPY_IMAGE_LAYOUT = {
    "copy": ("copy", [f"c{n}" for n in range(20)]),
    "image": ("image", [f"i{n}" for n in range(20)]),
    "layout": ("layout", [f"l{n}" for n in range(5)]),
}


def test_a_scene_of_more_than_a_thousand_variants(large: Shell, tmp_path: Path) -> None:
    write_scene(
        tmp_path / "wide.yaml",
        COPY_IMAGE_LAYOUT,
        constraints=["forbid copy.benefit=lottery with image.image_style=flat"],
    )
    large.ok("scene apply wide.yaml")
    assert large.json("scene count wide")["legal"] == 1500
    assert large.json("variant make wide")["created"] == 1500
    assert large.json("variant submit wide --all")["moved"] == 1500
    assert large.json("variant approve wide --all", user="rex")["moved"] == 1500
    cursor, seen = "", 0
    while cursor is not None:
        page = large.json("variant list wide --state approved --limit 500", *(["--cursor", cursor] if cursor else []))
        cursor, seen = page["next_cursor"], seen + len(page["items"])
    assert seen == 1500


def test_a_scene_of_six_slots_and_a_million_combinations_is_capped(large: Shell, tmp_path: Path) -> None:
    slots = COPY_IMAGE_LAYOUT | {
        "text_color": ("style", [f"c{n}s" for n in range(10)]),
        "background": ("style", [f"b{n}s" for n in range(10)]),
        "corners": ("style", [f"r{n}s" for n in range(6)]),
    }
    traffic = {"exposures_per_day": 1_000_000, "click_rate": 0.03}
    write_scene(tmp_path / "deep.yaml", slots, constraints=["forbid copy:c0 with image:i0"], traffic=traffic)
    large.ok("scene apply deep.yaml")
    assert large.json("scene count deep")["legal"] == 20 * 20 * 5 * 600 - 5 * 600
    assert "cap" in large.fails("bad_input", "variant make deep")
    write_scene(tmp_path / "deep.yaml", slots, constraints=["forbid copy:c0 with image:i0"], traffic=traffic, cap=800)
    large.ok("scene apply deep.yaml")
    made = large.json("variant make deep")
    assert made["created"] == 800
    assert made["coverage"]["pairs_covered"] == made["coverage"]["pairs_legal"]
    assert "pairs of materials" in large.ok("variant make deep")
    plan = large.json("scene plan deep")
    assert {k["kind"] for k in plan["kinds"]} == {e["kind"] for e in plan["effects"]}


# ── texts that try to be something else ─────────────────────────────────────────────────────────────────────────────


def test_texts_are_shown_as_written_and_steer_no_terminal(acme: Shell) -> None:
    acme.ok("material add copy c1 --title", "[bold]x[/bold] [/red] $(id) 中文")
    for line in ("material list", "material show c1"):
        assert "[bold]x[/bold] [/red] $(id) 中文" in acme.ok(line)
    acme.ok("business set --name", "Acme [link=http://x]y[/link] é")
    assert "[link=http://x]y[/link] é" in acme.ok("business show")
    acme.fails("bad_input", "business set --name", "Acme\u202e")
    for text in ("a\x1b[31mb", "a\x07b", "a\u202eb", "a\x00b"):
        for line in (
            ["material", "add", "copy", "c9", "--title", text],
            ["material", "show", text],
            ["scene", "show", text],
        ):
            ran = acme(line[0], *line[1:])
            assert ran.code == 2, ran
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", ran.err + ran.out), ran


@pytest.mark.parametrize("business", ["../../etc", "a b", "'; DROP TABLE businesses; --", "é", "x" * 64, ""])
def test_a_business_that_is_no_id_reaches_neither_files_nor_tables(acme: Shell, business: str, tmp_path: Path) -> None:
    image = f"material add image i1 {EXAMPLE}/images/chart-flat.webp"
    if business:
        acme.fails("not_found", image, "--business", business)
        acme.fails("bad_input", "business create", business, "--name", "X")
    assert not (tmp_path / "kaleidoscope-files" / "acme").exists()
    assert [b["id"] for b in acme.json("business list")["items"]] == ["acme"]


@pytest.mark.parametrize(
    "line",
    [
        "release show wealth-home 99999999999999999999",
        "release start wealth-home 1 --expected-seq 99999999999999999999",
        "release rollback wealth-home --reason x --to 99999999999999999999",
        "taxonomy show --number 99999999999999999999",
        "taxonomy map 1 99999999999999999999",
        "business set --version 99999999999999999999",
        "material list --limit 0",
        "release draft wealth-home --random 1.5",
    ],
)
def test_numbers_that_nothing_counts_to_are_bad_usage(acme: Shell, line: str) -> None:
    acme.fails("bad_usage", line)


@pytest.mark.parametrize("text", ["\udcff", "a\udc80b", "a\0b"])
def test_bytes_that_are_no_text_are_bad_input(acme: Shell, text: str) -> None:
    for words in (
        ["material", "show", text],
        ["material", "add", "copy", "c1", "--title", text],
        ["material", "submit", text],
        ["audit", "--key", text],
        ["business", "show", text],
        ["business", "set", "--name", text],
        ["material", "list", "--business", text],
    ):
        assert "UTF-8" in acme.fails("bad_input", words[0], *words[1:])


def test_a_terminal_without_the_characters_gets_others(library: Shell) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "kaleidoscope", "material", "show", "zh-quota", "--as", "ann"]
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"zh-quota" in done.stdout and b"????" in done.stdout


def test_usage_errors_steer_no_terminal_either(acme: Shell) -> None:
    for words in (
        ["token", "create", "--user", "x", "--role", "\x1b[31mX"],
        ["material", "\x1b[31mX"],
        ["material", "list", "--\x1b[31mX"],
        ["scene", "apply", "\x1b[31mX"],
    ):
        ran = acme(words[0], *words[1:])
        assert ran.code == 2 and "\x1b" not in ran.err + ran.out, ran


def test_a_failed_command_changes_nothing(library: Shell) -> None:
    before = library.json("material list --limit 100")
    library.fails("not_found", "material submit en-yield nothing")
    assert library.json("material list --limit 100") == before


def test_the_trail_of_a_table_that_leaves_none_is_refused_with_those_there_are(acme: Shell) -> None:
    assert "businesses, interventions, ledger, materials" in acme.fails("bad_input", "audit --entity nope")
    assert acme.json("audit --entity businesses")["items"]
