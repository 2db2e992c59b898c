"""Files of ours: whole or not there at all, and on the disk once a write returns."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def json_text(value: object) -> str:
    """The text of a JSON file. Raises ValueError for NaN and infinities, which JSON lacks: what is unknown is null."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside a file, to write what takes its place once the block ends; if that fails, the old one stays."""
    new = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield new
        sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, with those it is in, so that it outlives a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or which files a folder holds, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
