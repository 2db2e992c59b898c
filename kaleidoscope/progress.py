"""How long work says how far it is. The command line shows it, jobs record it, tests ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by the one who works, shown by whoever asked for the work."""

    def stage(self, name: str) -> None:
        """Say that the stage called `name` begins; the one before it is finished."""

    def advance(self, done: float) -> None:
        """Say that a share `done` of the current stage, 0..1, is finished."""


class Silent:
    """A `Progress` that shows nothing."""

    def stage(self, name: str) -> None:
        """Show nothing."""

    def advance(self, done: float) -> None:
        """Show nothing."""
