"""kill -9 in the middle of a bulk import and of a bulk review, at random moments: all of it is there, or none.

The release ledger's own is in test_release.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, select

from kaleidoscope.database import Database
from kaleidoscope.review import make_variants
from kaleidoscope.tables import AuditEntry, Material, Variant
from tests.kaleidoscope.conftest import settle
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import stocked

ROOT = Path(__file__).parents[2]
KILLS = 20
ROWS = 40

# Forks a worker for each line it reads, and says its pid. A worker repeats its job until it is killed.
WORKSHOP = """
import os, signal, sys
from pathlib import Path
from kaleidoscope.database import Database
from kaleidoscope import materials, review
from tests.kaleidoscope.people import person

url, job, folder = sys.argv[1:]

def imports(session, n):
    table = Path(folder) / f"{os.getpid()}.csv"
    rows = [f"bulk{i},copy,Text {os.getpid()}-{n}-{i}" for i in range(ROWS)]
    table.write_text("id,kind,title\\n" + "\\n".join(rows) + "\\n")
    assert materials.import_materials(session, table, Path(folder), Path(folder) / "files").applied

def reviews(session, n):
    state = review.find_variants(session, "welcome", limit=1).items[0].state
    moved = review.move_variants(session, "welcome", "restore" if state == "retired" else "retire")
    assert moved.moved == 16, moved

def work():
    signal.alarm(30)  # never outlives a test that failed
    database = Database(url)
    n = 0
    while True:
        with database.transaction(person("worker")) as session:
            {"imports": imports, "reviews": reviews}[job](session, n)
        n += 1
        os.write(1, b"done\\n")

signal.alarm(600)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        work()
    os.write(1, b"pid %d\\n" % pid)
    os.waitpid(pid, 0)
    os.write(1, b"dead\\n")
""".replace("ROWS", str(ROWS))


def imported_whole(database: Database) -> int:
    """How many imports are there, after making sure that each is whole."""
    with database.transaction(person("ann"), write=False) as session:
        titles = [m.content["title"] for m in session.scalars(select(Material).where(Material.id.startswith("bulk")))]
        written = select(func.count()).select_from(AuditEntry).where(AuditEntry.key.startswith("bulk"))
        entries = session.scalar(written)
    assert len({title.rpartition("-")[0] for title in titles}) <= 1, "half of an import"
    assert len(titles) in {0, ROWS}
    assert entries is not None
    assert entries % ROWS == 0, "an import without its trail"
    return entries // ROWS


def reviewed_whole(database: Database) -> int:
    """How many bulk steps are there, after making sure that each is whole."""
    with database.transaction(person("ann"), write=False) as session:
        states = set(session.scalars(select(Variant.state)))
        changed = AuditEntry.action == "changed", AuditEntry.entity == "variants"
        entries = session.scalar(select(func.count()).select_from(AuditEntry).where(*changed))
    assert len(states) == 1, "half of a review"
    assert entries is not None
    assert entries % 16 == 0, "a step without its trail"
    return entries // 16


@pytest.mark.parametrize(("job", "check"), [("imports", imported_whole), ("reviews", reviewed_whole)])
def test_a_kill_in_the_middle_leaves_all_or_nothing(
    job: str, check: Callable[[Database], int], database: Database, tmp_path: Path
) -> None:
    stocked(database)
    with database.transaction(person("ann")) as session:
        make_variants(session, "welcome")
    draw, seen = random.Random(11), 0
    command = [sys.executable, "-c", WORKSHOP, database.url.render_as_string(hide_password=False), job, str(tmp_path)]
    with subprocess.Popen(command, text=True, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as workshop:
        assert workshop.stdin is not None
        assert workshop.stdout is not None
        for kill in range(KILLS):
            workshop.stdin.write(f"{kill}\n")
            workshop.stdin.flush()
            said: list[str] = []
            while "done" not in said or not any(s.startswith("pid") for s in said):
                said.append(workshop.stdout.readline().strip())
                assert said[-1], "the workshop ended"
            time.sleep(draw.uniform(0, 0.15))
            os.kill(int(next(s for s in said if s.startswith("pid")).split()[1]), signal.SIGKILL)
            while said[-1] != "dead":
                said.append(workshop.stdout.readline().strip())
            settle(database)
            there, told = check(database), said.count("done")
            # What was said to be done is there; one more may have been committed and not said.
            assert seen + told <= there <= seen + told + 1
            seen = there
        workshop.stdin.close()
