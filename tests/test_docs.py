"""Every command, option and setting is documented, and nothing is documented that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from kaleidoscope.cli import app
from kaleidoscope.settings import PREFIX, Settings

DOCS = Path(__file__).parent.parent / "docs"
ROOT_COMMAND = typer.main.get_command(app)
COMMANDS = {"": ROOT_COMMAND} | {f" {name}": command for name, command in ROOT_COMMAND.commands.items()}


def sections(page: str) -> dict[str, str]:
    """Return the text under each `## ` heading of a page of docs/."""
    _, *parts = re.split(r"^## +", (DOCS / page).read_text(), flags=re.MULTILINE)
    return {heading.strip(" `"): body for heading, _, body in (part.partition("\n") for part in parts)}


def options(command: object) -> set[str]:
    return {
        name
        for parameter in command.params  # type: ignore[attr-defined]
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    } - {"--help"}


def test_every_command_has_its_section() -> None:
    documented = {heading for heading in sections("cli.md") if heading.startswith("kaleidoscope")}
    assert documented == {f"kaleidoscope{name}" for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_its_commands_table(name: str) -> None:
    body = sections("cli.md")[f"kaleidoscope{name}"]
    documented = set(re.findall(r"^\| `(--[a-z-]+)", body, flags=re.MULTILINE))
    assert documented == options(COMMANDS[name])


@pytest.mark.parametrize("name", ["learn"])
def test_every_argument_is_in_its_commands_table(name: str) -> None:
    body = sections("cli.md")[f"kaleidoscope {name}"]
    arguments = {
        parameter.metavar for parameter in ROOT_COMMAND.commands[name].params if not parameter.opts[0].startswith("-")
    }
    assert arguments
    assert arguments == set(re.findall(r"^\| `([A-Z]+)`", body, flags=re.MULTILINE))


def test_every_setting_is_documented_with_its_default() -> None:
    documented = dict(
        re.findall(rf"^\| `({PREFIX}[A-Z_]+)` \| ([^|]+?) \|", (DOCS / "settings.md").read_text(), flags=re.MULTILINE)
    )
    assert documented == {
        f"{PREFIX}{name.upper()}": {"None": "unset", "False": "off"}.get(str(setting.default), f"`{setting.default}`")
        for name, setting in Settings.model_fields.items()
    }


def test_every_decision_says_why() -> None:
    records = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    assert records
    for record in records:
        text = record.read_text()
        for heading in ("## Context", "## Decision", "## Consequences", "## Alternatives"):
            assert heading in text, f"{record.name} lacks {heading}"


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(record.name[:4]) for record in sorted((DOCS / "decisions").glob("[0-9]*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))
