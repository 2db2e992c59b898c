"""The server's process: how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

# Answers /slow only once the file `go` is there; `asked` says that the request has come.
PROGRAM = """
import sys, time
from pathlib import Path
from fastapi import FastAPI
from kaleidoscope.serving.server import serve

app = FastAPI()

@app.get("/slow")
def slow() -> str:
    Path("asked").touch()
    while not Path("go").exists():
        time.sleep(0.02)
    return "done"

serve(app, "127.0.0.1", int(sys.argv[1]), patience_s=int(sys.argv[2]))
"""


# The same under two processes; `serve` is then given the name of what makes the application.
OF_TWO = """
import sys
from kaleidoscope.serving.server import serve

serve("slow:make", "127.0.0.1", int(sys.argv[1]), patience_s=int(sys.argv[2]), workers=2)
"""
SLOW = """
import time
from pathlib import Path
from fastapi import FastAPI
from kaleidoscope.serving import server

def make():
    app = FastAPI()

    @app.get("/slow")
    def slow() -> str:
        Path("asked").touch()
        while not Path("go").exists():
            time.sleep(0.02)
        return "done"

    return server.in_worker(app)
"""


def wait_for(what: str, there: object) -> None:
    """Until it is there; a test that waits for ever is ended by the suite's own limit."""
    import time

    for _ in range(3000):
        if there():  # type: ignore[operator]
            return
        time.sleep(0.02)
    pytest.fail(f"waited in vain for {what}")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(("number", "patience_s", "status"), [("SIGTERM", 1, 503), ("SIGINT", 60, 200)])
def test_a_stop_during_a_slow_request_is_quiet(number: str, patience_s: int, status: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROGRAM, str(port), str(patience_s)]
    root = str(Path(__file__).parents[3])
    with (
        (tmp_path / "err").open("w") as errors,
        subprocess.Popen(command, cwd=tmp_path, stderr=errors, env={**os.environ, "PYTHONPATH": root}) as server,
    ):
        answer: list[tuple[int, str]] = []

        def ask() -> None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/slow") as response:
                    answer.append((response.status, response.read().decode()))
            except urllib.error.HTTPError as error:
                with error:
                    answer.append((error.code, error.read().decode()))

        try:
            wait_for("the server", lambda: answers(port))
            asking = threading.Thread(target=ask)
            asking.start()
            wait_for("the request", (tmp_path / "asked").exists)
            server.send_signal(signal.Signals[number])
            wait_for("the end to begin", lambda: "Shutting down" in (tmp_path / "err").read_text())
            if status == 200:
                (tmp_path / "go").touch()
            asking.join()
            (tmp_path / "go").touch()
            code = server.wait()
        finally:
            server.kill()
    said = (tmp_path / "err").read_text()
    assert (code, said.splitlines()[-1]) == (0, "Stopped."), said
    assert "Traceback" not in said
    assert answer[0][0] == status
    if status == 503:
        assert json.loads(answer[0][1])["error"]["code"] == "unavailable"


def test_several_processes_answer_and_stop_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kaleidoscope", "serve", "--port", str(port), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    environment = {name: value for name, value in environment.items() if not name.startswith("KALEIDOSCOPE_")}
    with (
        (tmp_path / "err").open("w") as errors,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=errors) as process,
    ):

        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=60) as answer:
                    return json.load(answer)["status"] == "ok"
            except OSError:
                return False

        try:
            wait_for("the server", ready)
            wait_for("both of its processes", lambda: (tmp_path / "err").read_text().count("startup complete") == 2)
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
        finally:
            process.kill()
    said = (tmp_path / "err").read_text()
    assert code == 0, said
    assert said.count("Started server process") == 2 and said.endswith("Stopped.\n") and "Traceback" not in said
    assert (tmp_path / "kaleidoscope-keys").read_text().count(":") == 1


def test_a_server_needs_none_of_what_trains() -> None:
    program = """
import sys
for name in ("feast", "interpret", "lightgbm", "mlflow", "models", "sklearn", "torch"):
    sys.modules[name] = None  # importing it fails
from kaleidoscope.serving.app import create_app
"""
    root = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("program", "processes"), [(PROGRAM, 1), (OF_TWO, 2)])
def test_the_process_ends_though_a_request_is_still_worked_on(program: str, processes: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "program.py").write_text(
        f"if __name__ == '__main__':\n    {'    '.join(program.splitlines(keepends=True))}"
    )
    path = os.pathsep.join([str(Path(__file__).parents[3]), str(tmp_path)])
    command = [sys.executable, "program.py", str(port), "1"]
    with (
        (tmp_path / "err").open("w") as errors,
        subprocess.Popen(command, cwd=tmp_path, stderr=errors, env={**os.environ, "PYTHONPATH": path}) as server,
    ):
        codes: list[int] = []

        def ask() -> None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/slow").close()
            except urllib.error.HTTPError as error:
                codes.append(error.code)
                error.close()

        try:
            wait_for("the server", lambda: (tmp_path / "err").read_text().count("startup complete") == processes)
            wait_for("its port", lambda: answers(port))  # which is opened only after that is said
            asking = threading.Thread(target=ask)
            asking.start()
            wait_for("the request", (tmp_path / "asked").exists)
            server.send_signal(signal.SIGTERM)
            code = server.wait()  # `go` never comes
            asking.join()
        finally:
            (tmp_path / "go").touch()
            server.kill()
    said = (tmp_path / "err").read_text()
    assert (code, codes) == (0, [503]), said
    assert said.endswith("Stopped.\n") and "Traceback" not in said
