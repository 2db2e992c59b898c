"""What jobs on the command line share: the folder their results go to, and the clock that says what they are at."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from kaleidoscope.errors import JobError
from kaleidoscope.files import replacing
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


@contextmanager
def folder_for(out_dir: Path) -> Iterator[None]:
    """As `make_folder`; where the work fails, what was made of it and is still empty goes again."""
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    make_folder(out_dir)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def write_whole(out_dir: Path, texts: Mapping[str, str]) -> None:
    """Write files (name → text) beside their places, then move all: a full disk leaves what was there as it was."""
    try:
        with ExitStack() as stack:
            for name, text in texts.items():
                stack.enter_context(replacing(out_dir / name)).write_text(text, encoding="utf-8")
    except OSError as error:
        raise JobError(f"{out_dir}: the report cannot be written there: {error}") from error


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
