"""A scene's exposures, as jobs on the command line read them: from the two databases and the Parquet log."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kaleidoscope.access import operator
from kaleidoscope.businesses import get_business
from kaleidoscope.database import Database, open_database
from kaleidoscope.errors import NotFoundError
from kaleidoscope.events import Shown, contract_log, shown_in
from kaleidoscope.log import Log, read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.release import get_release, verify
from kaleidoscope.scenes import get_scene
from kaleidoscope.settings import Settings
from kaleidoscope.vocabulary import Bucket


@dataclass(frozen=True)
class Exposures:
    """What was read of a scene, or of all scenes of a business."""

    log: Log
    left_out: dict[str, int]  # exposures by why they are not in it
    hash: str  # of what was read
    releases: tuple[int, ...]  # of one scene, that its exposures are of
    shares: dict[str, float] | None  # designed ones of its buckets; None: of several releases, or not all were read
    taxonomy: int | None  # number of the version that the tags are of: the newest release's


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

    `control`: with those of that bucket too. First seen from `since` on and before `until`.
    """
    caller = operator(settings.user or "kaleidoscope", business)
    taxonomies: dict[int, int] = {}  # release → version
    designed: dict[str, float] = {}
    with existing_database(settings.database_url) as database, existing_database(settings.log_url) as log_database:
        with database.transaction(caller, write=False) as session:
            get_business(session)
            if scene is not None:
                get_scene(session, scene)

        def describe(of: str, number: int) -> Mapping[str, Shown]:
            with database.transaction(caller, write=False) as session:
                content = verify(get_release(session, of, number))
            taxonomies[number] = content.taxonomy
            designed.update({b.value: share for b in Bucket if (share := getattr(content.shares, b)) > 0})
            return shown_in(content)

        written = contract_log(
            log_database,
            settings.log_dir,
            scratch,
            business=business,
            scene=scene,
            describe=describe,
            control=control,
            since=since,
            until=until,
        )
    digest = hashlib.sha256()
    for path in (written.path, written.schema):
        digest.update(path.read_bytes())
    return Exposures(
        log=read_log(written.path, read_schema(written.schema)),
        left_out=written.left_out,
        hash=digest.hexdigest(),
        releases=() if scene is None else tuple(sorted(taxonomies)),
        shares=designed if scene is not None and len(taxonomies) == 1 and not any(written.left_out.values()) else None,
        taxonomy=taxonomies[max(taxonomies)] if scene is not None and taxonomies else None,
    )


def existing_database(url: str) -> Database:
    """The database, as long as there is one: in one made just now there would be nothing to learn from."""
    with Database(url) as named:
        if named.sqlite and not Path(str(named.url.database)).exists():
            raise NotFoundError(f"There is no database {named.url.database}: is this the right folder?")
    return open_database(url)
