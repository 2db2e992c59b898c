"""How many decisions a second one server process answers over HTTP, how late, and how soon after it was started.

`python benchmarks/serving.py`: OFREP requests that rank all variants of a release for a user of their own, from `wrk`
(Debian: apt install wrk) with 8 connections, the server on one core and the load on another. Beside it, in the same
run: an application of one FastAPI endpoint that does the bare matrix products and nothing else, and LightGBM ranking
the same variants in process. All users are made up; the model is trained on a simulated log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np

from kaleidoscope.access import Caller, operator
from kaleidoscope.businesses import create_business
from kaleidoscope.content import parse_content
from kaleidoscope.database import open_database
from kaleidoscope.decide import variant_table
from kaleidoscope.encoding import Encoder
from kaleidoscope.materials import add_material, content_of, import_materials, list_materials, tags_of
from kaleidoscope.ranker import Ranker
from kaleidoscope.release import ReleasePlan, Shares, draft_release, start, verify
from kaleidoscope.review import make_variants, move_materials, move_variants
from kaleidoscope.scenes import create_scene, read_scene
from kaleidoscope.settings import Settings
from kaleidoscope.simulation import Population, read_population
from kaleidoscope.tokens import create_token
from kaleidoscope.vocabulary import MaterialKind, Role
from models.batch import Examples
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import fit_tables
from models.train import CtrModel

DEMO = Path(__file__).parents[1] / "examples" / "demo_scene"
BUSINESS, VERSION = "bench", "fund-card-20300101T000000Z-0a1b2c"
ROWS = 60_000
BARE = """
import numpy as np
from fastapi import FastAPI
app = FastAPI()
rng = np.random.default_rng(0)
user, tags, cross = (rng.normal(size=s).astype(np.float32) for s in ((1, 200), (N, 60), (200, 60)))

@app.post("/rank")
async def rank(body: dict) -> dict:
    return {"best": int((user @ cross @ tags.T).argmax())}
"""
SCRIPT = """
local n = 0
request = function()
  n = n + 1
  local body = string.format(
    '{"context":{"targetingKey":"u%d-%d","age":%d,"income":%d,"occupation":"office"}}', n, math.random(1e9),
    18 + n % 60, 2000 + (n * 37) % 30000)
  return wrk.format("POST", PATH, {["Content-Type"]="application/json", ["Authorization"]="Bearer TOKEN"}, body)
end
"""


def main() -> None:
    """Measure, print, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--copies", type=int, default=18, help="of which a release of about 58 times as many variants")
    parser.add_argument("--mlflow", action="store_true", help="also LightGBM behind `mlflow models serve`")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not here: apt install wrk")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_in(folder)
        token, variants, columns = furnish(settings, args.copies)
        figures: dict[str, Any] = {"variants": variants, "connections": 8, "seconds": args.seconds}
        with serving(settings, folder) as (url, cold_s):
            figures["cold_start_to_first_decision_s"] = cold_s
            figures["decision"] = json.loads(ask(url, token))["metadata"]["reason"]
            figures["ofrep"] = load(url, "/ofrep/v1/evaluate/flags/fund-card", token, args.seconds, folder)
        with bare(variants, folder) as url:
            figures["bare_endpoint"] = load(url, "/rank", token, args.seconds, folder)
        figures["in_process_ms"], trees, one = in_process(settings, columns)
        if args.mlflow:
            with mlflow_server(trees, one, folder) as url:
                figures["lightgbm_behind_mlflow"] = load(url, "/invocations", token, args.seconds, folder, one)
    figures["of_bare_endpoint"] = figures["ofrep"]["per_s"] / figures["bare_endpoint"]["per_s"]
    print(json.dumps(figures, indent=1))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def settings_in(folder: Path) -> Settings:
    """Everything in one folder, and no limit on how often a token may ask."""
    return Settings(
        database_url=f"sqlite:///{folder}/kaleidoscope.db",
        log_url=f"sqlite:///{folder}/log.db",
        log_dir=folder / "log",
        files_dir=folder / "files",
        models_dir=folder / "models",
        keys_file=folder / "keys",
        feature_dir=folder / "features",
        requests_per_s=1e6,
    )


def furnish(settings: Settings, copies: int) -> tuple[str, int, Any]:
    """A release of the demo scene with more copies, all of whose traffic a model ranks; a token, and the variants."""
    folder = settings.files_dir.parent
    runpy.run_path(str(DEMO / "make_images.py"))["draw_all"](folder / "pictures")
    scene_id, spec = read_scene(DEMO / "scene.yaml")
    ann, rex = Caller("ann", BUSINESS, frozenset({Role.ADMIN})), Caller("rex", BUSINESS, frozenset({Role.ADMIN}))
    with open_database(settings.database_url) as database:
        with database.transaction(operator("root", BUSINESS)) as session:
            create_business(session, "Bench")
            _, token = create_token(session, "wrk", frozenset({Role.CLIENT}))
        with database.transaction(ann) as session:
            import_materials(session, DEMO / "materials.csv", folder / "pictures", settings.files_dir)
            rows = {row.id: row for row in list_materials(session, limit=500).items}
            of_copy = next(slot for slot in spec.slots if slot.kind == MaterialKind.COPY)
            more = []
            for n in range(copies - len(of_copy.materials)):
                twin = rows[of_copy.materials[n % len(of_copy.materials)]]
                content = parse_content(content_of(twin).model_dump(mode="json"))
                more.append(f"{twin.id}-{n}")
                add_material(session, more[-1], content, tags_of(twin), allow_duplicate=True)
            slots = tuple(
                slot.model_copy(update={"materials": (*slot.materials, *more)}) if slot is of_copy else slot
                for slot in spec.slots
            )
            ids = [*rows, *more]
            move_materials(session, "submit", ids)
        with database.transaction(rex) as session:
            move_materials(session, "approve", ids)
        with database.transaction(ann) as session:
            create_scene(session, scene_id, spec.model_copy(update={"slots": slots}))
            made = make_variants(session, scene_id).legal
            move_variants(session, scene_id, "submit")
        with database.transaction(rex) as session:
            move_variants(session, scene_id, "approve")
            plan = ReleasePlan(shares=Shares(random=0.01, model=0.99), model_version=VERSION, stages=(1.0,))
            release = draft_release(session, scene_id, plan)
            start(session, scene_id, release.number)
        content = verify(release)
    table = variant_table(content.variants)
    population = Population(read_population(), seed=0)
    scene, people = population.scene(content.variants), population.people(ROWS // 5)
    visits = population.traffic(people, start=datetime(2030, 1, 1, tzinfo=UTC), days=5)
    log = scene.log(people, visits, np.random.default_rng(0))
    encoder, examples = encoded(log, scene, table)
    tables = fit_tables(examples, encoder)
    deep = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1]))
    export_model(
        CtrModel(tables, deep, 0.0), settings.models_dir / BUSINESS / VERSION, version=VERSION, variants=table,
        log_hash="simulated", seed=0, created_at=datetime.now(UTC),
    )  # fmt: skip
    return token, made, (examples, table)


def encoded(log: Any, scene: Any, table: Any) -> tuple[Encoder, Examples]:
    """The simulated log as a model reads it."""
    schema = scene.schema()
    dimensions = [name for name in table.column_names if name != "variant_id"]
    encoder = Encoder.fit(
        {name: log[name] for name in schema["user"]}, user=schema["user"], context=[], variants=table,
        dimensions=dimensions,
    )  # fmt: skip
    position = {id: n for n, id in enumerate(table["variant_id"].to_pylist())}
    variant = np.array([position[id] for id in log["variant_id"].to_pylist()])
    columns = {name: log[name] for name in schema["user"]}
    features, tags = encoder.features(columns, len(log)), encoder.tags(table)
    click = log[schema["label"]].to_numpy().astype(np.float32)
    ones = np.ones(len(click))
    return encoder, Examples(features, variant, tags, click, ones, np.arange(len(click)))


@contextmanager
def process(command: list[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process on core 0, ended at the end."""
    with (folder / "out.txt").open("ab") as out:
        running = subprocess.Popen(
            ["taskset", "-c", "0", *command], cwd=folder, stdout=out, stderr=out, env={**os.environ, **environment}
        )
    try:
        yield running
    finally:
        running.terminate()
        running.wait(timeout=60)


@contextmanager
def serving(settings: Settings, folder: Path) -> Iterator[tuple[str, float]]:
    """`kaleidoscope serve` and its address, and how long it took from its start to a decision."""
    port, root = free_port(), str(Path(__file__).parents[1])
    given = {
        f"KALEIDOSCOPE_{name.upper()}": str(getattr(settings, name))
        for name in ("database_url", "log_url", "log_dir", "files_dir", "models_dir", "keys_file", "feature_dir")
    }
    given |= {"KALEIDOSCOPE_REQUESTS_PER_S": "1000000", "PYTHONPATH": root}
    begun = time.perf_counter()
    with process([sys.executable, "-m", "kaleidoscope", "serve", "--port", str(port)], folder, **given):
        url = f"http://127.0.0.1:{port}"
        until_ready(f"{url}/readyz")
        yield url, time.perf_counter() - begun


@contextmanager
def bare(variants: int, folder: Path) -> Iterator[str]:
    """A server that does the products alone."""
    (folder / "bare.py").write_text(BARE.replace("(N, 60)", f"({variants}, 60)"))
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "bare:app", "--port", str(port), "--no-access-log"]
    with process(command, folder):
        until_ready(f"http://127.0.0.1:{port}/openapi.json")
        yield f"http://127.0.0.1:{port}"


@contextmanager
def mlflow_server(trees: lightgbm.Booster, one: Any, folder: Path) -> Iterator[str]:
    """A LightGBM model behind `mlflow models serve`, which is sent all variants of a user with every request."""
    import mlflow.lightgbm

    mlflow.lightgbm.save_model(trees, str(folder / "trees"))
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder / "trees"), "--env-manager", "local"]
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it calls uvicorn by name
    with process([*command, "--port", str(port)], folder, MLFLOW_DISABLE_TELEMETRY="true", PATH=beside):
        until_ready(f"http://127.0.0.1:{port}/ping")
        yield f"http://127.0.0.1:{port}"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until_ready(url: str) -> None:
    """Wait until it answers."""
    for _ in range(3000):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.02)
    sys.exit(f"{url} does not answer")


def ask(url: str, token: str) -> bytes:
    """One decision."""
    asked = urllib.request.Request(
        f"{url}/ofrep/v1/evaluate/flags/fund-card",
        data=b'{"context":{"targetingKey":"u2","age":33}}',
        headers={"Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return bytes(answer.read())


def load(url: str, path: str, token: str, seconds: int, folder: Path, rows: Any = None) -> dict[str, float]:
    """Requests a second, and the median and 99th percentile in milliseconds, from core 1.

    Each is for a user of its own; with `rows` it sends these instead, as MLflow takes them.
    """
    script = folder / "load.lua"
    script.write_text(SCRIPT.replace("PATH", f'"{path}"').replace("TOKEN", token))
    if rows is not None:
        (folder / "rows.json").write_text(json.dumps({"inputs": np.asarray(rows).tolist()}))
        script.write_text(
            f'wrk.method = "POST"\nwrk.path = "{path}"\nwrk.headers["Content-Type"] = "application/json"\n'
            f'wrk.body = io.open("{folder / "rows.json"}"):read("*a")\n'
        )
    command = ["taskset", "-c", "1", "wrk", "-t1", "-c8", "--latency", "-s", str(script), url]
    subprocess.run([*command, "-d2s"], capture_output=True, check=True)  # warm
    said = subprocess.run([*command, f"-d{seconds}s"], capture_output=True, check=True, text=True).stdout
    if "Non-2xx" in said:
        sys.exit(f"{path}: {said}")
    per_s = re.search(r"Requests/sec:\s+([\d.]+)", said)
    found = dict(re.findall(r"(50|99)%\s+([\d.]+(?:us|ms|s))", said))
    assert per_s is not None
    return {"per_s": float(per_s[1]), "p50_ms": in_ms(found["50"]), "p99_ms": in_ms(found["99"])}


def in_ms(text: str) -> float:
    """A duration of wrk's."""
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


def in_process(settings: Settings, drawn: Any) -> tuple[dict[str, float], lightgbm.Booster, Any]:
    """Median milliseconds to rank all variants for one user: our exported model, and LightGBM of the same log; that
    one, and what it ranks."""
    examples, table = drawn
    ranker = Ranker.load(settings.models_dir / BUSINESS / VERSION)
    side, user = ranker.variant_side(table), {"age": [33], "income": [5000.0]}
    tags = examples.tags.toarray()
    data = np.hstack([examples.features.codes, examples.features.values, tags[examples.variant]])
    trees = lightgbm.LGBMClassifier(n_estimators=100, verbose=-1, n_jobs=1).fit(data, examples.reward).booster_
    one = np.hstack([np.repeat(data[:1, : data.shape[1] - tags.shape[1]], len(tags), 0), tags])

    def median(call: Any) -> float:
        times = []
        for _ in range(300):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return float(np.median(times) * 1000)

    found = {
        "kaleidoscope": median(lambda: ranker.score(ranker.features(user, 1), side)),
        "lightgbm": median(lambda: trees.predict(one, num_threads=1)),
    }
    return found, trees, one


if __name__ == "__main__":
    main()
