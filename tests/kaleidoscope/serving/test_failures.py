"""Failure runs: a server that is killed, a database that goes away, a damaged model, a feature store that hangs."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
import torch
from fastapi import FastAPI

from kaleidoscope import feature_store
from kaleidoscope.access import operator
from kaleidoscope.buckets import assign
from kaleidoscope.database import Database, open_database
from kaleidoscope.events import EVENTS, read_exposures, shown_in
from kaleidoscope.feature_store import PAUSED, READERS, TOO_SLOW, OnlineFeatures
from kaleidoscope.ranker import SIGNATURE, USER_GRAPH, VARIANT_GRAPH
from kaleidoscope.registry import fetch
from kaleidoscope.release import ReleasePlan, Shares, get_release, verify
from kaleidoscope.review import make_variants, move_variants
from kaleidoscope.serving.decider import Asked
from kaleidoscope.serving.live import AGAIN_S, models_in
from kaleidoscope.settings import Settings
from kaleidoscope.simulation import World
from kaleidoscope.tokens import create_token
from kaleidoscope.vocabulary import Bucket, Role
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import fit_tables
from models.train import CtrModel
from tests.kaleidoscope.conftest import add_businesses, drop, fresh_url
from tests.kaleidoscope.people import person
from tests.kaleidoscope.serving.conftest import SHARES, Client, release_next
from tests.kaleidoscope.stock import stocked
from tests.models.worlds import SPEC, encoder_of, log_of

ROOT = Path(__file__).parents[3]
FLAG = "/ofrep/v1/evaluate/flags/welcome"
VERSION = "welcome-20261127T054012Z-3f9a1c"
RANDOM = ReleasePlan(shares=Shares(random=1.0), stages=(1.0,))


def until(what: str, there: Callable[[], bool], limit_s: float = 120.0) -> None:
    """Wait until it is so; fail far beyond the time that a busy machine takes."""
    end = time.monotonic() + limit_s
    while not there():
        if time.monotonic() > end:
            pytest.fail(f"waited in vain for {what}")
        time.sleep(0.05)


def stock(database: Database) -> str:
    """Put release 1 of scene `welcome` live, and return a token to ask for decisions."""
    stocked(database, approved=True)
    with database.transaction(person("ann")) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit")
    with database.transaction(person("rex")) as session:
        move_variants(session, "welcome", "approve")
    release_next(database, RANDOM)
    with database.transaction(operator("root", "acme")) as session:
        return create_token(session, "page", frozenset({Role.CLIENT}))[1]


class Server:
    """`kaleidoscope serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, token: str) -> None:
        self.process, self.port, self.token = process, port, token

    def call(self, path: str, body: object = None) -> Any:
        """The answer, which has to be 200; raises OSError or HTTPException where the server is gone."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json", "User-Agent": "Mozilla"}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            method, sent = ("GET", None) if body is None else ("POST", json.dumps(body))
            connection.request(method, path, sent, headers)
            answer = connection.getresponse()
            text = answer.read()
        assert answer.status == 200, (path, answer.status, text)
        return json.loads(text)

    def decide(self, unit: str) -> dict[str, Any]:
        """The metadata of a decision."""
        metadata: dict[str, Any] = self.call(FLAG, {"context": {"targetingKey": unit}})["metadata"]
        return metadata

    def ready(self) -> bool:
        """Whether it says so."""
        assert self.process.poll() is None, "the server ended by itself"
        with suppress(OSError, http.client.HTTPException, AssertionError):
            return bool(self.call("/readyz")["status"] == "ok")
        return False


@contextmanager
def serving(folder: Path, token: str, **settings: object) -> Iterator[Server]:
    """A server in a folder, with these settings and no others; it is killed in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KALEIDOSCOPE_")}
    environment |= {f"KALEIDOSCOPE_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "kaleidoscope", "serve", "--port", str(port)]
    with (
        (folder / "said").open("ab") as said,
        subprocess.Popen(
            command, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=said, stderr=said
        ) as process,
    ):
        try:
            server = Server(process, port, token)
            until("the server", server.ready)
            yield server
        finally:
            process.kill()


# ── kill -9 ─────────────────────────────────────────────────────────────────────────────────────────────────────────

KILLS = 2
PAGES = 4  # that ask and send at the same time
Batch = list[dict[str, Any]]


class Load:
    """Pages that ask for decisions and send what became of them, until the server is gone."""

    def __init__(self) -> None:
        self.acknowledged: list[Batch] = []
        self.unanswered: list[Batch] = []
        self.decisions: dict[str, str] = {}  # by token

    def page(self, server: Server, name: str) -> None:
        """Visits of one page, one after the other, each of users who are new."""
        for n in itertools.count():
            batch: Batch = []
            try:
                for unit in (f"{name}-{n}-{i}" for i in range(3)):
                    shown = server.decide(unit)
                    self.decisions[shown["token"]] = shown["decisionId"]
                    batch += [
                        {"event_id": f"{unit}-seen", "type": "exposure", "token": shown["token"]},
                        {"event_id": f"{unit}-bought", "type": "conversion", "token": shown["token"], "value": 1.0},
                    ]
                results = server.call("/v1/events", {"events": batch})["results"]
            except (OSError, http.client.HTTPException):
                if len(batch) == 6:
                    self.unanswered.append(batch)
                return
            assert [result["status"] for result in results] == ["accepted"] * 6
            self.acknowledged.append(batch)

    def repeat(self, server: Server) -> None:
        """Send everything again, as clients do that do not know whether it arrived."""
        for batch in self.acknowledged:
            results = server.call("/v1/events", {"events": batch})["results"]
            assert {result["status"] for result in results} == {"duplicate"}
        for batch in self.unanswered:
            results = server.call("/v1/events", {"events": batch})["results"]
            assert len({result["status"] for result in results}) == 1, "half of a batch was kept"
            assert results[0]["status"] in ("accepted", "duplicate")
            self.acknowledged.append(batch)
        self.unanswered.clear()

    def check(self, log: Database) -> None:
        """Every event that was acknowledged is there, and none that nobody sent."""
        with log.bulk(write=False) as connection:
            there = list(connection.scalars(sa.select(EVENTS.c.event_id)))
        known = {event["event_id"] for batch in self.acknowledged for event in batch}
        sent = known | {event["event_id"] for batch in self.unanswered for event in batch}
        assert len(there) == len(set(there))
        assert known <= set(there) <= sent


def kill_under(load: Load, server: Server, name: str, *, more: int, delay_s: float) -> None:
    """Kill the server while pages ask and send, some time after so many more batches were acknowledged."""
    enough = len(load.acknowledged) + more
    with ThreadPoolExecutor(PAGES) as pool, ExitStack() as killed:
        killed.callback(server.process.kill)  # or pages would go on for ever, whatever fails here
        pages = [pool.submit(load.page, server, f"{name}-{n}") for n in range(PAGES)]
        until("events", lambda: len(load.acknowledged) >= enough or any(page.done() for page in pages))
        time.sleep(delay_s)
        killed.close()
        for page in pages:
            page.result()
    server.process.wait()


def test_a_server_that_is_killed_under_load_has_kept_every_acknowledged_event_once(
    sqlite: Database, tmp_path: Path
) -> None:
    token = stock(sqlite)
    where = {
        "database_url": sqlite.url.render_as_string(hide_password=False),
        "log_url": f"sqlite:///{tmp_path}/log.db",
        "log_dir": tmp_path / "log",
        "keys": "k1:0123456789abcdef0123",
    }
    load, draw = Load(), random.Random(5)
    for kill in range(KILLS):
        with serving(tmp_path, token, **where) as server:
            load.repeat(server)
            before = len(load.acknowledged)
            kill_under(load, server, f"page-{kill}", more=15, delay_s=draw.uniform(0, 0.1))
        assert len(load.acknowledged) >= before + 15
        with Database(str(where["log_url"])) as log:
            load.check(log)
    with serving(tmp_path, token, **where) as server, Database(str(where["log_url"])) as log:
        load.repeat(server)
        load.check(log)

        def describe(scene: str, number: int) -> Any:
            with sqlite.transaction(person("pat"), write=False) as session:
                return shown_in(verify(get_release(session, scene, number)))

        rows = read_exposures(log, tmp_path / "log", business="acme", describe=describe).to_pylist()
    seen = {load.decisions[event["token"]] for batch in load.acknowledged for event in batch}
    assert len(rows) == len(seen) and {row["decision_id"] for row in rows} == seen
    assert {row["conversion_value"] for row in rows} == {1.0}, "a conversion is lost, or counted twice"


# ── a database that goes away ───────────────────────────────────────────────────────────────────────────────────────


class Wire:
    """A port that leads to a database's socket, and can be cut: connections are refused and reset, or silent."""

    def __init__(self, socket_file: str) -> None:
        self.socket_file = socket_file
        self.flows = threading.Event()
        self.flows.set()
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._listen()

    def _listen(self) -> None:
        self._accepting = self._start(self._accept, self._listener)

    def _start(self, target: Callable[..., None], *given: socket.socket) -> threading.Thread:
        thread = threading.Thread(target=target, args=given, daemon=True)
        thread.start()
        return thread

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                database = socket.socket(socket.AF_UNIX)
                self._ends += [client, database]
                database.connect(self.socket_file)
                self._threads.append(self._start(self._pump, client, database))
                self._threads.append(self._start(self._pump, database, client))

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                self.flows.wait()
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def cut(self, how: str) -> None:
        """Cut it: "refused" is a database that was stopped, "silent" one whose network is gone."""
        if how == "silent":
            self.flows.clear()
        else:
            self._close()

    def mend(self) -> None:
        """Lead to the database again."""
        if not self.flows.is_set():
            self.flows.set()
            return
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._listen()

    def _close(self) -> None:
        # A thread in `accept` or `recv` wakes by a shutdown, not by a close. First the one that may still add ends.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(60)
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
        for end in (self._listener, *self._ends):
            end.close()
        self._ends.clear()
        self._threads.clear()

    def close(self) -> None:
        """End it."""
        self.flows.set()
        self._close()


@pytest.mark.parametrize("cut_s", [6.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_decisions_go_on_while_the_database_is_stopped_and_the_next_release_is_served_afterwards(
    cut_s: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        database = stack.enter_context(open_database(fresh_url("postgresql", request, tmp_path)))
        stack.callback(drop, database.url)
        stack.callback(database.close)
        add_businesses(database)
        token = stock(database)
        wire = stack.enter_context(closing(Wire(f"{database.url.query['host']}/.s.PGSQL.5432")))
        server = stack.enter_context(
            serving(
                tmp_path,
                token,
                database_url=database.url.set(host="127.0.0.1", port=wire.port, query={}).render_as_string(),
                log_url=f"sqlite:///{tmp_path}/log.db",
                refresh_s=0.2,
            )
        )
        units = (f"u{n}" for n in itertools.count())

        def serves(release: int) -> bool:
            shown = server.decide(next(units))
            return shown["release"] == release and "staleSeconds" not in shown

        for release, how in enumerate(("refused", "silent"), 1):
            until(f"release {release}", partial(serves, release))
            wire.cut(how)
            release_next(database, RANDOM)
            begun, told = time.monotonic(), 0
            while time.monotonic() < begun + cut_s or not told:
                shown = server.decide(next(units))
                assert shown["release"] == release
                assert shown.get("staleSeconds", 0) >= told, "what is known gets no younger"
                told = shown.get("staleSeconds", 0)
                assert time.monotonic() < begun + cut_s + 120, "an old answer has to say so"
                time.sleep(0.02)
            assert server.call("/readyz")["status"] == "stale" and server.call("/healthz")["status"] == "stale"
            item = {"event_id": how, "type": "exposure", "token": shown["token"]}
            assert server.call("/v1/events", {"events": [item]})["results"][0]["status"] == "accepted"
            wire.mend()
            until(f"release {release + 1}", partial(serves, release + 1))
        assert server.ready()


# ── a damaged model ─────────────────────────────────────────────────────────────────────────────────────────────────


def unit_of_model() -> Iterator[str]:
    """Units that a model ranks for, each once."""
    shares = {bucket: getattr(SHARES, bucket) for bucket in Bucket}
    return (u for u in map("unit-{}".format, itertools.count()) if assign(shares, "acme/welcome/bucket", u) == "model")


@pytest.mark.parametrize("name", [VARIANT_GRAPH, USER_GRAPH, SIGNATURE])
def test_a_damaged_model_is_told_and_ranks_again_once_its_file_is_back(
    name: str, released: FastAPI, client_of: Client, sqlite: Database
) -> None:
    settings: Settings = released.state.settings
    folder, world = settings.models_dir / "acme" / VERSION, World.draw(SPEC)
    tables = fit_tables(log_of(world, 500), encoder_of(world))
    deep = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1], 4, 8, 4))
    deep.initialise(torch.Generator().manual_seed(0))
    variants = world.variants.append_column("variant_id", pa.array(world.variant_ids))
    model = CtrModel(tables, deep, 0.5)
    made = datetime(2026, 11, 27, tzinfo=UTC)
    export_model(model, folder, version=VERSION, variants=variants, log_hash="x", seed=1, created_at=made)
    whole = (folder / name).read_bytes()
    middle = len(whole) // 2
    (folder / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])

    decider, units = released.state.decider, unit_of_model()
    live = decider.live
    client, began = client_of("page", Role.CLIENT), live.clock()
    live.clock = lambda: began
    live.models = models_in(lambda business, version: fetch(settings, business, version))
    release_next(sqlite, ReleasePlan(shares=SHARES, model_version=VERSION, stages=(1.0,)))

    def decide() -> Any:
        answer = client.post(FLAG, json={"context": {"targetingKey": next(units), "age": 30}})
        assert answer.status_code == 200
        return answer.json()

    live.refresh()
    shown = decide()
    assert shown["reason"] == "DEFAULT" and shown["metadata"]["reason"].startswith("fallback_")
    assert f"model {VERSION} is not loaded" in shown["metadata"]["detail"]
    assert shown["metadata"]["bucket"] == "model" and shown["metadata"]["modelVersion"] != VERSION
    assert shown["metadata"]["release"] == 2
    assert len(live.problems) == 1 and name in live.problems[0]
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"], ready.json()["problems"]) == (200, "ok", 1)
    counted = f'kaleidoscope_decisions_total{{bucket="model",reason="{shown["metadata"]["reason"]}"}} 1.0'
    told = client.get("/metrics").text
    assert counted in told and "kaleidoscope_live_problems 1.0" in told

    (folder / name).write_bytes(whole)
    live.refresh()  # not looked at again so soon
    assert decide()["reason"] == "DEFAULT"
    live.clock = lambda: began + AGAIN_S
    live.refresh()
    # Of ten one is explored, whichever the hour draws.
    shown = next(answer for answer in iter(decide, None) if answer["metadata"]["reason"] != "explored")
    assert (shown["reason"], shown["metadata"]["modelVersion"]) == ("TARGETING_MATCH", VERSION)
    assert "detail" not in shown["metadata"] and live.problems == ()
    assert "kaleidoscope_live_problems 0.0" in client.get("/metrics").text


# ── a feature store that hangs ──────────────────────────────────────────────────────────────────────────────────────


class Hanging:
    """A store that answers once it is let go."""

    def __init__(self) -> None:
        self.let_go, self.asked = threading.Event(), 0

    def online(self, unit: str, scene: str, at: datetime) -> dict[str, int]:
        """What is known, at some time."""
        self.asked += 1
        assert self.let_go.wait(300)
        return {"income": 5}


def test_a_feature_store_that_hangs_is_not_waited_for_and_used_again_once_it_answers(
    released: FastAPI, client_of: Client
) -> None:
    decider, client, store, at = released.state.decider, client_of("page", Role.CLIENT), Hanging(), [0.0]
    features = OnlineFeatures(released.state.settings, clock=lambda: at[0])
    features._stores["acme"] = ("", store)  # type: ignore[assignment]
    decider.features.close()
    decider.features = features
    units = map("u{}".format, itertools.count())

    def details(n: int) -> list[str]:
        answers = [client.post(FLAG, json={"context": {"targetingKey": next(units), "age": 30}}) for _ in range(n)]
        assert {answer.status_code for answer in answers} == {200}
        return [answer.json()["metadata"].get("detail", "") for answer in answers]

    try:
        slow, begun = feature_store.SLOW_IN_A_ROW, time.monotonic()
        assert details(slow + 5) == [TOO_SLOW] * slow + [PAUSED] * 5
        assert store.asked <= slow
        for _ in range(3):  # it is tried again, and still hangs: with no more threads than there are
            at[0] += feature_store.PAUSE_S
            assert details(slow + 2) == [TOO_SLOW] * slow + [PAUSED] * 2
        assert store.asked <= READERS
        assert time.monotonic() < begun + 120, "a dozen waits of 30 ms, and none for the store"
        assert client.get("/readyz").json()["status"] == "ok"
        store.let_go.set()
        at[0] += feature_store.PAUSE_S
        features.timeout_s = 60.0
        assert details(2) == ["", ""]
        found = decider.decide("acme", "welcome", Asked("known", {"age": 30}))
        assert dict(found.record.features) == {"income": 5, "age": 30}
    finally:
        store.let_go.set()
        features.close()
