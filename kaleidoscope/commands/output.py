"""What jobs on the command line share: the folder their results go to, and the clock that says what they are at."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kaleidoscope.errors import JobError
from kaleidoscope.progress import Progress


def make_folder(out_dir: Path) -> None:
    """Make the folder, and find out before the work whether it can be written to."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        probe = out_dir / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise JobError(f"{out_dir}: cannot be written to ({error}); name another folder with --out") from error


def write_whole(out_dir: Path, texts: Mapping[str, str]) -> None:
    """Write files (name → text) beside their places, then move all: a full disk leaves what was there as it was."""
    beside = {name: out_dir / f".{name}.{os.getpid()}" for name in texts}
    try:
        for name, text in texts.items():
            beside[name].write_text(text, encoding="utf-8")
        for name in texts:
            beside[name].replace(out_dir / name)
    except OSError as error:
        for path in beside.values():
            path.unlink(missing_ok=True)
        raise JobError(f"{out_dir}: the report cannot be written there: {error}") from error


def json_text(value: object) -> str:
    """As summary.json holds it. Raises ValueError for a number that JSON lacks."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


class Clock:
    """Announces stages to a `Progress` and keeps how long each took."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.advance = progress.advance
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage."""
        self._progress.stage(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
