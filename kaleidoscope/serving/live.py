"""What a process serves: live releases and tokens, held in memory and refreshed by a thread.

A decision reads what is here and waits for no database. Where the database is away, what was live goes on, and answers
say how old that is.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import select

from kaleidoscope.access import Caller, operator
from kaleidoscope.buckets import in_canary
from kaleidoscope.database import Database
from kaleidoscope.decide import Scorer, Served, prepare
from kaleidoscope.errors import JobError, KaleidoscopeError, UnauthenticatedError, UnavailableError
from kaleidoscope.events import Windows
from kaleidoscope.ranker import Ranker
from kaleidoscope.release import Live as Standing
from kaleidoscope.release import ReleaseContent, all_live, get_release, verify
from kaleidoscope.tables import ApiToken, Business
from kaleidoscope.tokens import secret_hash
from kaleidoscope.vocabulary import Bucket, Role

LOG = logging.getLogger("kaleidoscope.serving")
SLOW_IN_A_ROW = 3  # rankings that took too long, after which a model gets a pause
PAUSE_S = 30.0
AGAIN_S = 30.0  # until what could not be loaded is tried again
MISS_S = 0.5  # unknown tokens ask the database at most so often
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)

Models = Callable[[str, str], Scorer]  # business, version → the model; raises JobError


def models_in(folder_of: Callable[[str, str], Path]) -> Models:
    """Exported models, from the folder that each (business, version) has on this machine."""

    def load(business: str, version: str) -> Scorer:
        if not VERSION.fullmatch(version):
            raise JobError(f"model {version!r}: this is no version's name. Train a model, and name its version.")
        return Ranker.load(folder_of(business, version))

    return load


# ── models that are too slow ────────────────────────────────────────────────────────────────────────────────────────


class Watched:
    """A model that gets a pause, in which it raises TimeoutError at once, where it is too slow again and again."""

    def __init__(self, scorer: Scorer, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.scorer, self.limit_s, self.clock = scorer, limit_s, clock
        self.slow, self.paused_until = 0, -float("inf")

    @property
    def version(self) -> str:
        """The version of the model."""
        return self.scorer.version

    def variant_side(self, variants: Any) -> Any:
        """As the model's; it may take its time."""
        return self.scorer.variant_side(variants)

    def features(self, columns: Mapping[str, Sequence[object]], rows: int) -> Any:
        """As the model's."""
        return self.scorer.features(columns, rows)

    def score(self, features: Any, side: Any) -> NDArray[Any]:
        """As the model's; raises TimeoutError in a pause."""
        return self._timed(lambda: self.scorer.score(features, side))

    def score_heads(self, features: Any, side: Any) -> NDArray[Any]:
        """As the model's; raises TimeoutError in a pause."""
        return self._timed(lambda: self.scorer.score_heads(features, side))

    def explain(self, features: Any, side: Any, row: int, variant: int) -> Any:
        """As the model's; None where it explains nothing."""
        explain = getattr(self.scorer, "explain", None)
        return None if explain is None else explain(features, side, row, variant)

    def _timed(self, score: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        begun = self.clock()
        if begun < self.paused_until:
            raise TimeoutError(f"ranking took more than {self.limit_s * 1000:g} ms, and the model has a pause")
        found = score()
        self.slow = self.slow + 1 if self.clock() - begun > self.limit_s else 0
        if self.slow >= SLOW_IN_A_ROW:
            self.slow, self.paused_until = 0, self.clock() + PAUSE_S
        return found


# ── what is live ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class LiveScene:
    """What a scene shows now: its stable release, and the candidate to whom a share of the units is given."""

    standing: Standing
    stable: Served | None
    candidate: Served | None
    problems: tuple[str, ...] = ()  # what of it could not be loaded

    def serving(self, business: str, unit: str) -> Served | None:
        """The release that decides for a unit: sticky, and a rising share takes nobody out again."""
        scene, share = self.standing.scene, self.standing.share
        if self.candidate is not None and in_canary(f"{business}/{scene}/canary", unit, share):
            return self.candidate
        return self.stable


@dataclass(frozen=True)
class _Known:
    """An API token, as it is checked."""

    caller: Caller
    expires_at: datetime | None


@dataclass(frozen=True, eq=False)
class _Held:
    """Everything that is live at once; replaced as a whole."""

    scenes: Mapping[str, Mapping[str, LiveScene]] = field(default_factory=dict)  # business → scene
    tokens: Mapping[str, _Known] = field(default_factory=dict)  # by hash
    problems: tuple[str, ...] = ()
    at: float | None = None  # monotonic


class Live:
    """What is live, and who may ask; `close` it."""

    def __init__(
        self,
        database: Database,
        models: Models,
        *,
        refresh_s: float,
        model_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.database, self.models = database, models
        self.refresh_s, self.model_timeout_s, self.clock = refresh_s, model_timeout_s, clock
        self._held = _Held()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._scorers: dict[tuple[str, str], Watched] = {}
        self._missed_at = -float("inf")
        self._again_at: dict[tuple[str, str], float] = {}  # when what could not be loaded is tried again
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)

    def start(self) -> None:
        """Load what is live, and begin to look for changes. Where the database is away, that is tried again."""
        self._try_refresh()
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def loaded(self) -> bool:
        """Whether what is live was ever known."""
        return self._held.at is not None

    @property
    def age_s(self) -> float:
        """How old what is held is; beyond a few `refresh_s` the database is away."""
        return float("inf") if self._held.at is None else self.clock() - self._held.at

    @property
    def problems(self) -> tuple[str, ...]:
        """Releases and models that could not be loaded, in words."""
        return self._held.problems

    def scenes(self, business: str) -> Mapping[str, LiveScene]:
        """What a business's scenes show now."""
        return self._held.scenes.get(business, {})

    def knows(self, secret: str) -> bool:
        """Whether a token is known, so that nothing has to be looked up for it."""
        return secret_hash(secret) in self._held.tokens

    def caller(self, secret: str, *, look_up: bool = True) -> Caller:
        """Whose token this is; raises UnauthenticatedError. With `look_up` a token made a moment ago is looked for
        once, unless somebody is looking already: nobody waits behind a database that does not answer."""
        digest = secret_hash(secret)
        known = self._held.tokens.get(digest)
        if known is None and look_up and self.clock() - self._missed_at > MISS_S and not self._lock.locked():
            self._missed_at = self.clock()
            self._try_refresh()
            known = self._held.tokens.get(digest)
        if known is None and not self.loaded:
            raise UnavailableError("Whose token this is is not known yet: the database is away.")
        if known is None:
            raise UnauthenticatedError("This token is unknown or was revoked. Ask an admin for a new one.")
        if known.expires_at is not None and known.expires_at <= datetime.now(UTC):
            raise UnauthenticatedError("This token has expired. Ask an admin for a new one.")
        return known.caller

    def refresh(self) -> None:
        """Look what is live now. Raises UnavailableError where the database is away; then nothing changes."""
        with self._lock:
            begun, old = self.clock(), self._held
            whole = operator("server", None)
            with self.database.transaction(whole, write=False) as session:
                tokens = {
                    row.token_hash: _known(row) for row in session.scalars(select(ApiToken)) if not row.revoked_at
                }
                businesses = list(session.scalars(select(Business.id)))
            scenes = {business: self._business(whole.inside(business), old) for business in businesses}
            problems = [p for of_business in scenes.values() for scene in of_business.values() for p in scene.problems]
            used = {
                (business, loaded.version)
                for business, of_business in scenes.items()
                for scene in of_business.values()
                for served in (scene.stable, scene.candidate)
                if served is not None
                for loaded in (*served.models.values(), *([served.last_good] if served.last_good else []))
            }
            self._scorers = {key: scorer for key, scorer in self._scorers.items() if key in used}
            for problem in problems:
                if problem not in old.problems:
                    LOG.error("%s", problem)
            self._held = _Held(scenes, tokens, tuple(problems), begun)

    def _business(self, caller: Caller, old: _Held) -> dict[str, LiveScene]:
        business = str(caller.business)
        before, found = old.scenes.get(business, {}), {}
        with self.database.transaction(caller, write=False) as session:
            for scene, standing in all_live(session).items():
                held = before.get(scene)
                again = self.clock() >= self._again_at.get((business, scene), 0.0)
                if held is not None and held.standing == standing and not (again and self._missing(held)):
                    found[scene] = held
                    continue
                self._again_at[business, scene] = self.clock() + AGAIN_S
                known = {} if held is None else {s.number: s for s in (held.stable, held.candidate) if s is not None}
                releases: list[Served | None] = []
                problems: list[str] = []
                for number in (standing.stable, standing.candidate):
                    served = None if number is None else known.get(number)
                    if number is not None and (served is None or _incomplete(served)):
                        try:
                            release = get_release(session, scene, number)
                            content = verify(release)
                            last_good = next((m for m in map(_model_of, known.values()) if m is not None), None)
                            served = prepare(
                                content,
                                number,
                                release.content_hash,
                                scorer=self._scorer(business, content.model_version, problems),
                                challenger=self._scorer(business, _challenger(content), problems),
                                last_good=last_good,
                                best_single=content.best_single,
                            )
                        except KaleidoscopeError as error:
                            problems.append(f"{business}/{scene}: {error.message}")
                    releases.append(served)
                found[scene] = LiveScene(standing, releases[0], releases[1], tuple(problems))
        return found

    def _missing(self, held: LiveScene) -> bool:
        """Whether something that is live could not be loaded, so that it is worth another try."""
        wanted = (held.standing.stable, held.stable), (held.standing.candidate, held.candidate)
        return any(n is not None and (served is None or _incomplete(served)) for n, served in wanted)

    def _scorer(self, business: str, version: str | None, problems: list[str]) -> Scorer | None:
        if version is None:
            return None
        scorer = self._scorers.get((business, version))
        if scorer is None:
            try:
                scorer = Watched(self.models(business, version), self.model_timeout_s)
            except KaleidoscopeError as error:
                problems.append(f"{business}: {error.message}")
                return None
            self._scorers[business, version] = scorer
        return scorer

    def _run(self) -> None:
        while not self._stop.wait(self.refresh_s):
            self._try_refresh()

    def _try_refresh(self) -> None:
        try:
            self.refresh()
        except KaleidoscopeError as error:
            LOG.warning("What is live could not be looked up: %s", error.message)
        except Exception:  # the thread has to go on: without it nothing new would ever be served
            LOG.exception("What is live could not be looked up.")


def windows_of(scenes: Mapping[str, LiveScene]) -> dict[str, Windows]:
    """How long the events of each scene count."""
    found = {}
    for name, scene in scenes.items():
        served = scene.candidate or scene.stable
        if served is not None:
            found[name] = Windows.attributing(served.content.scene.attribution)
    return found


def _known(row: ApiToken) -> _Known:
    roles = frozenset(Role(role) for role in row.roles)
    return _Known(
        Caller(row.user, row.business_id, roles, row.id, installation=row.business_id is None), row.expires_at
    )


def _challenger(content: ReleaseContent) -> str | None:
    return None if content.challenger is None else content.challenger.model_version


def _incomplete(served: Served) -> bool:
    return any(model.scorer is None for model in served.models.values())


def _model_of(served: Served) -> Scorer | None:
    """The model of a release that ranks, or the one that it fell back to."""
    own = served.models.get(Bucket.MODEL)
    for loaded in (own, served.last_good):
        if loaded is not None and loaded.scorer is not None:
            return loaded.scorer
    return None
