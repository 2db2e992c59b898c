"""What the demo asks over HTTP: `kaleidoscope serve` as a process of its own, and the page that talks to it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kaleidoscope.errors import InputError, JobError
from kaleidoscope.events import Fate
from kaleidoscope.settings import PREFIX, Settings

READY_S = 60.0
STOP_S = 20.0


@dataclass(frozen=True)
class Server:
    """`kaleidoscope serve` on the folder of the demo, as a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def check(self) -> None:
        """Raise JobError with its last words where it has ended."""
        if self.process.poll() is not None:
            said = self.log.read_text(errors="replace").strip().splitlines()
            raise JobError(f"The demo's server has ended: {said[-1] if said else 'it said nothing'} ({self.log})")


@contextmanager
def running(settings: Settings, log: Path) -> Iterator[Server]:
    """A server with these settings at a free port, which is stopped in the end; it writes to the file `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kaleidoscope", "serve", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment | variables(settings)
        )
        try:
            yield Server(process, port, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def variables(settings: Settings) -> dict[str, str]:
    """The environment in which every command uses these settings."""
    known = {name: getattr(settings, name) for name in Settings.model_fields if name != "keys"}
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in known.items() if value is not None}


class Client:
    """A page that asks for decisions and sends events, over one connection."""

    def __init__(self, server: Server, token: str) -> None:
        self._server = server
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def evaluate(self, scene: str, unit: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """The decision for a unit, by OFREP."""
        body = {"context": {"targetingKey": unit, **attributes}}
        return self._post(f"/ofrep/v1/evaluate/flags/{scene}", body)

    def wait_for_release(self, scene: str, number: int, units: Sequence[str]) -> None:
        """Wait until the server serves this release to all of these units: to some it did when it was a canary."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            self._server.check()
            try:
                if all(self.evaluate(scene, unit, {})["metadata"]["release"] == number for unit in units):
                    return
            except (OSError, http.client.HTTPException, JobError):
                self.close()
            time.sleep(0.1)
        raise JobError(
            f"The demo's server did not serve release {number} within {READY_S:.0f} s; {self._server.log} says why."
        )

    def send(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Send events; returns how many were accepted."""
        results = self._post("/v1/events", {"events": events})["results"]
        refused = next((r for r in results if r["status"] == Fate.REFUSED), None)
        if refused is not None:
            raise JobError(f"The demo's server refused an event: {refused['message']}. Report this.")
        return sum(r["status"] == Fate.ACCEPTED for r in results)

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        self._connection.close()

    def _post(self, path: str, document: Mapping[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", path, json.dumps(document), self._headers)
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise JobError(
                f"The demo's server answered {answer.status} at {path}: {body.decode(errors='replace')[:500]}"
            )
        found: dict[str, Any] = json.loads(body)
        return found


def check_port(port: int) -> None:
    """Raise InputError where nobody could answer at this port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(
                f"port {port}: {error.strerror}. Is an earlier demo still running? Name another port (--port), or end"
                " without a server: --no-serve."
            ) from None
