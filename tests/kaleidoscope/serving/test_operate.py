"""Every endpoint: anonymous, wrong role, wrong business, right role; and the whole way over HTTP alone."""

from __future__ import annotations

import io
import re
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kaleidoscope.combiner import variant_id
from kaleidoscope.database import Database
from kaleidoscope.errors import UnavailableError
from kaleidoscope.interventions import InterventionSpec, add_intervention
from kaleidoscope.portraits import store_portrait
from kaleidoscope.release import ReleasePlan, draft_release, start
from kaleidoscope.review import make_variants, move_variants
from kaleidoscope.serving import operate
from kaleidoscope.serving.operate import Desk
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.portrait_cells import cells, run
from tests.kaleidoscope.serving.conftest import Client
from tests.kaleidoscope.stock import spec, stocked

BASE = "/api/v1/businesses/acme"
SCENE = f"{BASE}/scenes/welcome"
PLAN = {"shares": {"control": 0.5, "random": 0.5}}
SPEC = spec().model_dump(mode="json")
COPY = {"kind": "copy", "title": "Hello"}
BLOCK = {"kind": "block", "target": {"material": "c1"}}
BASELINE = variant_id({"copy": "c2", "image": "i1", "layout": "l1"})


def picture() -> bytes:
    data = io.BytesIO()
    PIL.Image.new("RGB", (20, 10), "red").save(data, "PNG")
    return data.getvalue()


@dataclass(frozen=True)
class Operation:
    """A request that succeeds for whoever has the role; role None: for everybody of the business."""

    method: str
    route: str  # as in the OpenAPI document
    path: str
    role: Role | None = None
    status: int = 200
    body: dict[str, Any] | None = None
    files: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.route}"

    def send(self, client: TestClient) -> Any:
        body = self.body
        if body and "health" in body:
            body = {"health": {**body["health"], "observed_at": datetime.now(UTC).isoformat()}}
        return client.request(self.method, self.path, json=body, files=self.files or None)


B, S = "/api/v1/businesses/{business}", "/api/v1/businesses/{business}/scenes/{scene}"
EDITOR, REVIEWER, PUBLISHER, ADMIN = Role.EDITOR, Role.REVIEWER, Role.PUBLISHER, Role.ADMIN


def operations() -> list[Operation]:
    healthy = {"health": {"ok": True}}
    variant = f"{SCENE}/variants/{BASELINE}"
    move = {"ids": ["c1"], "reason": "x"}
    return [
        Operation("GET", "/api/v1/businesses", "/api/v1/businesses"),
        Operation("GET", B, BASE),
        Operation("PATCH", B, BASE, ADMIN, body={"version": 1, "name": "Acme & Co"}),
        Operation("GET", f"{B}/audit", f"{BASE}/audit"),
        Operation("GET", f"{B}/tokens", f"{BASE}/tokens", ADMIN),
        Operation("POST", f"{B}/tokens", f"{BASE}/tokens", ADMIN, 201, {"user": "x", "roles": ["viewer"]}),
        Operation("DELETE", f"{B}/tokens/{{token}}", f"{BASE}/tokens/TOKEN", ADMIN),
        Operation("GET", f"{B}/taxonomy", f"{BASE}/taxonomy"),
        Operation("GET", f"{B}/taxonomy/versions", f"{BASE}/taxonomy/versions"),
        Operation("GET", f"{B}/taxonomy/mapping", f"{BASE}/taxonomy/mapping?old=1&new=1"),
        Operation(
            "POST", f"{B}/taxonomy/versions", f"{BASE}/taxonomy/versions", EDITOR, 201,
            {"changes": [{"op": "retire", "dimension": "motion"}]},
        ),
        Operation("GET", f"{B}/materials", f"{BASE}/materials"),
        Operation("POST", f"{B}/materials", f"{BASE}/materials", EDITOR, 201, {"id": "new", "content": COPY}),
        Operation("GET", f"{B}/materials/{{material}}", f"{BASE}/materials/c1"),
        Operation(
            "PATCH", f"{B}/materials/{{material}}", f"{BASE}/materials/c1", EDITOR, body={"version": 3, "content": COPY}
        ),
        Operation("POST", f"{B}/materials/review/{{move}}", f"{BASE}/materials/review/reject", REVIEWER, body=move),
        Operation(
            "POST", f"{B}/materials/import", f"{BASE}/materials/import", EDITOR,
            files={"table": ("t.csv", b"id,kind,title\nm1,copy,Hi\n", "text/csv")},
        ),
        Operation(
            "POST", f"{B}/images", f"{BASE}/images", EDITOR, 201, files={"file": ("x.png", picture(), "image/png")}
        ),
        Operation("GET", f"{B}/images/{{material}}", f"{BASE}/images/real"),
        Operation("GET", f"{B}/scenes", f"{BASE}/scenes"),
        Operation("POST", f"{B}/scenes", f"{BASE}/scenes", EDITOR, 201, {"id": "second", "spec": SPEC}),
        Operation("GET", S, SCENE),
        Operation("PUT", S, SCENE, EDITOR, body={"version": 1, "spec": {**SPEC, "name": "Other"}}),
        Operation("POST", f"{S}/diff", f"{SCENE}/diff", body=SPEC),
        Operation("GET", f"{S}/combinations", f"{SCENE}/combinations"),
        Operation("GET", f"{S}/plan", f"{SCENE}/plan"),
        Operation("POST", f"{S}/variants", f"{SCENE}/variants", EDITOR),
        Operation("GET", f"{S}/variants", f"{SCENE}/variants?where=copy:c1&state=approved"),
        Operation("GET", f"{S}/variants/{{variant}}", variant),
        Operation(
            "POST", f"{S}/variants/review/{{move}}", f"{SCENE}/variants/review/reject", REVIEWER, body={"reason": "x"}
        ),
        Operation("GET", f"{S}/interventions", f"{SCENE}/interventions"),
        Operation(
            "POST", f"{S}/interventions", f"{SCENE}/interventions", EDITOR, 201, {"id": "another", "spec": BLOCK}
        ),
        Operation("POST", f"{S}/interventions/conflicts", f"{SCENE}/interventions/conflicts", body=BLOCK),
        Operation("GET", f"{S}/interventions/{{intervention}}", f"{SCENE}/interventions/rule"),
        Operation(
            "PUT", f"{S}/interventions/{{intervention}}", f"{SCENE}/interventions/rule", EDITOR,
            body={"version": 1, "spec": {**BLOCK, "priority": 3}},
        ),
        Operation("DELETE", f"{S}/interventions/{{intervention}}", f"{SCENE}/interventions/rule", EDITOR),
        Operation("GET", f"{S}/releases", f"{SCENE}/releases"),
        Operation("POST", f"{S}/releases", f"{SCENE}/releases", PUBLISHER, 201, {"plan": PLAN}),
        Operation("GET", f"{S}/releases/{{number}}", f"{SCENE}/releases/1"),
        Operation("GET", f"{S}/releases/{{number}}/diff/{{other}}", f"{SCENE}/releases/1/diff/2"),
        Operation("POST", f"{S}/rollout/advance", f"{SCENE}/rollout/advance", PUBLISHER, body=healthy),
        Operation("POST", f"{S}/rollout/pause", f"{SCENE}/rollout/pause", PUBLISHER, body={"reason": "look"}),
        Operation(
            "POST", f"{S}/rollout/rollback", f"{SCENE}/rollout/rollback", PUBLISHER,
            body={"reason": "bad", "expected_seq": 1},
        ),
        Operation("GET", f"{S}/ledger", f"{SCENE}/ledger"),
        Operation("GET", f"{S}/live", f"{SCENE}/live"),
        Operation("GET", f"{S}/experiment", f"{SCENE}/experiment"),
        Operation("GET", f"{S}/portraits", f"{SCENE}/portraits"),
        Operation("GET", f"{S}/portrait", f"{SCENE}/portrait?segment=age=[30, 40)&language=zh"),
        Operation("GET", f"{S}/portrait/design", f"{SCENE}/portrait/design?attribute=age=30"),
    ]  # fmt: skip


OPERATIONS = operations()
# Those that need another state than the fixture's are tested by `test_the_whole_way_over_http`.
ELSEWHERE = {
    ("POST", "/api/v1/businesses"),
    ("POST", f"{S}/releases/{{number}}/start"),
    ("POST", f"{S}/rollout/resume"),
}


@pytest.fixture
def busy(sqlite: Database, app: FastAPI) -> Database:
    """The scene with approved variants, a rule, release 1 in canary, 2 as a draft, a picture and a portrait."""
    from kaleidoscope.images import store_image
    from kaleidoscope.materials import add_material

    stocked(sqlite, approved=True, traffic={"exposures_per_day": 1e5, "click_rate": 0.03})
    with sqlite.transaction(person("ann")) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit")
        image = store_image(app.state.files, "acme", picture())
        add_material(session, "real", image, [], files_dir=app.state.files)
    with sqlite.transaction(person("rex")) as session:
        move_variants(session, "welcome", "approve")
        rule = InterventionSpec.model_validate(BLOCK)
        add_intervention(session, "welcome", "rule", rule)
        draft_release(session, "welcome", ReleasePlan.model_validate(PLAN))
        draft_release(session, "welcome", ReleasePlan.model_validate(PLAN))
        start(session, "welcome", 1)
        store_portrait(session, "welcome", run(), cells())
    return sqlite


def test_every_operation_of_the_document_is_in_the_table(app: FastAPI) -> None:
    paths = {path: methods for path, methods in app.openapi()["paths"].items() if path.startswith("/api/")}
    documented = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert documented == {(o.method, o.route) for o in OPERATIONS} | ELSEWHERE


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_who_may_do_what(operation: Operation, busy: Database, client_of: Client) -> None:
    anonymous = operation.send(client_of())
    assert anonymous.status_code == 401, anonymous.text
    if operation.route != "/api/v1/businesses":
        foreigner = operation.send(client_of("eve", business="rival"))
        assert foreigner.status_code == 404, foreigner.text
    if operation.role is not None:
        others = set(Role) - {operation.role, Role.ADMIN}
        if operation.route == f"{S}/releases":
            others -= {Role.EDITOR}  # either may draft
        refused = operation.send(client_of("kim", *others))
        assert refused.status_code == 403, refused.text
    right = client_of("pat", operation.role or Role.VIEWER)
    if "TOKEN" in operation.path:
        mine = right.get(f"{BASE}/tokens").json()[0]["id"]
        operation = Operation("DELETE", operation.route, operation.path.replace("TOKEN", mine), ADMIN)
    allowed = operation.send(right)
    assert allowed.status_code == operation.status, allowed.text


@pytest.mark.parametrize("path", ["releases/2/start", "rollout/resume"])
def test_only_publishers_start_and_resume(path: str, busy: Database, client_of: Client) -> None:
    def status(client: TestClient) -> int:
        return int(client.post(f"{SCENE}/{path}", json={}).status_code)

    assert status(client_of()) == 401
    assert status(client_of("eve", business="rival")) == 404
    assert status(client_of("kim", *set(Role) - {Role.PUBLISHER, Role.ADMIN})) == 403
    assert status(client_of("pat", Role.PUBLISHER)) == 409  # release 1 is in canary, and not paused


def test_a_rollback_sent_twice_is_made_once(busy: Database, client_of: Client) -> None:
    pat = client_of("pat", Role.PUBLISHER)
    seen = {"reason": "bad", "expected_seq": pat.get(f"{SCENE}/ledger").json()["items"][0]["seq"]}
    assert pat.post(f"{SCENE}/rollout/rollback", json=seen).status_code == 200
    assert pat.post(f"{SCENE}/rollout/rollback", json=seen).status_code == 409
    assert pat.post(f"{SCENE}/rollout/rollback", json={"reason": "bad"}).status_code == 400


def test_only_the_installation_founds_businesses(client_of: Client) -> None:
    body = {"id": "third", "name": "Third"}
    assert client_of().post("/api/v1/businesses", json=body).status_code == 401
    assert client_of("ann").post("/api/v1/businesses", json={**body, "id": "acme"}).status_code == 403
    refused = client_of("ann").post("/api/v1/businesses", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    root = client_of("root", business=None)
    assert root.post("/api/v1/businesses", json=body).status_code == 201
    assert root.post("/api/v1/businesses", json=body).status_code == 409
    assert {b["id"] for b in root.get("/api/v1/businesses").json()["items"]} == {"acme", "rival", "third"}
    assert {b["id"] for b in client_of("ann").get("/api/v1/businesses").json()["items"]} == {"acme"}


def test_the_whole_way_over_http(client_of: Client) -> None:
    root = client_of("root", business=None)
    assert root.post("/api/v1/businesses", json={"id": "wealth", "name": "Wealth"}).status_code == 201
    base = "/api/v1/businesses/wealth"
    ann = client_of("ann", Role.EDITOR, business="wealth")
    rex = client_of("rex", Role.REVIEWER, business="wealth")
    pia = client_of("pia", Role.PUBLISHER, business="wealth")

    def ok(response: Any, status: int = 200) -> Any:
        assert response.status_code == status, response.text
        return response.json()

    image = ok(ann.post(f"{base}/images", files={"file": ("a.svg", picture(), "image/svg+xml")}), 201)
    assert image["media_type"] == "image/png"
    for id, content in {
        "c1": {"kind": "copy", "title": "One"},
        "c2": {"kind": "copy", "title": "Two"},
        "i1": image,
    }.items():
        ok(ann.post(f"{base}/materials", json={"id": id, "content": content}), 201)
    shown = ann.get(f"{base}/images/i1")
    assert shown.headers["content-type"] == "image/png"
    assert PIL.Image.open(io.BytesIO(shown.content)).size == (20, 10)
    assert ann.get(f"{base}/images/i1", headers={"If-None-Match": shown.headers["ETag"]}).status_code == 304
    ids = {"ids": ["c1", "c2", "i1"]}
    assert ok(ann.post(f"{base}/materials/review/submit", json=ids))["moved"] == 3
    assert ok(rex.post(f"{base}/materials/review/approve", json=ids))["moved"] == 3
    scene = {
        "name": "Home",
        "slots": [
            {"name": "copy", "kind": "copy", "materials": ["c1", "c2"]},
            {"name": "image", "kind": "image", "materials": ["i1"]},
        ],
        "baseline": {"copy": "c1", "image": "i1"},
    }
    ok(ann.post(f"{base}/scenes", json={"id": "home", "spec": scene}), 201)
    home = f"{base}/scenes/home"
    assert ok(ann.get(f"{home}/combinations"))["legal"] == 2
    assert ok(ann.post(f"{home}/variants"))["created"] == 2
    ok(ann.post(f"{home}/variants/review/submit", json={}))
    assert ok(rex.post(f"{home}/variants/review/approve", json={"states": ["in_review"]}))["moved"] == 2
    drafted = ok(pia.post(f"{home}/releases", json={"plan": PLAN}), 201)
    assert (drafted["number"], drafted["state"]) == (1, "draft")
    assert ok(pia.get(f"{home}/live")) is None
    first = ok(pia.post(f"{home}/releases/1/start", json={}))
    assert (first["candidate"], first["share"], first["stable_share"]) == (1, 0.01, 0)
    ok(pia.post(f"{home}/rollout/pause", json={"reason": "lunch"}))
    assert pia.post(f"{home}/rollout/resume", json={"expected_seq": 1}).status_code == 409
    ok(pia.post(f"{home}/rollout/resume", json={"expected_seq": 2}))
    for _ in range(4):
        health = {"ok": True, "observed_at": datetime.now(UTC).isoformat()}
        ok(pia.post(f"{home}/rollout/advance", json={"health": health}))
    live = ok(pia.get(f"{home}/live"))
    assert (live["stable"], live["candidate"]) == (1, None)
    assert (live["share"], live["stable_share"]) == (0, 1)
    retired = ok(ann.post(f"{base}/materials/review/retire", json={"ids": ["c2"]}))
    assert retired["moved"] == 1
    assert "release 1" in retired["notes"][0]
    assert [e["action"] for e in ok(pia.get(f"{home}/ledger"))["items"]][-1] == "start"
    document = ok(pia.get(f"{home}/releases/1"))
    assert document["release"]["state"] == "full"
    assert len(document["content"]["variants"]) == 2


def test_only_admins_see_what_became_of_tokens(client_of: Client, sqlite: Database) -> None:
    stocked(sqlite)
    root, kim = client_of("root"), client_of("kim", *set(Role) - {Role.ADMIN})

    def entities(client: TestClient, query: str = "") -> list[str]:
        """Of every page: one may be shorter, none ends the list too early."""
        found, cursor = [], ""
        while cursor is not None:
            page = client.get(f"{BASE}/audit?limit=2{query}{cursor and '&cursor=' + cursor}").json()
            found += [entry["entity"] for entry in page["items"]]
            cursor = page["next_cursor"]
        return found

    assert "api_tokens" in entities(root)
    assert entities(kim) == [entity for entity in entities(root) if entity != "api_tokens"]
    assert set(entities(root, "&entity=api_tokens")) == {"api_tokens"}
    assert kim.get(f"{BASE}/audit?entity=api_tokens").status_code == 403


def test_a_new_vocabulary_says_what_to_look_at(busy: Database, client_of: Client) -> None:
    changes = [{"op": "rename", "dimension": "benefit", "value": "coupon", "id": "voucher"}]
    rule = {"kind": "block", "target": {"tag": {"benefit": "coupon"}}}
    ann = client_of("ann")
    assert ann.post(f"{SCENE}/interventions", json={"id": "coupons", "spec": rule}).status_code == 201
    made = ann.post(f"{BASE}/taxonomy/versions", json={"changes": changes})
    assert made.status_code == 201, made.text
    assert made.json()["mapping"] == {"benefit=coupon": ["benefit=voucher"]}
    named = {r["intervention"]: r["becomes"] for r in made.json()["rules"]}
    assert named["coupons"] == {"benefit=coupon": "becomes benefit=voucher"}


def test_both_faces_show_a_plan_alike(busy: Database, client_of: Client) -> None:
    from kaleidoscope.review import plan_learning
    from kaleidoscope.views import PlanView

    with busy.transaction(person("ann"), write=False) as session:
        shown = PlanView.of(plan_learning(session, "welcome")).model_dump(mode="json")
    answered = client_of("ann").get(f"{SCENE}/plan").json()
    assert answered == shown
    assert [kind["never"] for kind in answered["kinds"]] == [k["effects"] - k["learnable"] for k in answered["kinds"]]


def test_a_bulk_import_reports_every_row_and_stores_all_or_nothing(
    client_of: Client, sqlite: Database, tmp_path: Path
) -> None:
    stocked(sqlite)
    ann = client_of("ann")
    table = b"id,kind,title,file\nn1,copy,Hi,\nn2,image,,gone.png\nn3,image,,x.png\n"
    files = [("table", ("t.csv", table, "text/csv")), ("pictures", ("x.png", picture(), "image/png"))]
    report = ann.post(f"{BASE}/materials/import", files=files).json()
    assert not report["applied"]
    assert [row["outcome"] for row in report["rows"]] == ["held_back", "failed", "held_back"]
    assert ann.get(f"{BASE}/materials/n1").status_code == 404
    partial = ann.post(f"{BASE}/materials/import", files=files, data={"partial": "true"}).json()
    assert [row["outcome"] for row in partial["rows"]] == ["created", "failed", "created"]
    assert ann.get(f"{BASE}/materials/n3").status_code == 200
    wrong = [("table", ("t.csv", b"id,kind,title\nBAD ID,copy,x\n", "text/csv"))]
    nothing = ann.post(f"{BASE}/materials/import", files=wrong, data={"partial": "true"}).json()
    assert (nothing["applied"], [row["outcome"] for row in nothing["rows"]]) == (False, ["failed"])


@pytest.mark.parametrize("name", ["../x.png", "a\0b.png", "a\nb.png", ".."])
def test_a_picture_whose_name_cannot_be_a_files_is_refused(client_of: Client, sqlite: Database, name: str) -> None:
    stocked(sqlite)
    part = 'Content-Disposition: form-data; name="{}"; filename="{}"\r\n\r\n'
    form = f"--X\r\n{part.format('table', 't.csv')}id,kind,title\nn1,copy,Hi\n\r\n"
    form += f"--X\r\n{part.format('pictures', name)}x\r\n--X--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=X"}
    answer = client_of("ann").post(f"{BASE}/materials/import", content=form.encode(), headers=headers)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("data", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(client_of: Client, data: bytes) -> None:
    response = client_of("ann").post(f"{BASE}/images", files={"file": ("x.png", data, "image/png")})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_every_operation_is_documented(app: FastAPI) -> None:
    page = (Path(__file__).parents[3] / "docs" / "rest-api.md").read_text(encoding="utf-8")
    written = set(re.findall(r"(GET|POST|PUT|PATCH|DELETE) `([^`]+)`", page))
    short = {(o[0], o[1].removeprefix("/api/v1").replace("{s}", "{b}/scenes/{scene}")) for o in written}
    documented = {(method, path.replace("{b}", "/businesses/{business}")) for method, path in short}
    there = {
        (method.upper(), path.removeprefix("/api/v1"))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    assert documented == there


def test_remarks_are_counted_and_the_first_are_shown(
    client_of: Client, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    stocked(sqlite)
    change = {"version": 1, "content": {"kind": "copy", "title": "Extraordinarilylongwords" * 4}}
    ann = client_of("ann")
    assert ann.patch(f"{BASE}/materials/c1", json=change).status_code == 200
    found = ann.get(f"{SCENE}/combinations").json()
    assert found["remarks_total"] == len(found["remarks"]) == 2
    monkeypatch.setattr(operate, "MAX_REMARKS", 1)
    assert ann.get(f"{SCENE}/combinations").json() == {**found, "remarks": found["remarks"][:1]}


# ── who waits for whom ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_business_works_on_one_question_at_once_and_others_go_on() -> None:
    desk = Desk(seats=2, waiting=4, wait_s=0.01)
    with desk.take("acme"):
        with pytest.raises(UnavailableError, match="another question of yours"), desk.take("acme"):
            pass
        with desk.take("rival"), pytest.raises(UnavailableError, match="questions of others"), desk.take("third"):
            pass
        with desk.take("third"):
            pass
    with desk.take("acme"):
        pass


def test_who_waits_gets_the_seat_that_becomes_free_and_who_comes_after_is_refused_at_once() -> None:
    desk, waited, asked = Desk(seats=1, waiting=1, wait_s=60), threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        with desk.take("rival"):
            waited.set()

    thread = threading.Thread(target=wait)
    with desk.take("acme"):
        thread.start()
        asked.wait()
        while not desk._queue:
            pass
        for business in ("acme", "rival", "third"):  # at once: it would be a minute otherwise
            with pytest.raises(UnavailableError), desk.take(business):
                pass
        assert not waited.is_set()
    assert waited.wait(60)
    thread.join()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "combinations", None),
        ("GET", "plan", None),
        ("GET", "experiment", None),
        ("POST", "variants", None),
        ("POST", "releases", {"plan": PLAN}),
    ],
)
def test_questions_that_take_long_are_refused_while_another_is_worked_on(
    busy: Database, client_of: Client, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: Any
) -> None:
    desk = Desk(wait_s=0.01)
    monkeypatch.setattr(operate, "_desk", desk)
    ann, key = client_of("ann"), {"Idempotency-Key": "once"} if body else {}
    first = ann.request(method, f"{SCENE}/{path}", json=body, headers=key)
    assert first.status_code < 300, first.text
    with ExitStack() as held:
        held.enter_context(desk.take("acme"))
        answer = ann.request(method, f"{SCENE}/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        if body:  # what is only answered again needs no work
            again = ann.request(method, f"{SCENE}/{path}", json=body, headers=key)
            assert (again.status_code, again.json()) == (201, first.json())
    assert ann.request(method, f"{SCENE}/{path}", json=body).status_code < 300


def test_the_trail_of_a_table_that_leaves_none_is_a_bad_request(client_of: Client) -> None:
    answer = client_of("ann").get(f"{BASE}/audit?entity=nope")
    assert answer.status_code == 400 and "materials" in answer.json()["error"]["message"]
