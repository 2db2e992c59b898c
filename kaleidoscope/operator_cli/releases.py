"""Interventions and releases: what is live, and the way there and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaleidoscope.errors import InputError
from kaleidoscope.operator_cli.frame import (
    MOST,
    Cursor,
    Limit,
    Note,
    Output,
    Scene,
    Work,
    command,
    listing,
    moment_in,
    more,
    none_of,
    pairs_in,
    sentence,
    validated,
    when,
    words,
)
from kaleidoscope.terminal import fields, table
from kaleidoscope.vocabulary import InterventionKind

if TYPE_CHECKING:
    from kaleidoscope.database import Session
    from kaleidoscope.release import Health
    from kaleidoscope.tables import LedgerEntry
    from kaleidoscope.views import InterventionView

intervention_group = typer.Typer(
    name="intervention", help="Business rules that pin or block variants.", no_args_is_help=True
)
release_group = typer.Typer(
    name="release", help="Releases: from approved variants to live traffic, and back.", no_args_is_help=True
)


InterventionId = Annotated[str, typer.Argument(metavar="ID", help="Lower-case letters, digits, - and _.")]


@command(intervention_group, "add", write=True)
def intervention_add(
    work: Work,
    scene: Scene,
    intervention: InterventionId,
    kind: Annotated[InterventionKind, typer.Option("--kind", help="Show only these variants, or never these.")],
    variant: Annotated[str | None, typer.Option("--variant", help="One variant, by its id or how it begins.")] = None,
    material: Annotated[str | None, typer.Option("--material", help="Every variant with this material.")] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="DIMENSION=VALUE", help="Every variant with this tag.")
    ] = None,
    segment: Annotated[
        list[str] | None, typer.Option("--segment", metavar="FEATURE=VALUE", help="Only for these users; repeat it.")
    ] = None,
    starts_at: Annotated[str | None, typer.Option("--from", metavar="TIME", help="From then on.")] = None,
    ends_at: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Until then.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="The higher one wins.")] = 0,
    note: Note = "",
    force: Annotated[bool, typer.Option("--force", help="Although it contradicts other rules.")] = False,
) -> Output:
    """Pin or block variants, for a segment and a time. It shows with the next release."""
    from kaleidoscope.errors import ConflictError
    from kaleidoscope.interventions import InterventionSpec, add_intervention, conflicts
    from kaleidoscope.review import get_variant
    from kaleidoscope.views import InterventionView

    target: dict[str, object] = {
        "variant": None if variant is None else get_variant(work.session, scene, variant).id,
        "material": material,
        "tag": None if tag is None else dict(pairs_in("--tag", [tag])),
    }
    raw = {
        "kind": kind,
        "target": {what: name for what, name in target.items() if name is not None},
        "segment": dict(pairs_in("--segment", segment or ())),
        "starts_at": moment_in("--from", starts_at),
        "ends_at": moment_in("--until", ends_at),
        "priority": priority,
        "note": note,
    }
    spec = validated("intervention", InterventionSpec, raw)
    found = conflicts(work.session, scene, spec)
    if found and not force:
        raise ConflictError(
            "\n".join(c.message for c in found) + "\nNothing was added. With --force it is, as it stands.",
            details={"conflicts": [_plain_conflict(c) for c in found]},
        )
    view = InterventionView.model_validate(add_intervention(work.session, scene, intervention, spec))
    return Output(
        {**view.model_dump(mode="json"), "conflicts": [_plain_conflict(c) for c in found]},
        *(c.message for c in found),
        f"Added {_rule_text(view)}. It shows with the next release.",
    )


def _plain_conflict(conflict: Any) -> dict[str, object]:
    return {**asdict(conflict), "segment": dict(conflict.segment), "rules": list(conflict.rules)}


def _rule_text(view: InterventionView) -> str:
    target = listing(view.target["tag"]) if "tag" in view.target else listing(view.target).replace("=", " ")
    return f"{view.kind} {view.id}: {target}, for {listing(view.segment) or 'everybody'}"


@command(intervention_group, "list")
def intervention_list(
    work: Work,
    scene: Scene,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="Only those in force then.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Output:
    """List the rules of a scene, the ended ones too."""
    from kaleidoscope.interventions import list_interventions
    from kaleidoscope.views import InterventionView, page_view

    found = list_interventions(work.session, scene, active_at=moment_in("--at", at), cursor=cursor, limit=limit)
    page = page_view(found, InterventionView.model_validate)
    rows = [
        (
            v.id,
            "ended" if v.ended else v.kind,
            _rule_text(v).partition(": ")[2],
            when(v.starts_at),
            when(v.ends_at),
            v.priority,
            v.author,
        )
        for v in page.items
    ]
    shown = table(("id", "kind", "what", "from", "until", "priority", "author"), rows, whole=("id", "from", "until"))
    return Output(page, shown, *none_of(rows, "interventions"), *more(page.next_cursor))


@command(intervention_group, "end", write=True)
def intervention_end(work: Work, scene: Scene, intervention: InterventionId) -> Output:
    """Take a rule out of all later releases, for good."""
    from kaleidoscope.interventions import end_intervention
    from kaleidoscope.views import InterventionView

    view = InterventionView.model_validate(end_intervention(work.session, scene, intervention))
    return Output(view, f"Ended {_rule_text(view)}. It is in no later release.")


# ── releases ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ReleaseNumber = Annotated[int, typer.Argument(metavar="NUMBER", min=1, max=MOST, help="Number of the release.")]
Expected = Annotated[
    int | None,
    typer.Option("--expected-seq", min=0, max=MOST, help="Refuse if the ledger has gone on since this entry."),
]


def _share_option(bucket: str, what: str) -> Any:
    return typer.Option(f"--{bucket}", min=0.0, max=1.0, help=what)


@command(release_group, "draft", write=True)
def release_draft(
    work: Work,
    scene: Scene,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", exists=True, dir_okay=False, help="Shares, policy, guardrails and stages (YAML)."),
    ] = None,
    random: Annotated[float | None, _share_option("random", "Share of traffic that gets a variant at random.")] = None,
    model: Annotated[float | None, _share_option("model", "Share of traffic that a model picks for.")] = None,
    control: Annotated[
        float | None, _share_option("control", "Share that gets the baseline. Default: the rest.")
    ] = None,
    model_version: Annotated[str | None, typer.Option("--model-version", help="Which model picks.")] = None,
    without_random: Annotated[
        str | None, typer.Option("--without-random", metavar="REASON", help="Why nothing is shown at random.")
    ] = None,
    note: Note = "",
) -> Output:
    """Draft a release of what is approved: an immutable snapshot, live only once it is started."""
    from kaleidoscope.release import ReleasePlan, draft_release, release_state
    from kaleidoscope.views import ReleaseView
    from kaleidoscope.yaml_text import load_yaml

    shares = {"random": random, "model": model, "control": control}
    given = {name: share for name, share in shares.items() if share is not None}
    others = {"model_version": model_version, "without_random": without_random}
    others = {name: text for name, text in others.items() if text is not None}
    if plan is not None and (given or others):
        raise InputError("--plan says everything; leave the other options out, or leave --plan out.")
    if plan is None and not given:
        raise InputError("say what the buckets get: --plan FILE, or --random 0.1 and such.")
    if plan is None:
        given.setdefault("control", max(0.0, 1 - sum(given.values())))
        parsed = validated("plan", ReleasePlan, {"shares": given, **others})
    else:
        parsed = validated(str(plan), ReleasePlan, load_yaml(plan, docs="docs/releases.md"))
    row = draft_release(work.session, scene, parsed, note)
    view = ReleaseView.of(row, release_state(work.session, scene, row.number))
    count = len(row.content["variants"])
    return Output(
        {**view.model_dump(mode="json"), "variants": count},
        f"Drafted release {view.number} of {count:,} variants.",
        f"Start it: `kaleidoscope release start {scene} {view.number}`",
    )


def _entry_output(work: Work, entry: LedgerEntry) -> Output:
    from kaleidoscope.release import describe, live_at
    from kaleidoscope.views import LedgerView

    view = LedgerView.model_validate(entry)
    return Output(view, sentence(describe(entry)), sentence(f"Now {live_at(work.session, entry.scene_id)}"))


@command(release_group, "start", write=True)
def release_start(work: Work, scene: Scene, number: ReleaseNumber, expected_seq: Expected = None) -> Output:
    """Put a draft live, as a canary at its first stage."""
    from kaleidoscope.release import start

    return _entry_output(work, start(work.session, scene, number, expected_seq=expected_seq))


@command(release_group, "advance", write=True)
def release_advance(
    work: Work,
    scene: Scene,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME=VALUE", help="What a guardrail's metric is now; one for each of them."),
    ] = None,
    health_file: Annotated[
        Path | None, typer.Option("--health", exists=True, dir_okay=False, help="A health report (JSON).")
    ] = None,
    healthy: Annotated[
        bool, typer.Option("--healthy", help="You have looked, and all is well; for releases without guardrails.")
    ] = False,
    rollback_if_unhealthy: Annotated[
        bool, typer.Option("--rollback-if-unhealthy", help="Roll back at once where a guardrail does not hold.")
    ] = False,
    expected_seq: Expected = None,
) -> Output:
    """Move the canary to its next stage, if its guardrails hold."""
    from kaleidoscope.release import Health, advance

    if (bool(metrics), health_file is not None, healthy).count(True) != 1:
        raise InputError(
            "say how the release is doing: --metric NAME=VALUE for each guardrail, --health FILE, or --healthy."
        )
    if health_file is not None:
        health = _health_in(health_file)
    elif metrics:
        health = _measured(work.session, scene, metrics)
    else:
        health = Health(ok=True, observed_at=datetime.now(UTC))
    return _entry_output(
        work,
        advance(
            work.session,
            scene,
            health=health,
            expected_seq=expected_seq,
            rollback_if_unhealthy=rollback_if_unhealthy,
        ),
    )


def _health_in(path: Path) -> Health:
    from kaleidoscope.release import Health

    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}. Give what a monitor wrote (docs/cli.md).") from None
    return validated(str(path), Health, raw)


def _measured(session: Session, scene: str, texts: Sequence[str]) -> Health:
    """The health that typed values amount to, for the guardrails of the release in canary."""
    from kaleidoscope.release import Health, get_release, live_at, verify

    live = live_at(session, scene)
    candidate = None if live is None else live.candidate
    guardrails = () if candidate is None else verify(get_release(session, scene, candidate)).guardrails
    names = [rail.metric for rail in guardrails]
    measured: dict[str, float | None] = {}
    for name, value in pairs_in("--metric", texts):
        if candidate is not None and name not in names:
            raise InputError(
                f"--metric: release {candidate} has no guardrail {name!r}; it has {', '.join(names) or 'none'}."
            )
        try:
            measured[name] = float(value)
        except ValueError:
            raise InputError(f"--metric: {name}={value!r} is not a number.") from None
    return Health.judge(guardrails, measured, datetime.now(UTC))


@command(release_group, "pause", write=True)
def release_pause(
    work: Work,
    scene: Scene,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever reads the ledger.")],
    expected_seq: Expected = None,
) -> Output:
    """Hold the canary at its stage: it keeps its traffic and cannot be advanced."""
    from kaleidoscope.release import pause

    return _entry_output(work, pause(work.session, scene, reason=reason, expected_seq=expected_seq))


@command(release_group, "resume", write=True)
def release_resume(
    work: Work,
    scene: Scene,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever reads the ledger.")] = "",
    expected_seq: Expected = None,
) -> Output:
    """Let a paused canary be advanced again."""
    from kaleidoscope.release import resume

    return _entry_output(work, resume(work.session, scene, reason=reason, expected_seq=expected_seq))


@command(release_group, "rollback", write=True)
def release_rollback(
    work: Work,
    scene: Scene,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever reads the ledger.")],
    to: Annotated[
        int | None, typer.Option("--to", min=1, max=MOST, help="A release that was live; default: the one before.")
    ] = None,
    expected_seq: Expected = None,
) -> Output:
    """Take back what is live, at once."""
    from kaleidoscope.release import rollback

    return _entry_output(work, rollback(work.session, scene, reason=reason, to=to, expected_seq=expected_seq))


@command(release_group, "list")
def release_list(work: Work, scene: Scene, cursor: Cursor = None, limit: Limit = 50) -> Output:
    """List the releases of a scene, newest first."""
    from kaleidoscope.release import list_releases, release_states
    from kaleidoscope.views import ReleaseView, page_view

    found = list_releases(work.session, scene, cursor=cursor, limit=limit)
    states = release_states(work.session, scene, [row.number for row in found.items])
    page = page_view(found, lambda row: ReleaseView.of(row, states[row.number]))
    rows = [(v.number, words(v.state), v.author, when(v.created_at), v.content_hash[:12], v.note) for v in page.items]
    shown = table(("number", "state", "author", "drafted", "content", "note"), rows, whole=("drafted", "content"))
    return Output(page, shown, *none_of(rows, "releases"), *more(page.next_cursor))


@command(release_group, "show")
def release_show(
    work: Work,
    scene: Scene,
    number: ReleaseNumber,
    content: Annotated[
        bool, typer.Option("--content", help="With --json: everything it holds, variants and materials too.")
    ] = False,
) -> Output:
    """Show a release: its buckets, guardrails, stages, rules and how many variants; checks that nobody changed it."""
    from kaleidoscope.release import get_release, release_state, verify
    from kaleidoscope.views import ReleaseView

    row = get_release(work.session, scene, number)
    held = verify(row)
    view = ReleaseView.of(row, release_state(work.session, scene, number))
    summary: dict[str, Any] = held.model_dump(mode="json", exclude={"variants", "materials"})
    summary |= {"variants": len(held.variants), "materials": len(held.materials)}
    shares = {bucket: share for bucket, share in summary["shares"].items() if share}
    about = {
        "release": view.number,
        "state": words(view.state),
        "author": f"{view.author}, {when(view.created_at)}",
        "note": view.note,
        "content": view.content_hash,
        "variants": f"{len(held.variants):,} of {len(held.materials):,} materials",
        "baseline": held.baseline,
        "buckets": ", ".join(f"{bucket} {share:.6g}" for bucket, share in shares.items()),
        "without random": held.without_random,
        "model": held.model_version,
        "policy": f"{words(held.policy.kind)}, epsilon {held.policy.epsilon:g}",
        "challenger": None if held.challenger is None else held.challenger.model_version,
        "guardrails": "\n".join(f"{rail.metric} {rail}" for rail in held.guardrails),
        "stages": ", ".join(f"{share:.6g}" for share in held.stages),
        "rules": "\n".join(map(str, held.interventions)),
        "taxonomy": held.taxonomy,
    }
    return Output({**view.model_dump(mode="json"), "content": row.content if content else summary}, fields(about))


@command(release_group, "ledger")
def release_ledger(work: Work, scene: Scene, cursor: Cursor = None, limit: Limit = 50) -> Output:
    """Show every transition of a scene's releases, newest first."""
    from kaleidoscope.release import describe, ledger
    from kaleidoscope.views import LedgerView, page_view

    found = ledger(work.session, scene, cursor=cursor, limit=limit)
    page = page_view(found, LedgerView.model_validate)
    rows = [
        (e.seq, when(e.at), describe(e), e.stable, e.candidate, f"{e.share:.6g}" if e.candidate else None)
        for e in found.items
    ]
    shown = table(("seq", "at", "what", "stable", "canary", "share"), rows, whole=("seq", "at"))
    return Output(page, shown, *none_of(rows, "transitions"), *more(page.next_cursor))


@command(release_group, "live")
def release_live(
    work: Work,
    scene: Scene,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="Then; default: now.")] = None,
) -> Output:
    """Say which release is live, or was at a time."""
    from kaleidoscope.release import live_at
    from kaleidoscope.scenes import get_scene

    get_scene(work.session, scene)
    moment = moment_in("--at", at)
    live = live_at(work.session, scene, moment)
    if live is None:
        return Output({"scene": scene, "live": None}, "Nothing was live: no release had been started.")
    return Output({"scene": scene, "live": live}, sentence(f"{live}, since {when(live.at)} ({live.actor})"))


@command(release_group, "diff")
def release_diff(
    work: Work,
    scene: Scene,
    a: Annotated[int, typer.Argument(metavar="A", min=1, max=MOST, help="Number of a release.")],
    b: Annotated[int, typer.Argument(metavar="B", min=1, max=MOST, help="Number of another.")],
) -> Output:
    """Show what changes from one release to another, a line per change."""
    from kaleidoscope.release import diff, get_release, verify

    before, after = (verify(get_release(work.session, scene, number)) for number in (a, b))
    found = diff(before, after)
    return Output(found, *(found.lines() or ["They show the same."]))
