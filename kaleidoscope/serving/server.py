"""The server's process: it answers until it is told to stop, lets open requests finish, and ends without noise."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.supervisors import Multiprocess

from kaleidoscope.errors import JobError, UnavailableError
from kaleidoscope.serving.http import RETRY_AFTER_S

PATIENCE_S = 10
GRACE_S = 2.0  # for a process to end by itself, once its application is closed
WORKER = "kaleidoscope.serving.server:worker_application"


def serve(
    application: ASGIApp | str,
    host: str,
    port: int,
    *,
    workers: int = 1,
    patience_s: int = PATIENCE_S,
    access_log: bool = True,
) -> None:
    """Answer at the address until SIGINT (Ctrl-C) or SIGTERM, in the process's main thread.

    Open requests then get `patience_s` seconds to finish; those that do not are answered 503, and where one still
    works then, in a thread, the process ends under it: what it has not committed is not done. With several `workers`
    the application is the name of a function that makes it, which every worker calls, and a worker that dies is
    replaced. Raises JobError where the server ends although nobody stopped it.
    """
    config = uvicorn.Config(
        application if isinstance(application, str) else _CutOff(application),
        factory=isinstance(application, str),
        host=host,
        port=port,
        workers=workers,
        log_config=_log_to_stderr(),
        access_log=access_log,
        timeout_graceful_shutdown=patience_s,
        server_header=False,
    )
    if workers > 1:
        Multiprocess(config, [config.bind_socket()]).run()
        sys.stderr.write("Stopped.\n")
        return
    server, stopped, others = uvicorn.Server(config), False, set(threading.enumerate())

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = server.should_exit = True

    # uvicorn raises the signal that stopped it once more when it is done; by default that would end the process as if
    # it had been killed.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not stopped:
        raise JobError("The server has ended by itself. What it logged says why.")
    sys.stderr.write("Stopped.\n")
    if any(_is_stuck(thread) for thread in set(threading.enumerate()) - others):
        _end_soon()


def worker_application() -> ASGIApp:
    """The application of one of several workers, by the settings of the environment."""
    from kaleidoscope.serving.app import create_app
    from kaleidoscope.settings import load_settings

    return in_worker(create_app(load_settings()))


def in_worker(application: ASGIApp) -> ASGIApp:
    """The application as a worker's, which ends with it even if threads would keep it."""
    return _CutOff(application, ended=_end_soon)


def _is_stuck(thread: threading.Thread) -> bool:
    """Whether the thread would keep the process, and does not end in a moment."""
    if not thread.daemon:
        thread.join(GRACE_S)
    return thread.is_alive() and not thread.daemon


def _end_soon() -> None:
    """End the process a moment from now, with exit code 0; by itself it ends before that, unless threads keep it."""

    def end() -> None:
        time.sleep(GRACE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    threading.Thread(target=end, name="end", daemon=True).start()


def _log_to_stderr() -> dict[str, Any]:
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


class _CutOff:
    """ASGI middleware that answers a request which the server cancels, as it ends, rather than raising through it."""

    def __init__(self, app: ASGIApp, ended: Callable[[], None] = lambda: None) -> None:
        self.app, self.ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)
            if message["type"].startswith("lifespan.shutdown."):  # complete, or failed
                self.ended()

        try:
            await self.app(scope, receive, noted)
        except asyncio.CancelledError:
            if scope["type"] == "http" and not begun:
                error = UnavailableError("The server was stopped meanwhile. See whether it was done, and try again.")
                headers = {"Retry-After": str(RETRY_AFTER_S)}
                await JSONResponse(error.as_dict(), status_code=error.http_status, headers=headers)(
                    scope, receive, send
                )
