"""Features: what was known when, the same for training and for decisions, and forgotten when it has to be."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kaleidoscope import cli, feature_store
from kaleidoscope.database import Database, open_database
from kaleidoscope.decision_record import DecisionRecord, Keyring, Reason
from kaleidoscope.encoding import MISSING, Encoder
from kaleidoscope.errors import InputError, JobError, NotFoundError
from kaleidoscope.events import Rules, Windows, compact, ingest, record_decisions
from kaleidoscope.feature_store import (
    DECLARATIONS,
    NOT_YET,
    PAUSED,
    SLOW_IN_A_ROW,
    TOO_SLOW,
    OnlineFeatures,
    erase,
    home_of,
    load_profiles,
    materialise,
    online,
    training_set,
    views,
)
from kaleidoscope.ranker import Ranker
from kaleidoscope.settings import Settings
from kaleidoscope.vocabulary import Bucket
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import fit_tables
from models.train import CtrModel
from tests.kaleidoscope.conftest import add_businesses
from tests.models.worlds import examples_of

RING = Keyring({"k1": b"0123456789abcdef"})
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
MIDNIGHT = datetime(2030, 1, 10, tzinfo=UTC)
NOW = MIDNIGHT + 12 * HOUR
ALIEN = "rival-only-user"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feast says nothing to anybody."""

    def refuse(sock: socket.socket, address: object) -> None:
        raise AssertionError(f"something wants to talk to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


# ── a business with a past ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Place:
    settings: Settings
    log: Database

    def home(self, business: str = "acme") -> Path:
        return home_of(self.settings, business)

    def known(self, units: Sequence[str], at: datetime, scene: str = "home") -> list[dict[str, Any]]:
        """What training is given."""
        found: list[dict[str, Any]] = training_set(self.settings, "acme", units, scene, [at] * len(units)).to_pylist()
        return found


def show(log: Database, unit: str, at: datetime, *, click: timedelta | None = None, **changes: Any) -> None:
    """A decision for a unit and its exposure, and a click so much later."""
    number = f"{unit}-{at.isoformat()}-{changes.get('scene', 'home')}-{changes.get('business', 'acme')}"
    given = {
        "id": number.encode().hex().ljust(32, "0"), "business": "acme", "scene": "home", "unit": unit, "at": at,
        "bucket": Bucket.RANDOM, "variant": "v1", "propensity": 0.5, "learn": True, "reason": Reason.EXPLORED,
        "release": 1, "release_hash": "r" * 64, "model_version": None, "candidates": 2, "features": {}, "context": {},
        "rested": (), "key": "k1",
    }  # fmt: skip
    record = DecisionRecord(**{**given, **changes})
    record_decisions(log, [record])
    events = [("exposure", timedelta(0)), *([("click", click)] if click is not None else [])]
    for kind, after in events:
        item = {"event_id": f"{number}-{kind}", "type": kind, "token": RING.sign(record), "at": str(at + after)}
        [result] = ingest(log, record.business, [item], RING, now=at + after + timedelta(seconds=1))
        assert result.status == "accepted", result


def profiles(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


PROFILES = {
    "unit": ["ann", "bob", "cat", "dan"],
    "age": [31, None, 54, 20],
    "city": ["rome", "oslo", None, ""],
    "income": [1.5, float("nan"), -2.25, 0.1],
    "vip": [True, None, False, True],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """`acme` at NOW: profiles of eight days ago and of yesterday, five days of log, everything materialised."""
    folder = tmp_path_factory.mktemp("features")
    settings = Settings(
        database_url=f"sqlite:///{folder}/kaleidoscope.db",
        log_url=f"sqlite:///{folder}/log.db",
        log_dir=folder / "log",
        feature_dir=folder / "features",
    )
    with open_database(settings.database_url) as database:
        add_businesses(database)
    with open_database(settings.log_url) as log:
        made = Place(settings, log)
        show(log, "ann", MIDNIGHT - 5 * DAY, click=HOUR)
        show(log, "ann", MIDNIGHT - 3 * DAY + 23 * HOUR, click=2 * HOUR)  # clicked on the next day
        show(log, "ann", NOW - HOUR, click=timedelta(minutes=1))
        show(log, "bob", MIDNIGHT - 3 * DAY)
        show(log, "bob", NOW - 2 * HOUR)
        show(log, "bob", NOW - 3 * HOUR, scene="account")
        show(log, ALIEN, MIDNIGHT - DAY, click=HOUR, business="rival")
        load_profiles(settings, "acme", profiles(folder / "1.parquet", **PROFILES), now=MIDNIGHT - 8 * DAY)
        changed = {"unit": ["ann", "eve"], "age": [32, 44], "city": ["rome", "bonn"], "income": [1.5, 3.0]}
        loaded = load_profiles(settings, "acme", profiles(folder / "2.parquet", **changed), now=MIDNIGHT - DAY)
        assert (loaded.rows, loaded.new, loaded.features) == (2, 2, ("age", "city", "income"))
        done = materialise(settings, log, "acme", NOW)
        assert done is not None
        assert done.known == {"user_profile": 0, "user_behaviour": 4, "user_scene_recent": 3}
        yield made


def test_every_declared_view_reaches_the_registry_with_all_its_features(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feast import FeatureView

    monkeypatch.setenv("FEATURES_HOME", str(place.home()))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("declared", DECLARATIONS / "definitions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    declared = {v.name: v for v in vars(module).values() if isinstance(v, FeatureView)}
    told = {view.name: view for view in views(place.settings, "acme")}
    assert set(told) == set(declared) == {"user_profile", "user_behaviour", "user_scene_recent"}
    for name, view in declared.items():
        entities = {"unit", "scene"} & {field.name for field in view.schema}
        assert set(told[name].of) == entities
        features = {str(f.tags.get("days_since", f.name)) for f in view.schema} - entities
        assert set(told[name].features) == features
        stored = pq.read_schema(Path(view.batch_source.path))
        assert set(stored.names) == {f.name for f in view.schema} | {"known_from"}
    assert told["user_profile"].features == {
        "age": "number",
        "city": "text",
        "income": "number",
        "vip": "true or false",
    }


def test_declarations_import_nothing_of_ours_and_nobody_imports_them() -> None:
    ours = DECLARATIONS.parent
    assert "kaleidoscope." not in (DECLARATIONS / "definitions.py").read_text().replace("`kaleidoscope", "")
    assert sorted(path.name for path in DECLARATIONS.iterdir() if path.name != "__pycache__") == [
        "definitions.py",
        "feature_store.yaml",
    ]
    for package in ("kaleidoscope", "models"):
        for path in (ours / package).rglob("*.py"):
            assert "features.definitions" not in path.read_text()


# ── what was known when ─────────────────────────────────────────────────────────────────────────────────────────────


def test_behaviour_is_what_the_log_says_until_each_midnight(place: Place) -> None:
    names = ("past_exposures", "past_clicks", "days_since_seen")

    def told(unit: str, at: datetime) -> tuple[object, ...]:
        [row] = place.known([unit], at)
        return tuple(row[name] for name in names)

    assert told("ann", MIDNIGHT - 5 * DAY + 2 * HOUR) == (None, None, None)
    assert told("ann", MIDNIGHT - 4 * DAY) == (1, 1, 1)
    assert told("ann", MIDNIGHT - 2 * DAY) == (2, 1, 0)  # the second click was yet to come
    assert told("ann", MIDNIGHT - DAY) == (2, 2, 1)
    assert told("ann", NOW) == (2, 2, 2)
    assert told("bob", MIDNIGHT) == (1, 0, 3)
    [row] = place.known(["ann"], MIDNIGHT - 4 * DAY)
    assert row["past_ctr"] == 1.0
    [row] = place.known(["ann"], MIDNIGHT - 2 * DAY)
    assert row["past_ctr"] == pytest.approx((1 + 20 / 3) / 22)  # three exposures so far, one click


def test_recent_counters_are_of_a_scene_and_known_once_they_were_counted(place: Place) -> None:
    def told(unit: str, scene: str, at: datetime = NOW) -> tuple[object, object]:
        [row] = place.known([unit], at, scene)
        return row["recent_exposures"], row["recent_clicks"]

    assert told("ann", "home") == (1, 1)
    assert told("bob", "home") == (1, 0)
    assert told("bob", "account") == (1, 0)
    assert told("ann", "account") == (None, None)
    assert told("ann", "home", NOW - timedelta(seconds=1)) == (None, None)


def test_a_planted_future_value_is_not_seen(place: Place) -> None:
    at, names = NOW - DAY / 4, ("age", "past_exposures", "recent_exposures")
    before = place.known(["ann", "eve", "fay"], at)
    kept = {path: path.read_bytes() for path in place.home().glob("*.parquet")}
    try:
        for path in kept:
            table = pq.read_table(path)
            planted = {
                field.name: pa.array(
                    {"string": ["home"] * 3, "bool": [True] * 3}.get(str(field.type), [99] * 3), field.type
                )
                for field in table.schema
                if field.name not in ("unit", "known_from")
            }
            units = pa.array(["ann", "eve", "fay"])  # fay is not known at all before
            known = pa.array([at + timedelta(microseconds=1)] * 3, pa.timestamp("us", "UTC"))
            planted |= {"unit": units, "known_from": known}
            pq.write_table(
                pa.concat_tables([table, pa.table(planted).select(table.column_names).cast(table.schema)]), path
            )
        assert place.known(["ann", "eve", "fay"], at) == before
        [later] = place.known(["fay"], at + timedelta(microseconds=1))
        assert [later[name] for name in names] == [99, 99, 99]
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert [row["age"] for row in before] == [32, 44, None]
    assert [row["past_exposures"] for row in before] == [2, None, None]


def test_rows_come_in_the_order_in_which_they_were_asked_for_and_twice_where_asked_twice(place: Place) -> None:
    units = ["nobody", "ann", "bob", "ann", "ann"]
    at = [NOW, NOW, NOW, MIDNIGHT - 4 * DAY, NOW]
    table = training_set(place.settings, "acme", units, "home", at)
    assert table["unit"].to_pylist() == units
    assert table["age"].to_pylist() == [None, 32, None, 31, 32]
    assert table["past_exposures"].to_pylist() == [None, 2, 1, 1, 2]
    assert table.schema.field("age").type == pa.int64() and table.schema.field("vip").type == pa.bool_()
    assert len(training_set(place.settings, "acme", [], "home", [])) == 0
    with pytest.raises(InputError, match="1 units and 0 moments"):
        training_set(place.settings, "acme", ["ann"], "home", [])


def test_nothing_is_news_when_nothing_happened_whether_days_are_compacted_or_not(place: Place) -> None:
    silent = {"user_profile": 0, "user_behaviour": 0, "user_scene_recent": 0}
    state = place.home() / "state.json"
    for _ in range(2):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"behaviour_until": None}))
        done = materialise(place.settings, place.log, "acme", NOW)
        assert done is not None and done.known == silent
        rules = Rules(default=Windows(exposure_s=0, click_s=0, conversion_s=0, grace_s=0))
        everything = {"describe": lambda scene, release: {}, "rules": rules, "everything": True}
        compact(place.log, place.settings.log_dir, business="acme", now=NOW + timedelta(seconds=1), **everything)


# ── training and decisions alike ────────────────────────────────────────────────────────────────────────────────────


UNITS = ["ann", "bob", "cat", "dan", "eve", "nobody"]


def test_offline_and_online_give_the_network_the_same_input(place: Place) -> None:
    table = training_set(place.settings, "acme", UNITS, "home", [NOW] * len(UNITS))
    names = [name for name in table.column_names if name != "unit"]
    columns = {name: table[name] for name in names}
    variants = pa.table({"tone": pa.array([["a"]], pa.list_(pa.string()))})
    encoder = Encoder.fit(columns, user=names, context=[], variants=variants, dimensions=["tone"])
    offline = encoder.features(columns, len(UNITS))
    store = feature_store._Opened.at(place.home(), None)
    asked = [store.online(unit, "home", NOW) for unit in UNITS]
    served = encoder.encode({name: [known.get(name) for known in asked] for name in names}, len(UNITS))
    np.testing.assert_array_equal(offline.codes, served.codes)
    np.testing.assert_array_equal(offline.values, served.values)
    assert asked[0] == {
        "age": 32, "city": "rome", "income": 1.5, "past_exposures": 2, "past_clicks": 2, "past_conversions": 0,
        "past_ctr": asked[0]["past_ctr"], "days_since_seen": 2, "recent_exposures": 1, "recent_clicks": 1,
    }  # fmt: skip
    assert asked[3] == {"age": 20, "city": "", "income": 0.1, "vip": True}
    assert "income" not in asked[1] and "income" not in asked[5]  # unknown, not NaN
    assert asked[5] == {}
    assert (offline.codes[:5] != MISSING).any(axis=0).all()  # every feature is known of somebody


def test_emptied_features_change_the_ranking(place: Place, tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 4_000
    city, variant = rng.integers(0, 2, n), rng.integers(0, 2, n)
    reward = rng.random(n) < np.where(city == variant, 0.5, np.where(variant == 0, 0.2, 0.05))
    tones = {"tone": [["warm"], ["cool"]]}
    examples, encoder = examples_of({"city": np.array(["rome", "oslo"])[city]}, tones, variant, reward)
    variants = pa.table({"variant_id": ["warm", "cool"], "tone": pa.array(tones["tone"], pa.list_(pa.string()))})
    tables = fit_tables(examples, encoder)
    deep = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1], 4, 8, 4))
    model = CtrModel(tables, deep, 0.0)
    made = datetime(2030, 1, 1, tzinfo=UTC)
    export_model(model, tmp_path / "m", version="1", variants=variants, log_hash="x", seed=0, created_at=made)
    ranker = Ranker.load(tmp_path / "m")
    side = ranker.variant_side(variants)

    def first(known: Mapping[str, object]) -> str:
        columns = {name: [value] for name, value in known.items()}
        return side.ids[int(ranker.score(ranker.features(columns, 1), side).argmax())]

    bob = online(place.settings, "acme", "bob", "home", NOW)
    assert first(online(place.settings, "acme", "ann", "home", NOW)) == "warm"
    assert first(bob) == "cool"
    assert first({}) == first(bob | {"city": None}) == "warm"


# ── apart from each other ───────────────────────────────────────────────────────────────────────────────────────────


def run(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *line: str) -> Any:
    """What a command prints as JSON, of `rival`; it has to succeed."""
    for name in ("database_url", "log_url", "log_dir", "feature_dir"):
        monkeypatch.setenv(f"KALEIDOSCOPE_{name.upper()}", str(getattr(place.settings, name)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([*line, "--business", "rival", "--as", "ann", "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, out
    assert stop.value.code in (0, None) or "error" in json.loads(out)
    return json.loads(out)


def test_an_operator_loads_materialises_and_shows_and_another_business_sees_none_of_it(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ran(*line: str) -> Any:
        return run(place, capsys, monkeypatch, "features", *line)

    assert ran("materialise") == {"applied": False, "known": {}, "online": {}}
    assert ran("show")["error"]["code"] == "not_found"
    file = tmp_path / "profiles.csv"
    file.write_text("customer,members since,segment\n007,10,gold\nann,,\n")
    loaded = ran("load", str(file), "--unit", "customer")
    assert loaded == {"rows": 2, "new": 2, "features": ["members since", "segment"]}
    assert ran("load", str(file), "--unit", "customer")["new"] == 0
    assert ran("show", "--unit", "007") == {"unit": "007", "features": {"members since": 10, "segment": "gold"}}
    assert ran("materialise")["applied"] is True
    shown = {view["name"]: view for view in ran("show")["items"]}
    assert shown["user_profile"]["features"] == {"members since": "number", "segment": "text"}

    assert ran("show", "--unit", "ann")["features"] == {}  # acme's ann is not rival's
    assert (
        online(place.settings, "acme", "007", "home", NOW) == online(place.settings, "acme", ALIEN, "home", NOW) == {}
    )
    [row] = place.known(["007"], NOW + 9999 * DAY)
    assert set(row) == {"unit", *online(place.settings, "acme", "ann", "home", NOW), "vip"}
    assert all(value is None for name, value in row.items() if name != "unit")
    for path in place.home().iterdir():
        assert ALIEN.encode() not in path.read_bytes()
    assert home_of(place.settings, "rival") != place.home()


def test_a_business_is_no_path(place: Place) -> None:
    for name in ("../acme", "", ".", "a/b"):
        with pytest.raises(InputError, match="business"):
            online(place.settings, name, "ann", "home", NOW)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": ["a"], "age": [1]}, "there is no column 'unit'"),
        ({"unit": ["a", None], "age": [1, 2]}, "'unit' is empty in some rows"),
        ({"unit": ["a", " "], "age": [1, 2]}, "'unit' is empty in some rows"),
        ({"unit": ["a", "a"], "age": [1, 2]}, "unit 'a' has two rows"),
        ({"unit": ["a"]}, "no feature"),
        ({"unit": pa.array([], pa.string()), "age": pa.array([], pa.int64())}, "no rows"),
        ({"unit": ["a"], "past_ctr": [0.5]}, "'past_ctr' is a name of ours"),
        ({"unit": ["a"], "a:b": [0.5]}, "'a:b' is no name of a feature"),
        ({"unit": ["a"], "age": [1], "Age": [1]}, "differ in capitals"),
        ({"unit": ["a"], "AGE": [1]}, "'AGE' is called 'age' already"),
        ({"unit": ["a"], "age": ["old"]}, "'age' is string, and was int64"),
        ({"unit": ["a"], "born": [datetime(2000, 1, 1)]}, r"'born' is timestamp.*of a date the days"),
        ({"unit": ["a"], "likes": [["x"]]}, "'likes' is list"),
        ({"unit": ["a"], "note": ["x" * 501]}, "more than 500 characters"),
    ],
)
def test_profiles_that_cannot_be_used_are_refused_and_nothing_is_stored(
    place: Place, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    before = {path: path.read_bytes() for path in place.home().glob("*.parquet")}
    with pytest.raises(InputError, match=message):
        load_profiles(place.settings, "acme", profiles(tmp_path / "p.parquet", **columns), now=NOW)
    assert {path: path.read_bytes() for path in place.home().glob("*.parquet")} == before


def test_a_number_stays_one_where_a_later_file_has_it_with_or_without_fractions() -> None:
    def types(before: pa.DataType, given: list[object]) -> tuple[pa.DataType, list[object]]:
        fitted = feature_store._fitting(pa.table({"age": given}), pa.schema({"age": before}), Path("p"))
        return fitted["age"].type, fitted["age"].to_pylist()

    assert types(pa.float64(), [1]) == (pa.float64(), [1.0])
    assert types(pa.int64(), [0.5]) == (pa.float64(), [0.5])  # what is stored follows
    assert types(pa.string(), [None]) == (pa.string(), [None])


def test_profiles_may_say_since_when_they_are_known(place: Place, tmp_path: Path) -> None:
    past = ["2029-06-01T00:00:00Z", "2029-07-01T00:00:00Z"]
    file = profiles(tmp_path / "p.parquet", unit=["old", "old"], age=[1, 2], at=past)
    load_profiles(place.settings, "acme", file, now=NOW, since="at")
    june = datetime(2029, 6, 15, tzinfo=UTC)
    assert [place.known(["old"], at)[0]["age"] for at in (june - 30 * DAY, june, june + 30 * DAY)] == [None, 1, 2]
    assert online(place.settings, "acme", "old", "home", NOW) == {"age": 2}


# ── what decisions are given ────────────────────────────────────────────────────────────────────────────────────────


class Slow:
    """A store that answers once it is let go."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.let_go = answer, threading.Event()
        self.asked: list[str] = []

    def online(self, unit: str, scene: str, at: datetime) -> Any:
        self.asked.append(unit)
        assert self.let_go.wait(300)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def features(place: Place) -> Iterator[OnlineFeatures]:
    made = OnlineFeatures(place.settings, timeout_s=60.0)
    yield made
    made.close()


def test_decisions_are_given_what_is_known_once_the_store_is_open(place: Place, features: OnlineFeatures) -> None:
    assert not features.ready
    assert features.features_for("acme", "home", "ann", NOW) == ({}, NOT_YET)
    assert features.features_for("unknown", "home", "ann", NOW) == ({}, "")
    features.start()
    assert features.wait(60) and features.ready
    known, note = features.features_for("acme", "home", "ann", NOW)
    assert (known["age"], known["recent_exposures"], note) == (32, 1, "")
    assert features.features_for("acme", "home", "nobody", NOW) == ({}, "")
    assert features.features_for("unknown", "home", "ann", NOW) == ({}, "")


def test_many_threads_share_a_store_and_each_is_given_its_own_unit(place: Place, features: OnlineFeatures) -> None:
    features._look()
    alone = {unit: online(place.settings, "acme", unit, "home", NOW) for unit in UNITS}
    with ThreadPoolExecutor(8) as pool:
        asked = UNITS * 30
        found = list(pool.map(lambda unit: features.features_for("acme", "home", unit, NOW), asked))
    assert [known for known, _ in found] == [alone[unit] for unit in asked]


def test_a_decision_does_not_wait_for_whoever_writes(place: Place) -> None:
    writer = sqlite3.connect(place.home() / "online.db", isolation_level=None)
    try:
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute('DELETE FROM "Bacme_user_profile"')
        assert online(place.settings, "acme", "ann", "home", NOW)["age"] == 32
    finally:
        writer.execute("ROLLBACK")
        writer.close()


def test_feast_does_not_move_the_numbers_of_this_process_to_files(place: Place) -> None:
    from prometheus_client import values

    assert values.ValueClass.__name__ == "MutexValue"
    assert not [name for name in os.environ if name.startswith("PROMETHEUS_MULTIPROC")]


def test_a_decision_does_not_wait_for_a_slow_store_and_leaves_it_alone_for_a_while(place: Place) -> None:
    clock = [0.0]
    features = OnlineFeatures(place.settings, timeout_s=0.01, clock=lambda: clock[0])
    slow = Slow({"age": 1})
    features._stores["acme"] = ("", slow)  # type: ignore[assignment]
    try:
        for _ in range(SLOW_IN_A_ROW):
            assert features.features_for("acme", "home", "ann", NOW) == ({}, TOO_SLOW)
        assert features.features_for("acme", "home", "bob", NOW) == ({}, PAUSED)
        slow.let_go.set()
        clock[0], features.timeout_s = 60.0, 60.0
        assert features.features_for("acme", "home", "cat", NOW) == ({"age": 1}, "")
        assert "cat" in slow.asked and "bob" not in slow.asked
    finally:
        slow.let_go.set()
        features.close()


def test_a_store_that_fails_is_said_to(place: Place) -> None:
    features, gone = OnlineFeatures(place.settings, timeout_s=60.0), Slow(OSError("gone"))
    gone.let_go.set()
    features._stores["acme"] = ("", gone)  # type: ignore[assignment]
    assert features.features_for("acme", "home", "ann", NOW) == ({}, "features cannot be read: OSError")
    features.close()
    broken = Settings(feature_dir=place.settings.feature_dir.parent / "broken")
    (broken.feature_dir / "acme").mkdir(parents=True)
    (broken.feature_dir / "acme" / "registry.db").write_bytes(b"\xffthis is no registry")
    features = OnlineFeatures(broken)
    features._look()
    assert features.features_for("acme", "home", "ann", NOW)[1].startswith("features cannot be opened: ")
    features.close()


def test_without_feast_everything_says_what_to_install(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "feast", None)
    install = r"pip install 'kaleidoscope\[features\]'"
    with pytest.raises(InputError, match=install):
        feature_store.apply(Settings(feature_dir=tmp_path), "acme")
    for call in (
        lambda: online(place.settings, "acme", "ann", "home", NOW),
        lambda: materialise(place.settings, place.log, "acme", NOW),
        lambda: training_set(place.settings, "acme", ["ann"], "home", [NOW]),
    ):
        with pytest.raises(InputError, match=install):
            call()
    features = OnlineFeatures(place.settings)
    features._look()
    assert "pip install" in features.features_for("acme", "home", "ann", NOW)[1]
    features.close()


def test_what_is_not_there_is_said(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Settings(feature_dir=tmp_path / "none")
    assert materialise(nowhere, place.log, "acme", NOW) is None
    assert erase(nowhere, "acme", "ann") == feature_store.Erased(0, 0)
    with pytest.raises(NotFoundError, match="features apply"):
        online(nowhere, "acme", "ann", "home", NOW)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(JobError, match="`feast apply` failed for business 'acme': exit code 1"):
        feature_store.apply(nowhere, "acme")


# ── later, and forgotten ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_day_later_counters_are_back_at_zero_and_behaviour_has_grown(place: Place) -> None:
    later = NOW + 25 * HOUR
    done = materialise(place.settings, place.log, "acme", later)
    assert done is not None
    assert done.known == {"user_profile": 0, "user_behaviour": 2, "user_scene_recent": 3}
    known = online(place.settings, "acme", "ann", "home", later)
    assert (known["recent_exposures"], known["past_exposures"], known["past_clicks"]) == (0, 3, 3)
    [row] = place.known(["ann"], NOW)  # what was known then has not changed
    assert (row["recent_exposures"], row["past_exposures"]) == (1, 2)
    [row] = place.known(["ann"], later)
    assert {name: value for name, value in row.items() if value is not None} == {"unit": "ann", **known}


def test_a_unit_that_is_erased_is_in_no_file_any_more(place: Place) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in place.home().iterdir()}

    # `an` is part of ann's name: only the whole id is the unit.
    assert erase(place.settings, "acme", "an") == feature_store.Erased(0, 0)
    assert any(b"bob" in content for content in files().values())
    erased = erase(place.settings, "acme", "bob")
    assert erased.history >= 4 and erased.online >= 13
    held = [name for name, content in files().items() if b"bob" in content]
    assert held == []
    assert online(place.settings, "acme", "bob", "home", NOW) == {}
    assert online(place.settings, "acme", "ann", "home", NOW)["age"] == 32
    assert erase(place.settings, "acme", "bob") == feature_store.Erased(0, 0)


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_redis_url_is_told_to_feast_in_its_own_words() -> None:
    plain = "socket_timeout=5,socket_connect_timeout=5"
    assert feature_store._connection("redis://cache") == f"cache:6379,{plain}"
    whole = feature_store._connection("rediss://ann:p%40ss=1@cache:7000/3")
    assert whole == f"cache:7000,username=ann,password=p@ss=1,db=3,ssl=true,{plain}"
    for url in ("http://cache", "redis://", "redis://cache:port", "cache:6379"):
        with pytest.raises(InputError, match="no URL such as redis://"):
            feature_store._connection(url)
    with pytest.raises(InputError, match="no commas") as refused:
        feature_store._connection("redis://:sec,ret@cache")
    assert "sec" not in str(refused.value)


class FakeRedis:
    """As much of a client as erasing takes; it finds everything, whatever it is asked for."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = list(keys)

    def scan_iter(self, pattern: bytes, count: int) -> list[bytes]:
        assert pattern.startswith(b"*") and count > 0
        return list(self.keys)

    def hlen(self, key: bytes) -> int:
        return 3

    def delete(self, key: bytes) -> None:
        self.keys.remove(key)


def test_a_unit_is_erased_from_redis_in_every_scene_and_nobody_else_is(place: Place) -> None:
    from feast.infra.online_stores.helpers import _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    def key(business: str, **names: str) -> bytes:
        values = [Value(string_val=name) for name in names.values()]
        return bytes(_redis_key(f"B{business}", EntityKey(join_keys=list(names), entity_values=values)))

    kept = [
        key("acme", unit="ann"), key("acme", unit="bob2"), key("acme", scene="bob", unit="ann"), key("me", unit="bob"),
        b"bobs things are none of ours Bacme",
    ]  # fmt: skip
    gone = [key("acme", unit="bob"), key("acme", scene="home", unit="bob"), key("acme", scene="account", unit="bob")]
    client = FakeRedis([*gone, *kept])
    config = SimpleNamespace(project="Bacme", online_store=None)
    provider = SimpleNamespace(online_store=SimpleNamespace(_get_client=lambda _: client))
    opened = feature_store._Opened(SimpleNamespace(config=config, provider=provider), ())
    assert feature_store._erase_redis(opened, "bob") == 9
    assert client.keys == kept
