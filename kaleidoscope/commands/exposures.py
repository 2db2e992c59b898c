"""A scene's exposures, as jobs on the command line read them: from the two databases and the Parquet log."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kaleidoscope.access import operator
from kaleidoscope.businesses import get_business
from kaleidoscope.database import Database, open_database
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.events import Shown, contract_log, shown_in
from kaleidoscope.experiment import Cohort
from kaleidoscope.log import Log, read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.release import ReleaseContent, get_release, verify
from kaleidoscope.scenes import get_scene
from kaleidoscope.settings import Settings
from kaleidoscope.taxonomy import Mapping as TagMapping
from kaleidoscope.taxonomy import into_newest
from kaleidoscope.vocabulary import Bucket


@dataclass(frozen=True)
class Exposures:
    """What was read of a scene, or of all scenes of a business."""

    log: Log
    left_out: dict[str, int]  # exposures by why they are not in it
    hash: str  # of what was read
    releases: tuple[int, ...]  # of one scene, that its exposures are of
    cohorts: tuple[Cohort[str], ...]  # of one scene: who was seen in each release, and its designed shares
    taxonomy: int | None  # of one scene, number of the version that all tags are in: the newest of its releases


def read_exposures_of(
    settings: Settings,
    business: str,
    scene: str | None,
    scratch: Path,
    *,
    control: bool = False,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Exposures:
    """The exposures that may be learned from, as a log.

    `control`: with those of that bucket too. First seen from `since` on and before `until`. A release is a cohort as a
    whole: the stages of its canary decide who sees it, by a hash of its own, and not in which bucket.
    """
    caller = operator(settings.user or "kaleidoscope", business)
    newest: list[int] = []  # version among the releases'
    designed: dict[int, dict[str, float]] = {}  # release → bucket → share
    with existing_database(settings.database_url) as database, existing_database(settings.log_url) as log_database:
        with database.transaction(caller, write=False) as session:
            get_business(session)
            if scene is not None:
                get_scene(session, scene)

        def content_of(of: str, number: int) -> ReleaseContent:
            with database.transaction(caller, write=False) as session:
                content = verify(get_release(session, of, number))
            designed[number] = {b.value: share for b in Bucket if (share := getattr(content.shares, b)) > 0}
            return content

        def describe(of: str, number: int) -> Mapping[str, Shown]:
            return shown_in(content_of(of, number))

        def words(of: Collection[tuple[str, int]]) -> Mapping[tuple[str, int], TagMapping]:
            versions = {key: content_of(*key).taxonomy for key in of}
            with database.transaction(caller, write=False) as session:
                at, became = into_newest(session, versions)
            newest[:] = [at]
            return became

        written = contract_log(
            log_database,
            settings.log_dir,
            scratch,
            business=business,
            scene=scene,
            describe=describe,
            words=words,
            control=control,
            since=since,
            until=until,
        )
        for number in written.units.keys() - designed.keys():  # all of whose days are in files
            content_of(str(scene), number)
    digest = hashlib.sha256()
    for path in (written.path, written.schema):
        digest.update(path.read_bytes())
    return Exposures(
        log=read_log(written.path, read_schema(written.schema)),
        left_out=written.left_out,
        hash=digest.hexdigest(),
        releases=tuple(sorted(written.units)),
        cohorts=tuple(
            Cohort(
                f"release {number}",
                {bucket: seen for bucket, (seen, _) in units.items()},
                designed[number],
                {bucket: new for bucket, (_, new) in units.items()},
            )
            for number, units in sorted(written.units.items())
        ),
        taxonomy=newest[0] if scene is not None else None,
    )


SHARES_TOLERANCE = 0.002  # of their sum: thirds are written .333


def designed_shares(text: str, log: Log) -> dict[str, float]:
    """The shares of a log's buckets as `control=.1,random=.2,model=.7` says them; raises InputError naming what is
    wrong and what the log has."""
    names = [] if log.buckets is None else log.buckets.to_pylist()
    there = sorted({str(names[i]) for i in set([] if log.bucket is None else log.bucket.tolist()) if names[i]})
    if not there:
        raise InputError("--shares: the log does not say which bucket an exposure is of. Name the column in `bucket`.")
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.rpartition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name or not math.isfinite(share):
            raise InputError(f"--shares: {part.strip()!r} is no share. Write them like control=.1,random=.2,model=.7.")
        if name not in there:
            raise InputError(f"--shares: the log has no bucket {name!r}. It has {', '.join(there)}.")
        if name in found:
            raise InputError(f"--shares: {name!r} is there twice. Give each bucket one share.")
        if not share > 0:
            raise InputError(f"--shares: {name}={number} is none. Give a share above 0, as in {name}=.1.")
        found[name] = share
    missing = [name for name in there if name not in found]
    if missing:
        raise InputError(f"--shares: {', '.join(missing)} of the log has none. Give the share of every bucket.")
    total = math.fsum(found.values())
    if abs(total - 1) > SHARES_TOLERANCE:
        raise InputError(f"--shares: they sum to {total:.6g}, not to 1. Say where all of the units were to go.")
    return found


def existing_database(url: str) -> Database:
    """The database, as long as there is one: in one made just now there would be nothing to learn from."""
    with Database(url) as named:
        if named.sqlite and not Path(str(named.url.database)).exists():
            raise NotFoundError(f"There is no database {named.url.database}: is this the right folder?")
    return open_database(url)
