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


class Method(StrEnum):
    """How a preference was found; `attribution` says what each looks for. In the order in which they are shown."""

    STATISTICS = "statistics"
    EBM = "ebm"
    GRID = "grid"
    PREFERENCE = "preference"
    CONTRIBUTIONS = "contributions"
    NETWORK = "network"


class Layer(StrEnum):
    """What a tag speaks about: what it looks like, or what it means."""

    PRESENTATION = "presentation"
    CONTENT = "content"


class Role(StrEnum):
    """What a person may do in a business. Every role may read, but `client`; `admin` may do everything."""

    VIEWER = "viewer"
    EDITOR = "editor"
    REVIEWER = "reviewer"
    PUBLISHER = "publisher"
    ADMIN = "admin"
    CLIENT = "client"  # a page or an app: asks for decisions and sends events, and nothing else


class ReviewState(StrEnum):
    """Where a material or a variant stands; review.py says which may follow which."""

    DRAFT = "draft"
    IN_REVIEW = "in_review"
    APPROVED = "approved"
    REJECTED = "rejected"
    RETIRED = "retired"


class MaterialKind(StrEnum):
    """What a material is; content.py says what each kind holds."""

    COPY = "copy"
    IMAGE = "image"
    LAYOUT = "layout"
    STYLE = "style"


class Strictness(StrEnum):
    """What a failed design check does to a variant: nothing, a remark for the reviewer, or it is left out."""

    OFF = "off"
    SOFT = "soft"
    HARD = "hard"


class Bucket(StrEnum):
    """The traffic buckets of a release."""

    CONTROL = "control"
    RANDOM = "random"
    MODEL = "model"
    CHALLENGER = "challenger"


class InterventionKind(StrEnum):
    """What a business rule does to the variants it matches."""

    PIN = "pin"
    BLOCK = "block"


class ReleaseState(StrEnum):
    """Where a release stands; derived from the ledger."""

    DRAFT = "draft"
    CANARY = "canary"
    PAUSED = "paused"
    FULL = "full"
    SUPERSEDED = "superseded"
    ROLLED_BACK = "rolled_back"
