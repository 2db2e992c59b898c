from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from pydantic import ValidationError
from sqlalchemy import event, func, select

from kaleidoscope.access import Caller, operator
from kaleidoscope.businesses import change_business
from kaleidoscope.combiner import variant_id
from kaleidoscope.content import DEFAULT_PLACEHOLDERS, Copy
from kaleidoscope.database import Database, Session
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, JobError, NotFoundError
from kaleidoscope.interventions import InterventionSpec, Target, add_intervention, end_intervention
from kaleidoscope.materials import change_material
from kaleidoscope.release import (
    STAGES,
    Challenger,
    Frequency,
    Guardrail,
    Health,
    HealthCheck,
    Live,
    PolicyKind,
    PolicySpec,
    ReleaseContent,
    ReleasePlan,
    Shares,
    advance,
    canonical,
    check_variants,
    describe,
    diff,
    draft_release,
    failures,
    get_release,
    ledger,
    list_releases,
    live_at,
    pause,
    release_state,
    release_states,
    resume,
    rollback,
    start,
    verify,
)
from kaleidoscope.review import VariantFilter, make_variants, move_materials, move_variants
from kaleidoscope.scenes import change_scene
from kaleidoscope.tables import AuditEntry, LedgerEntry, Material, Release, Scene, Variant, now
from kaleidoscope.taxonomy import check_changes, evolve
from kaleidoscope.vocabulary import InterventionKind, ReleaseState, Role
from tests.kaleidoscope.conftest import settle
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import spec, stocked

HALF = Shares(control=0.5, random=0.5)
PLAN = ReleasePlan(shares=HALF)
RAILS = (Guardrail(metric="click_rate", min=0.01), Guardrail(metric="errors", max=5))
WATCHED = ReleasePlan(shares=HALF, guardrails=RAILS)
PUBLISHER = person("pat", Role.PUBLISHER)
SCENE = "welcome"
ROOT = Path(__file__).parents[2]

DRAFT, CANARY, PAUSED = ReleaseState.DRAFT, ReleaseState.CANARY, ReleaseState.PAUSED
FULL, SUPERSEDED, ROLLED_BACK = ReleaseState.FULL, ReleaseState.SUPERSEDED, ReleaseState.ROLLED_BACK


def approved_scene(database: Database, **changes: Any) -> None:
    """Scene `welcome` with its 16 variants, all approved."""
    stocked(database, approved=True, **changes)
    with database.transaction(person("ann")) as session:
        make_variants(session, SCENE)
        move_variants(session, SCENE, "submit", VariantFilter())
    with database.transaction(person("rex")) as session:
        move_variants(session, SCENE, "approve", VariantFilter())


def do(database: Database, work: Callable[[Session], Any], caller: Caller = PUBLISHER) -> Any:
    with database.transaction(caller) as session:
        return work(session)


def drafted(database: Database, plan: ReleasePlan = PLAN, n: int = 1) -> None:
    approved_scene(database)
    for _ in range(n):
        do(database, lambda s: draft_release(s, SCENE, plan))


def test_what_the_scene_has_come_to_forbid_is_not_released_though_it_was_approved(database: Database) -> None:
    approved_scene(database)
    with database.transaction(person("ann")) as session:
        change_scene(session, SCENE, spec(constraints=["forbid copy:c1"]), version=None)
    with pytest.raises(ConflictError, match=r"4 of the 16 approved variants .* Make the variants again"):
        do(database, lambda s: draft_release(s, SCENE, PLAN))
    with database.transaction(person("ann")) as session:
        make_variants(session, SCENE)
    assert len(do(database, lambda s: draft_release(s, SCENE, PLAN)).content["variants"]) == 12


def test_what_was_checked_before_is_not_worked_out_again_while_others_wait(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved_scene(sqlite)
    with sqlite.transaction(PUBLISHER, write=False) as session:
        checked = check_variants(session, SCENE)

    def work(*_: object, **__: object) -> None:
        raise AssertionError("it was worked out under the lock")

    monkeypatch.setattr("kaleidoscope.release.space_of", work)
    assert len(do(sqlite, lambda s: draft_release(s, SCENE, PLAN, "", checked)).content["variants"]) == 16
    with pytest.raises(AssertionError):
        do(sqlite, lambda s: draft_release(s, SCENE, PLAN))
    with sqlite.transaction(person("ann")) as session:
        change_scene(session, SCENE, spec(constraints=["forbid copy:c1"]), version=None)
    with pytest.raises(ConflictError, match="changed meanwhile"):
        do(sqlite, lambda s: draft_release(s, SCENE, PLAN, "", checked))


def test_a_release_is_drafted_without_what_soft_checks_would_remark(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    approved_scene(sqlite)
    monkeypatch.setattr("kaleidoscope.design_checks.MOST_LOOKS", 0)
    assert do(sqlite, lambda s: draft_release(s, SCENE, PLAN)).number == 1


def test_a_rule_about_a_tag_that_is_gone_is_not_released_as_if_it_did_something(sqlite: Database) -> None:
    approved_scene(sqlite)
    rule = InterventionSpec(kind=InterventionKind.BLOCK, target=Target(tag={"subject": "gold"}))
    with sqlite.transaction(person("ann")) as session:
        add_intervention(session, SCENE, "no-gold", rule)
        evolve(session, check_changes([{"op": "rename", "dimension": "subject", "value": "gold", "id": "bullion"}]))
    with pytest.raises(ConflictError, match=r"'no-gold' is about tag subject=gold"):
        do(sqlite, lambda s: draft_release(s, SCENE, PLAN))
    with sqlite.transaction(person("ann")) as session:
        end_intervention(session, SCENE, "no-gold")
    assert do(sqlite, lambda s: draft_release(s, SCENE, PLAN)).content["interventions"] == []


def fine() -> Health:
    return Health(ok=True, observed_at=now())


def to_full(database: Database, number: int) -> None:
    do(database, lambda s: start(s, SCENE, number))
    for _ in STAGES[1:]:
        do(database, lambda s: advance(s, SCENE, health=fine()))


def live(database: Database, at: datetime | None = None) -> Live | None:
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        return live_at(session, SCENE, at)


def standing(database: Database) -> tuple[int | None, int | None, float]:
    found = live(database)
    assert found is not None
    return found.stable, found.candidate, found.share


def states(database: Database, *numbers: int) -> list[ReleaseState]:
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        found = release_states(session, SCENE, numbers)
        assert found == {n: release_state(session, SCENE, n) for n in numbers}
    return [found[n] for n in numbers]


# ── what a plan may say ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"shares": {"control": 0.5, "random": 0.4}}, "sum to 0.9"),
        ({"shares": {"control": 1.5, "random": -0.5}}, "less than or equal to 1"),
        ({"shares": {"control": 1}}, "bucket random gets no traffic"),
        ({"shares": {"random": 0.5, "model": 0.5}}, "no model_version"),
        ({"shares": {"random": 0.5, "challenger": 0.5}}, "challenger"),
        ({"challenger": {"model_version": "m"}}, "challenger"),
        ({"shares": {"control": float("nan"), "random": 1}}, "finite"),
        ({"policy": {"kind": "thompson", "epsilon": 0}}, "greater than or equal to 0.01"),
        ({"policy": {"kind": "greedy"}}, "epsilon_greedy"),
        ({"guardrails": [{"metric": "errors"}]}, "no bound"),
        ({"guardrails": [{"metric": "errors", "min": 2, "max": 1}]}, "can never hold"),
        ({"guardrails": [{"metric": "errors", "max": 1}, {"metric": "errors", "min": 0}]}, "two guardrails"),
        ({"stages": []}, "at least 1"),
        ({"stages": [0, 1]}, "rise"),
        ({"stages": [0.5, 0.5, 1]}, "rise"),
        ({"stages": [0.5, 0.9]}, "exactly 1"),
        ({"stage": [1]}, "not permitted"),
        ({"frequency": {"max_exposures": 0}}, "greater than or equal to 1"),
        ({"frequency": {"max_exposures": 3, "window_s": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ReleasePlan.model_validate({"shares": {"control": 0.5, "random": 0.5}, **wrong})


def test_a_plan_has_sensible_defaults() -> None:
    assert PLAN.stages == (0.01, 0.05, 0.2, 0.5, 1.0)
    assert (PLAN.policy.kind, PLAN.policy.epsilon) == (PolicyKind.EPSILON_GREEDY, 0.1)
    ReleasePlan(shares=Shares(control=0.7, random=0.1, model=0.1, challenger=0.1), model_version="m",
                challenger=Challenger(model_version="n"))  # fmt: skip
    assert ReleasePlan(shares=Shares(control=1), without_random="a launch of one variant").shares.random == 0


def test_the_plan_in_the_documentation_is_one() -> None:
    page = (ROOT / "docs/releases.md").read_text(encoding="utf-8")
    plan = ReleasePlan.model_validate(yaml.safe_load(page.split("```yaml")[1].split("```")[0]))
    assert (plan.model_version, plan.stages) == ("ctr-7", STAGES)


# ── drafting ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_draft_holds_everything_that_decides_what_is_shown(database: Database) -> None:
    approved_scene(database, product={"price": 1.5, "name": "Card 卡"})
    soon = now() + timedelta(hours=1)

    def rules(session: Session) -> None:
        block = InterventionSpec(kind=InterventionKind.BLOCK, target=Target(material="c1"))
        add_intervention(session, SCENE, "now", block)
        add_intervention(session, SCENE, "soon", block.model_copy(update={"starts_at": soon}))
        add_intervention(session, SCENE, "ended", block)
        end_intervention(session, SCENE, "ended")

    do(database, rules, person("ann"))
    made = do(database, lambda s: draft_release(s, SCENE, WATCHED, "first"), person("eve", Role.EDITOR))
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        stored = get_release(session, SCENE, 1)
        content = verify(stored)
        assert (stored.number, stored.author, stored.note) == (1, "eve", "first")
        assert stored.content_hash == made.content_hash
        assert release_state(session, SCENE, 1) == DRAFT
        materials = {m.id: m for m in session.scalars(select(Material))}
        baseline = session.get(Variant, ("acme", SCENE, content.baseline))
    assert baseline is not None and baseline.materials == {"copy": "c2", "image": "i1", "layout": "l1"}
    assert content.scene.product == {"price": 1.5, "name": "Card 卡"}
    assert [slot.name for slot in content.scene.slots] == ["copy", "image", "layout"]
    assert content.taxonomy == 1
    assert [v.id for v in content.variants] == sorted(v.id for v in content.variants)
    assert len(content.variants) == 16
    of_baseline = next(v for v in content.variants if v.id == content.baseline)
    assert of_baseline.tags == {"benefit": ("cash_back",), "image_style": ("flat",), "subject": ("product",)}
    assert {id: (m.kind, m.content, m.content_hash) for id, m in content.materials.items()} == {
        id: (m.kind, m.content, m.content_hash) for id, m in materials.items()
    }
    assert [rule.id for rule in content.interventions] == ["now", "soon"]
    assert content.guardrails == WATCHED.guardrails


def test_only_variants_whose_approval_holds_are_drafted(sqlite: Database) -> None:
    approved_scene(sqlite)
    do(sqlite, lambda s: change_material(s, "c3", content=Copy(title="Changed"), version=None), person("ann"))
    made = do(sqlite, lambda s: draft_release(s, SCENE, PLAN))
    assert "c3" not in verify(made).materials
    assert all(v.materials["copy"] != "c3" for v in verify(made).variants)


def test_a_scene_without_approved_variants_says_what_to_do(sqlite: Database) -> None:
    stocked(sqlite, approved=True)
    with sqlite.transaction(person("ann")) as session:
        with pytest.raises(ConflictError, match=r"no variant to release.*make variants"):
            draft_release(session, SCENE, PLAN)
        make_variants(session, SCENE)
        with pytest.raises(ConflictError, match="16 of 16 variants are not approved: submit them"):
            draft_release(session, SCENE, PLAN)


def test_a_baseline_that_is_not_approved_or_not_said_is_refused(sqlite: Database) -> None:
    approved_scene(sqlite)
    with sqlite.transaction(person("rex")) as session:
        move_materials(session, "reject", ["c2"], reason="untrue")
    with sqlite.transaction(person("ann")) as session:
        with pytest.raises(ConflictError, match=r"baseline.*copy=c2.*10 approved.*6 of 16 variants are not approved"):
            draft_release(session, SCENE, PLAN)
        scene = session.get(Scene, ("acme", SCENE))
        assert scene is not None
        scene.spec = {**scene.spec, "baseline": None}
        session.flush()
        with pytest.raises(ConflictError, match="has no baseline"):
            draft_release(session, SCENE, PLAN)


def test_approval_that_lapsed_is_counted(sqlite: Database) -> None:
    approved_scene(sqlite)
    with sqlite.transaction(person("ann")) as session:
        for material in session.scalars(select(Material).where(Material.kind == "layout")):
            material.content_hash = "0" * 64  # behind the back of the review
        session.flush()
        with pytest.raises(ConflictError, match="16 of 16 were approved, but their materials, or what fills"):
            draft_release(session, SCENE, PLAN)


def test_releases_count_up_within_their_scene(sqlite: Database) -> None:
    drafted(sqlite, n=3)
    with sqlite.transaction(person("vic", Role.VIEWER), write=False) as session:
        page = list_releases(session, SCENE, limit=2)
        assert [r.number for r in page.items] == [3, 2]
        assert [r.number for r in list_releases(session, SCENE, cursor=page.next_cursor).items] == [1]
        with pytest.raises(NotFoundError):
            get_release(session, SCENE, 4)
        with pytest.raises(NotFoundError):
            release_state(session, SCENE, 4)


def test_a_list_of_releases_costs_the_same_however_many(sqlite: Database) -> None:
    drafted(sqlite, n=5)
    do(sqlite, lambda s: start(s, SCENE, 1))
    with sqlite.transaction(person("vic", Role.VIEWER), write=False) as session, counted(sqlite) as statements:
        page = list_releases(session, SCENE)
        assert release_states(session, SCENE, [r.number for r in page.items])[1] == CANARY
    assert len(statements) == 3  # the scene, the releases, their states
    assert not any("releases.content," in text for text in statements)


class counted:
    """The statements that a block sends."""

    def __init__(self, database: Database) -> None:
        self.database, self.statements = database, list[str]()

    def __enter__(self) -> list[str]:
        event.listen(self.database.engine, "before_cursor_execute", self._note)
        return self.statements

    def __exit__(self, *_: object) -> None:
        event.remove(self.database.engine, "before_cursor_execute", self._note)

    def _note(self, connection: object, cursor: object, statement: str, *_: object) -> None:
        if not statement.startswith("BEGIN"):
            self.statements.append(statement)


# ── hashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hash_does_not_depend_on_order_nor_machine() -> None:
    assert canonical({"b": [1.0, "卡"], "a": {"y": 0.1, "x": None}}) == (
        rb'{"a":{"x":null,"y":0.1},"b":[1.0,"\u5361"]}'
    )
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": float("nan")})


def test_the_same_draft_has_the_same_hash_and_another_another(database: Database) -> None:
    approved_scene(database)
    plans = [PLAN, PLAN, WATCHED]
    first, again, other = [do(database, lambda s, p=p: draft_release(s, SCENE, p)).content_hash for p in plans]
    assert first == again != other


def test_a_tampered_release_is_not_shown(database: Database) -> None:
    drafted(database, n=2)
    to_full(database, 1)
    with database.engine.begin() as connection:
        if database.sqlite:
            connection.exec_driver_sql("DROP TRIGGER releases_no_update")
        else:
            connection.exec_driver_sql("ALTER TABLE releases DISABLE TRIGGER ALL")
        release = sa.table("releases", sa.column("content", sa.JSON))
        content = connection.scalar(sa.select(release.c.content).limit(1))
        content["shares"]["control"] = 0.9
        connection.execute(sa.update(release).values(content=content))
    with database.transaction(PUBLISHER) as session:
        with pytest.raises(JobError, match="Release 2 of scene 'welcome' was changed in the database"):
            verify(get_release(session, SCENE, 2))
        with pytest.raises(JobError):
            start(session, SCENE, 2)


# ── from draft to full ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_release_goes_from_draft_over_its_stages_to_full(database: Database) -> None:
    drafted(database)
    assert live(database) is None
    assert states(database, 1) == [DRAFT]
    assert do(database, lambda s: start(s, SCENE, 1)).seq == 1
    shares = [standing(database)]
    assert states(database, 1) == [CANARY]
    for _ in STAGES[1:]:
        do(database, lambda s: advance(s, SCENE, health=fine()))
        shares.append(standing(database))
    assert shares == [(None, 1, 0.01), (None, 1, 0.05), (None, 1, 0.2), (None, 1, 0.5), (1, None, 0.0)]
    assert states(database, 1) == [FULL]
    with pytest.raises(ConflictError, match="No release is in canary"):
        do(database, lambda s: advance(s, SCENE, health=fine()))


def test_the_next_release_supersedes_the_one_before(sqlite: Database) -> None:
    drafted(sqlite, n=2)
    to_full(sqlite, 1)
    do(sqlite, lambda s: start(s, SCENE, 2))
    assert standing(sqlite) == (1, 2, 0.01)
    assert states(sqlite, 1, 2) == [FULL, CANARY]
    for _ in STAGES[1:]:
        do(sqlite, lambda s: advance(s, SCENE, health=fine()))
    assert states(sqlite, 1, 2) == [SUPERSEDED, FULL]


def test_one_stage_is_full_at_once(sqlite: Database) -> None:
    drafted(sqlite, ReleasePlan(shares=HALF, stages=(1.0,)))
    do(sqlite, lambda s: start(s, SCENE, 1))
    assert standing(sqlite) == (1, None, 0.0)


def test_one_canary_at_a_time_and_each_release_once(sqlite: Database) -> None:
    drafted(sqlite, n=2)
    do(sqlite, lambda s: start(s, SCENE, 1))
    with pytest.raises(ConflictError, match="Release 1 is in canary") as caught:
        do(sqlite, lambda s: start(s, SCENE, 2))
    assert caught.value.details is not None
    assert caught.value.details["yours"] == {"action": "start", "release": 2, "expected_seq": None}
    assert caught.value.details["current"]["candidate"] == 1
    json.dumps(caught.value.as_dict())
    do(sqlite, lambda s: rollback(s, SCENE, reason="bad"))
    with pytest.raises(ConflictError, match="was started before and is rolled back"):
        do(sqlite, lambda s: start(s, SCENE, 1))


def test_a_draft_with_something_rejected_since_is_not_started(sqlite: Database) -> None:
    drafted(sqlite, n=2)
    do(sqlite, lambda s: move_materials(s, "reject", ["c3"], reason="untrue"), person("rex"))
    with pytest.raises(ConflictError, match="rejected or retired since: material c3"):
        do(sqlite, lambda s: start(s, SCENE, 1))
    do(sqlite, lambda s: draft_release(s, SCENE, PLAN))
    do(sqlite, lambda s: start(s, SCENE, 3))


def variant_of(database: Database, **materials: str) -> VariantFilter:
    return VariantFilter(ids=(variant_id({"copy": "c2", "image": "i2", "layout": "l1", **materials}),))


def test_a_rejection_is_not_undone_by_submitting_again(database: Database) -> None:
    drafted(database)
    one = variant_of(database)
    do(database, lambda s: move_variants(s, SCENE, "reject", one, reason="untrue"), person("rex"))
    do(database, lambda s: move_variants(s, SCENE, "submit", one), person("ann"))
    with pytest.raises(ConflictError, match=f"rejected or retired since: variant {one.ids[0]}. Draft a new one"):
        do(database, lambda s: start(s, SCENE, 1))
    do(database, lambda s: move_variants(s, SCENE, "approve", one), person("rex"))
    assert do(database, lambda s: start(s, SCENE, 1)).candidate == 1


def test_a_canary_with_something_rejected_is_rolled_back_and_not_advanced(database: Database) -> None:
    drafted(database, WATCHED)
    do(database, lambda s: start(s, SCENE, 1))
    do(database, lambda s: move_materials(s, "reject", ["c3"], reason="untrue"), person("rex"))
    do(database, lambda s: move_materials(s, "submit", ["c3"]), person("ann"))

    def healthy() -> Health:
        return Health.judge(RAILS, {"click_rate": 1, "errors": 0}, now())

    with pytest.raises(ConflictError, match=r"Release 1 holds .* material c3\. Roll it back") as caught:
        do(database, lambda s: advance(s, SCENE, health=healthy(), rollback_if_unhealthy=True))
    assert caught.value.details is not None and caught.value.details["current"]["candidate"] == 1
    do(database, lambda s: move_materials(s, "approve", ["c3"]), person("rex"))
    assert do(database, lambda s: advance(s, SCENE, health=healthy())).share == 0.05
    do(database, lambda s: move_materials(s, "retire", ["c3"]), person("ann"))
    bad = Health.judge(RAILS, {"click_rate": 1, "errors": 9}, now())
    assert do(database, lambda s: advance(s, SCENE, health=bad, rollback_if_unhealthy=True)).action == "roll_back"


def test_what_was_rejected_is_approved_again_only_as_the_release_holds_it(sqlite: Database) -> None:
    drafted(sqlite)
    do(sqlite, lambda s: move_materials(s, "reject", ["c3"], reason="untrue"), person("rex"))
    with sqlite.transaction(person("ann")) as session:
        change_material(session, "c3", content=Copy(title="True"), version=None)
        move_materials(session, "submit", ["c3"])
    do(sqlite, lambda s: move_materials(s, "approve", ["c3"]), person("rex"))
    with pytest.raises(ConflictError, match="material c3"):
        do(sqlite, lambda s: start(s, SCENE, 1))


def test_a_product_value_that_was_rejected_does_not_go_live_when_another_is_approved(sqlite: Database) -> None:
    stocked(sqlite, product={"yield": "99 %"})
    with sqlite.transaction(person("ann")) as session:
        change_business(session, version=None, placeholders=DEFAULT_PLACEHOLDERS)
        change_material(session, "c2", content=Copy(title="Earn {yield}"), version=None)
        make_variants(session, SCENE)
    ids = ["c1", "c2", "c3", "i1", "i2", "i3", "l1", "l2"]
    one = variant_of(sqlite)

    def approve(wanted: VariantFilter) -> None:
        do(sqlite, lambda s: move_variants(s, SCENE, "submit", wanted), person("ann"))
        assert do(sqlite, lambda s: move_variants(s, SCENE, "approve", wanted), person("rex")).moved

    do(sqlite, lambda s: (move_materials(s, "submit", ids), move_materials(s, "approve", ids)), person("rex"))
    approve(VariantFilter())
    do(sqlite, lambda s: draft_release(s, SCENE, PLAN))
    do(sqlite, lambda s: move_variants(s, SCENE, "reject", one, reason="nobody pays 99 %"), person("rex"))
    do(sqlite, lambda s: change_scene(s, SCENE, spec(product={"yield": "3 %"}), version=None), person("ann"))
    approve(VariantFilter(("copy:c2",)))
    with pytest.raises(ConflictError, match=f"variant {one.ids[0]}"):
        do(sqlite, lambda s: start(s, SCENE, 1))


def test_a_draft_of_what_was_edited_since_is_started(sqlite: Database) -> None:
    drafted(sqlite)
    with sqlite.transaction(person("ann")) as session:
        change_material(session, "c3", content=Copy(title="Another"), version=None)
        change_scene(session, SCENE, spec(product={"yield": "3 %"}), version=None)
    assert do(sqlite, lambda s: start(s, SCENE, 1)).candidate == 1


def test_two_people_publish_where_the_business_wants_it(sqlite: Database) -> None:
    approved_scene(sqlite)
    do(sqlite, lambda s: change_business(s, version=None, two_person_publish=True), person("root"))
    do(sqlite, lambda s: draft_release(s, SCENE, PLAN), PUBLISHER)
    for author in (PUBLISHER, person("pat"), person("Pat", Role.PUBLISHER)):
        with pytest.raises(ForbiddenError, match="two people"):
            do(sqlite, lambda s: start(s, SCENE, 1), author)
    do(sqlite, lambda s: start(s, SCENE, 1), person("pia", Role.PUBLISHER))
    do(sqlite, lambda s: advance(s, SCENE, health=fine()), PUBLISHER)


def test_pausing_keeps_the_share_and_stops_advancing(database: Database) -> None:
    drafted(database)
    with pytest.raises(ConflictError, match="nothing to pause"):
        do(database, lambda s: pause(s, SCENE, reason="look"))
    do(database, lambda s: start(s, SCENE, 1))
    with pytest.raises(ConflictError, match="not paused"):
        do(database, lambda s: resume(s, SCENE))
    do(database, lambda s: pause(s, SCENE, reason="look"))
    assert states(database, 1) == [PAUSED]
    assert standing(database) == (None, 1, 0.01)
    with pytest.raises(ConflictError, match="is paused"):
        do(database, lambda s: advance(s, SCENE, health=fine()))
    with pytest.raises(ConflictError, match="paused already"):
        do(database, lambda s: pause(s, SCENE, reason="look"))
    do(database, lambda s: resume(s, SCENE))
    assert states(database, 1) == [CANARY]
    assert do(database, lambda s: advance(s, SCENE, health=fine())).share == 0.05


@pytest.mark.parametrize("role", [Role.VIEWER, Role.EDITOR, Role.REVIEWER])
def test_only_publishers_move_a_scene(sqlite: Database, role: Role) -> None:
    drafted(sqlite)
    for move in MOVES.values():
        with pytest.raises(ForbiddenError):
            do(sqlite, move, person("x", role))


def test_who_may_draft(sqlite: Database) -> None:
    approved_scene(sqlite)
    for role in (Role.EDITOR, Role.PUBLISHER):
        do(sqlite, lambda s: draft_release(s, SCENE, PLAN), person("x", role))
    for role in (Role.VIEWER, Role.REVIEWER):
        with pytest.raises(ForbiddenError):
            do(sqlite, lambda s: draft_release(s, SCENE, PLAN), person("x", role))


def test_another_business_sees_and_moves_nothing(sqlite: Database) -> None:
    drafted(sqlite)
    do(sqlite, lambda s: start(s, SCENE, 1))
    rival = person("mal", business="rival")
    for call in (*MOVES.values(), lambda s: draft_release(s, SCENE, PLAN)):
        with pytest.raises(NotFoundError):
            do(sqlite, call, rival)
    with sqlite.transaction(rival) as session:
        assert live_at(session, SCENE) is None
        assert release_states(session, SCENE, [1]) == {1: DRAFT}
        for read in (list_releases, ledger):
            with pytest.raises(NotFoundError):
                read(session, SCENE)


MOVES: dict[str, Callable[[Session], Any]] = {
    "start": lambda s: start(s, SCENE, 1),
    "advance": lambda s: advance(s, SCENE, health=fine()),
    "pause": lambda s: pause(s, SCENE, reason="why"),
    "resume": lambda s: resume(s, SCENE),
    "rollback": lambda s: rollback(s, SCENE, reason="why"),
}


# ── health ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check(metric: str, value: float | None, ok: bool = True, bound: float | None = None) -> HealthCheck:
    return HealthCheck(metric=metric, value=value, ok=ok, bound=bound)


GOOD = (check("click_rate", 0.02), check("errors", 1))


@pytest.mark.parametrize(
    ("checks", "ok", "failed"),
    [
        (GOOD, True, []),
        (GOOD, False, ["the health report says that it is not ok"]),
        ((), True, ["click_rate: not measured", "errors: not measured"]),
        (GOOD[:1], True, ["errors: not measured"]),
        ((GOOD[0], check("errors", None)), True, ["errors: unknown"]),
        ((GOOD[0], check("errors", 9)), True, ["errors: 9, has to be at most 5 over 3600 s"]),
        ((GOOD[0], check("errors", 9, ok=False)), False, ["errors: 9, has to be at most 5 over 3600 s"]),
        ((*GOOD, check("latency", 9, ok=False, bound=4)), False, ["latency: 9, bound 4"]),
        ((check("click_rate", 0.001), GOOD[1]), True, ["click_rate: 0.001, has to be at least 0.01 over 3600 s"]),
    ],
)
def test_unknown_is_not_healthy(checks: tuple[HealthCheck, ...], ok: bool, failed: list[str]) -> None:
    assert failures(RAILS, Health(ok=ok, checks=checks, observed_at=now())) == failed


@pytest.mark.parametrize(
    ("measured", "failing"),
    [
        ({"click_rate": 0.02, "errors": 5}, set()),
        ({"click_rate": 0.02, "errors": 6}, {"errors"}),
        ({"click_rate": float("nan"), "errors": 0}, {"click_rate"}),
        ({"errors": None}, {"click_rate", "errors"}),
    ],
)
def test_health_is_judged_from_measured_values(measured: Mapping[str, float | None], failing: set[str]) -> None:
    health = Health.judge(RAILS, measured, now())
    assert {c.metric for c in health.checks if not c.ok} == failing
    assert {c.metric: c.bound for c in health.checks} == {"click_rate": 0.01, "errors": 5}
    assert health.ok == (not failing) == (not failures(RAILS, health))


def test_an_unhealthy_candidate_does_not_advance(database: Database) -> None:
    drafted(database, WATCHED)
    do(database, lambda s: start(s, SCENE, 1))
    with pytest.raises(ConflictError, match="not healthy: errors: 9, has to be at most 5") as caught:
        do(database, lambda s: advance(s, SCENE, health=Health.judge(RAILS, {"click_rate": 1, "errors": 9}, now())))
    assert caught.value.details is not None and caught.value.details["current"]["share"] == 0.01
    with pytest.raises(ConflictError, match="click_rate: not measured"):
        do(database, lambda s: advance(s, SCENE, health=fine()))
    assert standing(database) == (None, 1, 0.01)
    good = Health.judge(RAILS, {"click_rate": 1, "errors": 0}, now())
    entry = do(database, lambda s: advance(s, SCENE, health=good))
    assert entry.share == 0.05
    assert Health.model_validate(entry.health) == good


@pytest.mark.parametrize("paused", [False, True])
def test_an_unhealthy_candidate_is_rolled_back_where_that_is_wanted(sqlite: Database, paused: bool) -> None:
    drafted(sqlite, WATCHED)
    do(sqlite, lambda s: draft_release(s, SCENE, PLAN))
    to_full(sqlite, 2)
    do(sqlite, lambda s: start(s, SCENE, 1))
    if paused:
        do(sqlite, MOVES["pause"])
    bad = Health.judge(RAILS, {"click_rate": 1, "errors": 9}, now())
    entry = do(sqlite, lambda s: advance(s, SCENE, health=bad, rollback_if_unhealthy=True))
    assert (entry.action, entry.release, entry.stable, entry.candidate) == ("roll_back", 1, 2, None)
    assert entry.reason == "guardrails failed: errors: 9, has to be at most 5 over 3600 s"
    assert entry.health is not None
    assert states(sqlite, 1, 2) == [ROLLED_BACK, FULL]


@pytest.mark.parametrize(
    ("away", "says"),
    [
        (timedelta(minutes=-16), "more than 15 minutes ago"),
        (timedelta(minutes=2), "yet to come"),
        (timedelta(seconds=-59), "before this stage began"),
    ],
)
def test_health_of_another_time_is_refused(sqlite: Database, away: timedelta, says: str) -> None:
    drafted(sqlite)
    do(sqlite, lambda s: start(s, SCENE, 1))
    health = Health(ok=True, observed_at=now() + away)
    with pytest.raises(ConflictError, match=says):
        do(sqlite, lambda s: advance(s, SCENE, health=health, rollback_if_unhealthy=True))


def test_a_release_holds_the_placeholders_of_its_copies(sqlite: Database) -> None:
    approved_scene(sqlite)
    with sqlite.transaction(person("ann")) as session:
        change_business(session, version=None, placeholders=DEFAULT_PLACEHOLDERS)
    content = verify(do(sqlite, lambda s: draft_release(s, SCENE, PLAN)))
    assert content.placeholders == DEFAULT_PLACEHOLDERS


def test_a_clock_that_runs_ahead_does_not_make_one_report_good_for_two_stages(sqlite: Database) -> None:
    drafted(sqlite)
    do(sqlite, lambda s: start(s, SCENE, 1))
    ahead = Health(ok=True, observed_at=now() + timedelta(seconds=30))
    do(sqlite, lambda s: advance(s, SCENE, health=ahead))
    with pytest.raises(ConflictError, match="served for the stage before"):
        do(sqlite, lambda s: advance(s, SCENE, health=ahead))


def test_one_look_at_the_health_is_good_for_one_stage(sqlite: Database) -> None:
    drafted(sqlite)
    do(sqlite, lambda s: start(s, SCENE, 1))
    health = fine()
    do(sqlite, MOVES["pause"])
    do(sqlite, MOVES["resume"])
    do(sqlite, lambda s: advance(s, SCENE, health=health))
    with pytest.raises(ConflictError, match="before this stage began"):
        do(sqlite, lambda s: advance(s, SCENE, health=health))


# ── rolling back ────────────────────────────────────────────────────────────────────────────────────────────────────


def back(database: Database, to: int | None = None) -> LedgerEntry:
    entry: LedgerEntry = do(database, lambda s: rollback(s, SCENE, reason="fewer clicks", to=to))
    return entry


def test_a_canary_gives_way_to_the_stable_release(database: Database) -> None:
    drafted(database, n=2)
    to_full(database, 1)
    do(database, lambda s: start(s, SCENE, 2))
    do(database, MOVES["pause"])
    entry = back(database)
    assert (entry.release, entry.stable, entry.candidate, entry.share, entry.paused) == (2, 1, None, 0.0, False)
    assert states(database, 1, 2) == [FULL, ROLLED_BACK]
    assert describe(entry) == "pat rolled back to release 1: fewer clicks"


def test_a_first_canary_gives_way_to_nothing_and_says_so(sqlite: Database) -> None:
    drafted(sqlite)
    do(sqlite, lambda s: start(s, SCENE, 1))
    entry = back(sqlite)
    assert (entry.stable, entry.candidate) == (None, None)
    assert describe(entry) == (
        "pat rolled back release 1; no release is live, and callers show their own default until one is started:"
        " fewer clicks"
    )
    with pytest.raises(ConflictError, match="Nothing is live"):
        back(sqlite)


def test_a_full_release_gives_way_to_the_one_before_it(sqlite: Database) -> None:
    drafted(sqlite, n=3)
    for number in (1, 2):
        to_full(sqlite, number)
    assert (back(sqlite).stable, states(sqlite, 1, 2)) == (1, [FULL, ROLLED_BACK])
    to_full(sqlite, 3)
    assert back(sqlite).stable == 1, "not 2, which was rolled back"
    assert back(sqlite).stable is None
    assert states(sqlite, 1, 2, 3) == [ROLLED_BACK] * 3


def test_a_rollback_can_name_its_release(sqlite: Database) -> None:
    drafted(sqlite, n=4)
    for number in (1, 2, 3):
        to_full(sqlite, number)
    entry = back(sqlite, to=1)
    assert (entry.release, entry.stable) == (3, 1)
    assert states(sqlite, 1, 2, 3) == [FULL, SUPERSEDED, ROLLED_BACK]
    do(sqlite, lambda s: start(s, SCENE, 4))
    with pytest.raises(ConflictError, match="never fully live"):
        back(sqlite, to=4)
    entry = back(sqlite, to=2)
    assert (entry.release, entry.stable, entry.candidate) == (4, 2, None)
    assert states(sqlite, 1, 2, 3, 4) == [ROLLED_BACK, FULL, ROLLED_BACK, ROLLED_BACK]
    with pytest.raises(ConflictError, match="live already"):
        back(sqlite, to=2)
    with pytest.raises(NotFoundError):
        back(sqlite, to=9)
    assert back(sqlite, to=3).stable == 3, "a rollback can be taken back"


def test_what_was_stopped_altogether_can_be_brought_back(sqlite: Database) -> None:
    drafted(sqlite)
    to_full(sqlite, 1)
    assert back(sqlite).stable is None
    entry = back(sqlite, to=1)
    assert (entry.release, entry.stable) == (1, 1)
    assert states(sqlite, 1) == [FULL]


@pytest.mark.parametrize("reason", ["", "  "])
def test_pauses_and_rollbacks_need_a_reason(sqlite: Database, reason: str) -> None:
    drafted(sqlite)
    do(sqlite, MOVES["start"])
    for move in (pause, rollback):
        with pytest.raises(InputError, match="reason"):
            do(sqlite, lambda s, move=move: move(s, SCENE, reason=reason))


# ── questions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_live_at_a_moment_is_one_query(database: Database) -> None:
    drafted(database, n=2)
    to_full(database, 1)
    do(database, lambda s: start(s, SCENE, 2))
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        entries = ledger(session, SCENE).items
        assert [e.seq for e in entries] == [6, 5, 4, 3, 2, 1]
        page = ledger(session, SCENE, limit=4)
        assert [e.seq for e in ledger(session, SCENE, cursor=page.next_cursor).items] == [2, 1]
        with counted(database) as statements:
            found = live_at(session, SCENE)
        assert len(statements) == 1
        assert found is not None and (found.seq, found.stable, found.candidate, found.stage) == (6, 1, 2, 0)
        assert str(found) == "release 1 is stable and release 2 is in canary with 1 % of the traffic"
        times = [entry.at for entry in reversed(entries)]
        assert times == sorted(times)
        for seq, at in enumerate(times, start=1):
            then = live_at(session, SCENE, at)
            assert then is not None and then.seq == seq
        assert live_at(session, SCENE, times[0] - timedelta(microseconds=1)) is None
        with pytest.raises(InputError, match="no time zone"):
            live_at(session, SCENE, datetime(2026, 1, 1))


def test_a_clock_that_was_set_back_does_not_reorder_the_ledger(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted(sqlite)
    do(sqlite, MOVES["start"])
    monkeypatch.setattr("kaleidoscope.release.now", lambda: datetime(2020, 1, 1, tzinfo=UTC))
    do(sqlite, MOVES["pause"])
    found = live(sqlite)
    assert found is not None and found.paused and found.at.year > 2020


def test_entries_read_as_sentences(sqlite: Database) -> None:
    drafted(sqlite)
    told = [describe(do(sqlite, MOVES[name])) for name in ("start", "advance", "pause", "resume")]
    assert told == [
        "pat started release 1 at 1 %",
        "pat advanced release 1 to 5 %",
        "pat paused release 1 at 5 %: why",
        "pat resumed release 1 at 5 %",
    ]


def test_a_difference_reads_well(sqlite: Database) -> None:
    approved_scene(sqlite)
    before = verify(do(sqlite, lambda s: draft_release(s, SCENE, PLAN)))
    assert diff(before, before).lines() == []

    def change(session: Session) -> None:
        spec = InterventionSpec(
            kind=InterventionKind.BLOCK, target=Target(tag={"subject": "gold"}), segment={"age": "young"}, priority=3
        )
        add_intervention(session, SCENE, "ban", spec)

    do(sqlite, change, person("ann"))
    do(sqlite, lambda s: move_materials(s, "reject", ["c3"], reason="untrue"), person("rex"))
    plan = ReleasePlan(
        shares=Shares(control=0.1, random=0.1, model=0.8),
        model_version="m7",
        policy=PolicySpec(kind=PolicyKind.THOMPSON, epsilon=0.2),
        frequency=Frequency(max_exposures=3),
        guardrails=(Guardrail(metric="errors", max=5),),
    )
    after = verify(do(sqlite, lambda s: draft_release(s, SCENE, plan)))
    found = diff(before, after)
    assert len(found.variants_removed) == 6 and found.variants_added == ()
    lines = found.lines()
    assert lines[0].startswith("6 variants removed: ") and lines[0].endswith(" and 1 more")
    hash8 = before.materials["c3"].content_hash[:8]
    assert lines[1:] == [
        "share of control: 50 % → 10 %",
        "share of random: 50 % → 10 %",
        "share of model: 0 % → 80 %",
        "policy: epsilon_greedy (epsilon 0.1) → thompson (epsilon 0.2)",
        "material c3: removed",
        "model: added (m7)",
        "frequency: added (a variant rests after 3 exposures in 86400 s)",
        "guardrail errors: added (at most 5 over 3600 s)",
        "intervention ban: added (block tag subject=gold, for age=young, priority 3)",
    ]
    assert f"material c3: added (copy {hash8})" in diff(after, before).lines()


# ── two at once ─────────────────────────────────────────────────────────────────────────────────────────────────────


def at_once(database: Database, *moves: Callable[[Session], Any]) -> list[Any]:
    """What each move came to, each in its own thread and transaction: what it returned, or the error."""
    barrier, results = threading.Barrier(len(moves)), [None] * len(moves)

    def run(n: int) -> None:
        try:
            barrier.wait(60)
            results[n] = do(database, moves[n], person(f"p{n}", Role.PUBLISHER))
        except Exception as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(moves))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("how", ["start", "advance", "advance-expected", "rollback"])
def test_of_publishers_who_move_at_once_exactly_one_wins(database: Database, how: str) -> None:
    drafted(database, n=4)
    if how != "start":
        do(database, lambda s: start(s, SCENE, 1))
    health, expected = fine(), live(database)
    seq = expected.seq if expected else 0
    moves: dict[str, Callable[[int], Callable[[Session], Any]]] = {
        "start": lambda n: lambda s: start(s, SCENE, n + 1),
        "advance": lambda n: lambda s: advance(s, SCENE, health=health),
        "advance-expected": lambda n: lambda s: advance(s, SCENE, health=fine(), expected_seq=seq),
        "rollback": lambda n: lambda s: rollback(s, SCENE, reason="bad", expected_seq=seq),
    }
    results = at_once(database, *[moves[how](n) for n in range(4)])
    winners = [r for r in results if isinstance(r, LedgerEntry)]
    losers = [r for r in results if isinstance(r, ConflictError)]
    assert (len(winners), len(losers)) == (1, 3), results
    for loser in losers:
        assert loser.details is not None
        assert loser.details["yours"]["action"] == winners[0].action
        assert loser.details["current"]["seq"] == winners[0].seq == seq + 1
        assert loser.details["current"]["actor"] == winners[0].actor
    check_ledger(database)


def test_drafts_made_at_once_get_different_numbers(database: Database) -> None:
    approved_scene(database)
    results = at_once(database, *[lambda s: draft_release(s, SCENE, PLAN)] * 3)
    assert sorted(r.number for r in results) == [1, 2, 3]


def test_a_move_made_on_an_old_view_is_refused(sqlite: Database) -> None:
    drafted(sqlite)
    with pytest.raises(ConflictError, match="was moved meanwhile"):
        do(sqlite, lambda s: start(s, SCENE, 1, expected_seq=3))
    do(sqlite, lambda s: start(s, SCENE, 1, expected_seq=0))
    for move in (
        lambda s: pause(s, SCENE, reason="x", expected_seq=0),
        lambda s: resume(s, SCENE, expected_seq=0),
        lambda s: advance(s, SCENE, health=fine(), expected_seq=0),
        lambda s: rollback(s, SCENE, reason="x", expected_seq=0),
    ):
        with pytest.raises(ConflictError, match="moved meanwhile, by pat: no release is stable and release 1 is in"):
            do(sqlite, move)


# ── killed in the middle ────────────────────────────────────────────────────────────────────────────────────────────

KILLS = 20

# Forks a worker for each line it reads, and says its pid. The worker moves the scene back and forth until it is killed.
WORKSHOP = """
import os, random, signal, sys
from kaleidoscope.database import Database
from kaleidoscope.errors import ConflictError
from kaleidoscope import release
from tests.kaleidoscope.people import person

def work(seed):
    signal.alarm(30)  # never outlives a test that failed
    draw = random.Random(seed)
    database = Database(sys.argv[1])
    def move(session):
        live = release.live_at(session, "welcome")
        if live is None or live.candidate is None:
            if live is not None and live.stable is not None and draw.random() < 0.2:
                return release.rollback(session, "welcome", reason="why")
            made = release.draft_release(session, "welcome", plan)
            return release.start(session, "welcome", made.number)
        if live.paused:
            return release.resume(session, "welcome")
        if draw.random() < 0.3:
            return release.pause(session, "welcome", reason="why")
        if draw.random() < 0.1:
            return release.rollback(session, "welcome", reason="why")
        health = release.Health(ok=True, observed_at=release.now())
        return release.advance(session, "welcome", health=health)
    while True:
        with database.transaction(person("worker")) as session:
            move(session)
        os.write(1, b"moved\\n")

plan = release.ReleasePlan(shares=release.Shares(control=0.5, random=0.5))
signal.alarm(600)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        work(int(line))
    os.write(1, b"pid %d\\n" % pid)
    os.waitpid(pid, 0)
    os.write(1, b"dead\\n")
"""


def check_ledger(database: Database) -> list[LedgerEntry]:
    """The entries, after making sure that each follows from the one before and nothing is half there."""
    with database.transaction(operator("root", "acme"), write=False) as session:
        entries = list(session.scalars(select(LedgerEntry).order_by(LedgerEntry.seq)))
        releases = {r.number: verify(r) for r in session.scalars(select(Release))}
        trail = session.execute(
            select(AuditEntry.entity, func.count()).where(AuditEntry.entity.in_(("ledger", "releases")))
            .group_by(AuditEntry.entity)
        )  # fmt: skip
        assert dict(trail.all()) == {
            name: n for name, n in (("ledger", len(entries)), ("releases", len(releases))) if n
        }
    assert [e.seq for e in entries] == list(range(1, len(entries) + 1))
    assert sorted(releases) == list(range(1, len(releases) + 1))
    stable: int | None = None
    candidate: int | None = None
    stage, paused = None, False
    for entry in entries:
        if entry.action == "start":
            assert candidate is None
            candidate, stage, paused = entry.release, 0, False
        elif entry.action == "advance":
            assert entry.release == candidate and stage is not None and not paused
            stage += 1
            if stage == len(STAGES) - 1:
                stable, candidate, stage = candidate, None, None
        elif entry.action in ("pause", "resume"):
            assert entry.release == candidate and paused == (entry.action == "resume")
            paused = not paused
        else:
            assert entry.action == "roll_back"
            if candidate is None:
                assert entry.release == stable
                stable = entry.stable
            candidate, stage, paused = None, None, False
        share = 0.0 if stage is None else STAGES[stage]
        seen = entry.stable, entry.candidate, entry.stage, entry.paused, entry.share
        assert seen == (stable, candidate, stage, paused, share), entry.seq
    return entries


def heard(workshop: subprocess.Popen[str]) -> str:
    assert workshop.stdout is not None
    line = workshop.stdout.readline()
    assert line, "the workshop ended"
    return line.strip()


def test_a_kill_in_the_middle_leaves_nothing_half_done(database: Database) -> None:
    approved_scene(database)
    draw = random.Random(7)
    command = [sys.executable, "-c", WORKSHOP, database.url.render_as_string(hide_password=False)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as workshop:
        assert workshop.stdin is not None
        seen = 0
        for kill in range(KILLS):
            workshop.stdin.write(f"{kill}\n")
            workshop.stdin.flush()
            said = list[str]()
            while "moved" not in said:  # it is at work
                said.append(heard(workshop))
            time.sleep(draw.uniform(0, 0.06))
            while not (pids := [line for line in said if line.startswith("pid")]):
                said.append(heard(workshop))
            os.kill(int(pids[0].split()[1]), signal.SIGKILL)
            while said[-1] != "dead":
                said.append(heard(workshop))
            moved = said.count("moved")
            settle(database)
            entries = check_ledger(database)
            # What was said to be done is there; one more may have been committed and not said.
            assert seen + moved <= len(entries) <= seen + moved + 1
            last = entries[-1]
            if last.candidate is not None:
                move = MOVES["resume" if last.paused else "pause"]
                do(database, move)
            else:
                do(database, lambda s: start(s, SCENE, draft_release(s, SCENE, PLAN).number))
            seen = len(check_ledger(database))
            assert seen == len(entries) + 1
        workshop.stdin.close()


def test_content_survives_its_way_through_json(sqlite: Database) -> None:
    approved_scene(sqlite)
    content = verify(do(sqlite, lambda s: draft_release(s, SCENE, WATCHED)))
    assert ReleaseContent.model_validate_json(content.model_dump_json()) == content
