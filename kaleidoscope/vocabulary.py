"""Names that cross rooms. Imports nothing."""

from __future__ import annotations

from enum import StrEnum


class Level(StrEnum):
    """How bad a finding of a check is."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Verdict(StrEnum):
    """What `learn` advises for a scene."""

    PERSONALISE = "personalise"
    BEST_PER_CONTEXT = "best_per_context"
    BEST_SINGLE = "best_single"
    INCONCLUSIVE = "inconclusive"


class Policy(StrEnum):
    """The four policies whose value `learn` estimates, from simple to complex."""

    UNIFORM = "uniform"
    BEST_SINGLE = "best_single"
    BEST_PER_CONTEXT = "best_per_context"
    PERSONALISED = "personalised"
