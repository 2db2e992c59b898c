"""The import rules of pyproject.toml hold, and each of them really breaks when somebody breaks it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
CONTRACTS = {contract["id"]: contract for contract in CONFIG["contracts"]}


@dataclass(frozen=True)
class Planted:
    """Code appended to files of a copy of the packages; `breaks` is the id of the contract that must notice."""

    breaks: str
    code: dict[str, str]

    def __str__(self) -> str:
        return f"{self.breaks}: " + ", ".join(f"{file} gets {code!r}" for file, code in self.code.items())


VIOLATIONS = [
    Planted("floors", {"kaleidoscope/progress.py": "import kaleidoscope.cli"}),
    Planted("floors", {"kaleidoscope/settings.py": "def late():\n    from kaleidoscope import commands"}),
    Planted("floors", {"kaleidoscope/commands/__init__.py": "import kaleidoscope.cli"}),
    Planted("floors", {"kaleidoscope/errors.py": "import kaleidoscope.settings"}),
    Planted("floors", {"kaleidoscope/vocabulary.py": "import kaleidoscope.errors"}),
    Planted("floors", {"kaleidoscope/misplaced.py": ""}),
    Planted("ground-floor", {"kaleidoscope/settings.py": "import sqlalchemy"}),
    Planted("ground-floor", {"kaleidoscope/errors.py": "from fastapi import HTTPException"}),
    Planted("ground-floor", {"kaleidoscope/progress.py": "import models", "models/__init__.py": "import starlette"}),
    Planted("floors", {"kaleidoscope/review.py": "import kaleidoscope.release"}),
    Planted("floors", {"kaleidoscope/tables.py": "def late():\n    import kaleidoscope.scenes"}),
    Planted("services", {"kaleidoscope/scenes.py": "from fastapi import HTTPException"}),
    Planted("services", {"kaleidoscope/review.py": "import kaleidoscope.serving.http"}),
    Planted("engines", {"kaleidoscope/settings.py": "import torch"}),
    Planted("engines", {"kaleidoscope/serving/app.py": "import models"}),
    Planted("engines", {"kaleidoscope/cli.py": "def late():\n    import models"}),
    Planted("engines", {"kaleidoscope/progress.py": "from sklearn.linear_model import LogisticRegression"}),
    Planted(
        "engines",
        {"kaleidoscope/commands/new.py": "import kaleidoscope.detour", "kaleidoscope/detour.py": "import lightgbm"},
    ),
    Planted("models", {"models/__init__.py": "import kaleidoscope.cli"}),
    Planted("models", {"models/new.py": "import kaleidoscope.commands"}),
    Planted("models", {"models/new.py": "import kaleidoscope.database", "kaleidoscope/database.py": ""}),
    Planted("models", {"models/new.py": "import attribution"}),
    Planted("engines", {"kaleidoscope/serving/app.py": "import attribution"}),
    Planted("attribution", {"attribution/__init__.py": "import kaleidoscope.database"}),
    Planted("attribution", {"attribution/new.py": "import models"}),
    Planted("attribution", {"attribution/new.py": "def late():\n    import torch"}),
    Planted("models-web", {"models/new.py": "import fastapi"}),
    Planted("models-web", {"attribution/new.py": "import sqlalchemy"}),
    Planted("models-web", {"models/new.py": "def late():\n    from nicegui import ui"}),
    Planted("mlflow", {"kaleidoscope/cli.py": "import mlflow"}),
    Planted("mlflow", {"models/new.py": "import mlflow.pyfunc"}),
    Planted("feast", {"kaleidoscope/cli.py": "from feast import FeatureStore"}),
    Planted("feast", {"models/new.py": "import feast"}),
]
ALLOWED = [
    Planted("engines", {"kaleidoscope/commands/new.py": "import torch\nimport models\nimport lightgbm"}),
    Planted("engines", {"kaleidoscope/cli.py": "def late():\n    from kaleidoscope.commands import new"}),
    Planted("models", {"models/new.py": "from kaleidoscope.errors import JobError"}),
    Planted("mlflow", {"kaleidoscope/registry.py": "import mlflow"}),
    Planted("feast", {"kaleidoscope/feature_store.py": "import feast"}),
]


def lint(folder: Path, contracts: Sequence[str]) -> str:
    chosen = [argument for contract in contracts for argument in ("--contract", contract)]
    done = subprocess.run(
        [LINT_IMPORTS, "--no-logo", "--no-cache", "--config", folder / "pyproject.toml", *chosen],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages and of the rules."""
    for package in CONFIG["root_packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(planted: Planted, folder: Path) -> None:
    for file, code in planted.code.items():
        with (folder / file).open("a") as stream:
            stream.write(f"\n{code}\n")


def test_every_contract_holds() -> None:
    output = lint(ROOT, [])
    assert f"{len(CONTRACTS)} kept, 0 broken" in output, output


def test_every_contract_has_a_planted_violation() -> None:
    assert {planted.breaks for planted in VIOLATIONS} == set(CONTRACTS)


@pytest.mark.parametrize("planted", VIOLATIONS, ids=str)
def test_a_planted_violation_breaks_its_contract(planted: Planted, copy: Path) -> None:
    plant(planted, copy)
    output = lint(copy, [planted.breaks])
    assert f"{CONTRACTS[planted.breaks]['name']} BROKEN" in output, output


@pytest.mark.parametrize("planted", ALLOWED, ids=str)
def test_what_the_rules_allow_keeps_them(planted: Planted, copy: Path) -> None:
    plant(planted, copy)
    output = lint(copy, [planted.breaks])
    assert f"{CONTRACTS[planted.breaks]['name']} KEPT" in output, output


def test_the_rules_agree_on_what_the_ground_floor_is() -> None:
    layers = CONTRACTS["floors"]["layers"]
    below_tables = layers[layers.index("access : tables") + 1 :]
    ground_floor = {f"kaleidoscope.{name.strip()}" for layer in below_tables for name in layer.split(":")}
    assert set(CONTRACTS["ground-floor"]["source_modules"]) == ground_floor
    for engine in ("models", "attribution"):
        allowed = CONTRACTS[engine]["ignore_imports"]
        assert {line.removeprefix(f"{engine}.** -> ") for line in allowed} == ground_floor


def test_only_the_database_commits() -> None:
    """One request or job is one transaction: `Session.commit` is called in database.py alone."""
    callers = {
        path.relative_to(ROOT).as_posix()
        for package in CONFIG["root_packages"]
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "commit" and "session" in ast.dump(node.value)
    }
    assert callers == {"kaleidoscope/database.py"}
