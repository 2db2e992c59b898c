"""Interventions and releases: what is live, and the way there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    Version,
    Work,
    command,
    listing,
    moment_in,
    more,
    none_of,
    pairs_in,
    percent,
    sentence,
    validated,
    when,
    words,
)
from kaleidoscope.terminal import fields, printable, table
from kaleidoscope.vocabulary import InterventionKind

if TYPE_CHECKING:
    from kaleidoscope.database import Session
    from kaleidoscope.interventions import InterventionSpec
    from kaleidoscope.release import Health, ReleasePlan
    from kaleidoscope.tables import LedgerEntry
    from kaleidoscope.views import InterventionView

intervention_group = typer.Typer(
    name="intervention", help="Business rules that pin or block variants.", no_args_is_help=True
)
release_group = typer.Typer(
    name="release", help="Releases: from approved variants to live traffic, and back.", no_args_is_help=True
)


InterventionId = Annotated[str, typer.Argument(metavar="ID", help="Lower-case letters, digits, - and _.")]


Variant = Annotated[str | None, typer.Option("--variant", help="One variant, by its id or how it begins.")]
WithMaterial = Annotated[str | None, typer.Option("--material", help="Every variant with this material.")]
WithTag = Annotated[str | None, typer.Option("--tag", metavar="DIMENSION=VALUE", help="Every variant with this tag.")]
Segment = Annotated[
    list[str] | None, typer.Option("--segment", metavar="FEATURE=VALUE", help="Only for these users; repeat it.")
]
Force = Annotated[bool, typer.Option("--force", help="Although it contradicts other rules.")]


@command(intervention_group, "add", write=True)
def intervention_add(
    work: Work,
    scene: Scene,
    intervention: InterventionId,
    kind: Annotated[InterventionKind, typer.Option("--kind", help="Show only these variants, or never these.")],
    variant: Variant = None,
    material: WithMaterial = None,
    tag: WithTag = None,
    segment: Segment = None,
    starts_at: Annotated[str | None, typer.Option("--from", metavar="TIME", help="From then on.")] = None,
    ends_at: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Until then.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="The higher one wins.")] = 0,
    note: Note = "",
    force: Force = False,
) -> Output:
    """Pin or block variants, for a segment and a time. It shows with the next release."""
    from kaleidoscope.interventions import InterventionSpec, add_intervention
    from kaleidoscope.views import InterventionView

    raw = {
        "kind": kind,
        "target": _target(work.session, scene, variant, material, tag),
        "segment": dict(pairs_in("--segment", segment or ())),
        "starts_at": moment_in("--from", starts_at),
        "ends_at": moment_in("--until", ends_at),
        "priority": priority,
        "note": note,
    }
    spec = validated("intervention", InterventionSpec, raw)
    found = _conflicts(work.session, scene, spec, None, force)
    view = InterventionView.model_validate(add_intervention(work.session, scene, intervention, spec))
    return Output(
        {**view.model_dump(mode="json"), "conflicts": found},
        *(conflict["message"] for conflict in found),
        f"Added {_rule_text(view)}. It shows with the next release.",
    )


@command(intervention_group, "change", write=True)
def intervention_change(
    work: Work,
    scene: Scene,
    intervention: InterventionId,
    kind: Annotated[
        InterventionKind | None, typer.Option("--kind", help="Show only these variants, or never these.")
    ] = None,
    variant: Variant = None,
    material: WithMaterial = None,
    tag: WithTag = None,
    segment: Segment = None,
    everybody: Annotated[bool, typer.Option("--everybody", help="For every user, instead of a segment.")] = False,
    starts_at: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="From then on; '' for always.")
    ] = None,
    ends_at: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Until then; '' for ever.")] = None,
    priority: Annotated[int | None, typer.Option("--priority", help="The higher one wins.")] = None,
    note: Annotated[str | None, typer.Option("--note", help="Why, for whoever reads it later.")] = None,
    force: Force = False,
    version: Version = None,
) -> Output:
    """Change what is given of a rule; the rest stays. It shows with the next release."""
    from kaleidoscope.interventions import InterventionSpec, change_intervention, get_intervention, spec_of
    from kaleidoscope.views import InterventionView

    if segment and everybody:
        raise InputError("--segment or --everybody: give one of them.")
    target = _target(work.session, scene, variant, material, tag)
    users = {} if everybody else dict(pairs_in("--segment", segment)) if segment else None
    given = {"kind": kind, "target": target or None, "segment": users, "priority": priority, "note": note}
    changes: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    for option, name, text in (("--from", "starts_at", starts_at), ("--until", "ends_at", ends_at)):
        if text is not None:
            changes[name] = moment_in(option, text or None)
    if not changes:
        raise InputError("say what to change: --kind, --tag, --segment, --until, or another option.")
    before = spec_of(get_intervention(work.session, scene, intervention))
    spec = validated("intervention", InterventionSpec, before.model_dump(exclude_none=True) | changes)
    found = _conflicts(work.session, scene, spec, intervention, force)
    changed = change_intervention(work.session, scene, intervention, spec, version=version)
    view = InterventionView.model_validate(changed)
    return Output(
        {**view.model_dump(mode="json"), "conflicts": found},
        *(conflict["message"] for conflict in found),
        f"Changed {_rule_text(view)}. It shows with the next release.",
    )


def _target(
    session: Session, scene: str, variant: str | None, material: str | None, tag: str | None
) -> dict[str, object]:
    """What the options say that a rule is about."""
    from kaleidoscope.review import get_variant

    target: dict[str, object] = {
        "variant": None if variant is None else get_variant(session, scene, variant).id,
        "material": material,
        "tag": None if tag is None else dict(pairs_in("--tag", [tag])),
    }
    return {what: name for what, name in target.items() if name is not None}


def _conflicts(
    session: Session, scene: str, spec: InterventionSpec, replaced: str | None, force: bool
) -> list[dict[str, Any]]:
    """What the rule contradicts, as plain data; raises ConflictError where there is something, unless forced."""
    from kaleidoscope.errors import ConflictError
    from kaleidoscope.interventions import conflicts
    from kaleidoscope.views import ConflictView

    found = [
        ConflictView.model_validate(c).model_dump(mode="json")
        for c in conflicts(session, scene, spec, ignoring=replaced)
    ]
    if found and not force:
        done = "added" if replaced is None else "changed"
        raise ConflictError(
            "\n".join(c["message"] for c in found) + f"\nNothing was {done}. With --force it is, as it stands.",
            details={"conflicts": found},
        )
    return found


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

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask first, which it does at a terminal.")]


def _share_option(bucket: str, what: str) -> Any:
    return typer.Option(f"--{bucket}", min=0.0, max=1.0, help=what)


def _checked(work: Work, scene: str, **_: object) -> Mapping[str, object]:
    from kaleidoscope.release import check_variants

    return {"checked": check_variants(work.session, scene)}


@command(release_group, "draft", write=True, first=_checked)
def release_draft(
    work: Work,
    scene: Scene,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            exists=True,
            dir_okay=False,
            help="Shares, policy, guardrails and stages (YAML). Default: as in the last release.",
        ),
    ] = None,
    random: Annotated[float | None, _share_option("random", "Share of traffic that gets a variant at random.")] = None,
    model: Annotated[float | None, _share_option("model", "Share of traffic that a model picks for.")] = None,
    control: Annotated[
        float | None, _share_option("control", "Share that gets the baseline. Default: the rest.")
    ] = None,
    model_version: Annotated[
        str | None,
        typer.Option("--model-version", help="Which model picks: champion, challenger, generic, or a version."),
    ] = None,
    without_random: Annotated[
        str | None, typer.Option("--without-random", metavar="REASON", help="Why nothing is shown at random.")
    ] = None,
    note: Note = "",
    *,
    checked: Any,
) -> Output:
    """Draft a release of what is approved: an immutable snapshot, live only once it is started."""
    from kaleidoscope.registry import with_versions
    from kaleidoscope.release import ReleasePlan, draft_release, release_state
    from kaleidoscope.views import ReleaseView
    from kaleidoscope.yaml_text import load_yaml

    shares = {"random": random, "model": model, "control": control}
    given = {name: share for name, share in shares.items() if share is not None}
    texts = {"model_version": model_version, "without_random": without_random}
    others = {name: text for name, text in texts.items() if text is not None}
    last = None
    if plan is not None and (given or others):
        raise InputError("--plan says everything; leave the other options out, or leave --plan out.")
    if plan is None:
        parsed, last = _plan_of(work.session, scene, given, others)
    else:
        parsed = validated(str(plan), ReleasePlan, load_yaml(plan, docs="docs/releases.md"))
    parsed = with_versions(work.settings, work.session, scene, parsed, keep_single=plan is not None)
    row = draft_release(work.session, scene, parsed, note, checked)
    view = ReleaseView.of(row, release_state(work.session, scene, row.number))
    count = len(row.content["variants"])
    plain = parsed.model_dump(mode="json")
    rails = "; ".join(f"{rail.metric} {rail}" for rail in parsed.guardrails)
    return Output(
        {**view.model_dump(mode="json"), "variants": count, "plan": plain, "plan_of": last},
        f"Drafted release {view.number} of {count:,} variants.",
        *([f"The rest is as in release {last}."] if last is not None else []),
        f"Buckets: {_buckets(plain['shares'])}.",
        f"Guardrails: {rails or 'none, so nothing but you stops it'}.",
        f"Stages: {', '.join(map(percent, parsed.stages))}.",
        f"Start it: `kaleidoscope release start {scene} {view.number}`",
    )


def _plan_of(
    session: Session, scene: str, shares: dict[str, float], others: Mapping[str, str]
) -> tuple[ReleasePlan, int | None]:
    """The plan that options give, the rest as in the scene's last release, and the number of that one.

    Shares replace all shares, and with them goes what only the old ones needed. Raises InputError where there is no
    release yet and no shares are given.
    """
    from kaleidoscope.release import ReleasePlan, list_releases, verify

    last = next(iter(list_releases(session, scene, limit=1).items), None)
    if last is None and not shares:
        raise InputError("say what the buckets get: --plan FILE, or --random 0.1 and such.")
    kept = {} if last is None else verify(last).model_dump(include=set(ReleasePlan.model_fields))
    if shares:
        shares.setdefault("control", max(0.0, 1 - sum(shares.values())))
        unneeded = {"without_random", "challenger"} | (set() if shares.get("model") else {"model_version"})
        kept = {name: value for name, value in kept.items() if name not in unneeded} | {"shares": shares}
    return validated("plan", ReleasePlan, {**kept, **others}), None if last is None else last.number


def _buckets(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{bucket} {percent(share)}" for bucket, share in shares.items() if share)


def _entry_output(work: Work, entry: LedgerEntry) -> Output:
    from kaleidoscope.release import describe, live_at
    from kaleidoscope.views import LedgerView

    view = LedgerView.of(entry)
    return Output(
        view,
        sentence(describe(entry)),
        sentence(f"Now {live_at(work.session, entry.scene_id)}"),
        f"This is entry {view.seq} of the ledger.",
    )


def _shown_first(what: str) -> Any:
    """For `command(first=…)`: at a terminal, show what is live and ask; then do it only if that is still so.

    Doing it twice, or two people at once, would go two steps.
    """

    def first(work: Work, scene: str, expected_seq: int | None, yes: bool, **_: object) -> Mapping[str, object]:
        from kaleidoscope.release import live_at

        live = live_at(work.session, scene)
        if live is None or expected_seq is not None or yes or not work.watched:
            return {}
        typer.echo(printable(f"Entry {live.seq}, {when(live.at)}, {live.actor}: {live}."), err=True)
        typer.confirm(what, abort=True, err=True)
        return {"expected_seq": live.seq}

    return first


@command(release_group, "start", write=True)
def release_start(work: Work, scene: Scene, number: ReleaseNumber, expected_seq: Expected = None) -> Output:
    """Put a draft live, as a canary at its first stage."""
    from kaleidoscope.release import start

    return _entry_output(work, start(work.session, scene, number, expected_seq=expected_seq))


@command(release_group, "advance", write=True, first=_shown_first("Move it to its next stage?"))
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
    yes: Yes = False,
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


@command(release_group, "rollback", write=True, first=_shown_first("Take it back?"))
def release_rollback(
    work: Work,
    scene: Scene,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever reads the ledger.")],
    to: Annotated[
        int | None, typer.Option("--to", min=1, max=MOST, help="A release that was live; default: the one before.")
    ] = None,
    expected_seq: Expected = None,
    yes: Yes = False,
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
    about = {
        "release": view.number,
        "state": words(view.state),
        "author": f"{view.author}, {when(view.created_at)}",
        "note": view.note,
        "content": view.content_hash,
        "variants": f"{len(held.variants):,}, made of {len(held.materials):,} materials",
        "baseline": held.baseline,
        "buckets": _buckets(summary["shares"]),
        "without random": held.without_random,
        "model": held.model_version,
        "policy": f"{words(held.policy.kind)}, epsilon {held.policy.epsilon:g}",
        "challenger": None if held.challenger is None else held.challenger.model_version,
        "frequency": None if held.frequency is None else f"a variant {held.frequency}",
        "guardrails": "\n".join(f"{rail.metric} {rail}" for rail in held.guardrails),
        "stages": ", ".join(map(percent, held.stages)),
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
    page = page_view(found, LedgerView.of)
    rows = [
        (e.seq, when(e.at), describe(e), _part(v.stable, v.stable_share), _part(v.candidate, v.share))
        for e, v in zip(found.items, page.items, strict=True)
    ]
    shown = table(("seq", "at", "what", "stable", "canary"), rows, whole=("seq", "at", "stable", "canary"))
    return Output(page, shown, *none_of(rows, "transitions"), *more(page.next_cursor))


def _part(number: int | None, share: float) -> str | None:
    return None if number is None else f"{number} ({percent(share)})"


@command(release_group, "live")
def release_live(
    work: Work,
    scene: Scene,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="Then; default: now.")] = None,
) -> Output:
    """Say which release is live, or was at a time."""
    from kaleidoscope.release import live_at
    from kaleidoscope.scenes import get_scene
    from kaleidoscope.views import LiveView

    get_scene(work.session, scene)
    moment = moment_in("--at", at)
    live = live_at(work.session, scene, moment)
    if live is None:
        return Output({"scene": scene, "live": None}, "Nothing was live: no release had been started.")
    return Output(
        {"scene": scene, "live": LiveView.of(live)},
        sentence(f"{live}, since {when(live.at)} ({live.actor})"),
        f"This is entry {live.seq} of the ledger.",
    )


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
