"""Shared by the tests of models: one thread each, and small logs with planted preferences."""

from __future__ import annotations

from collections.abc import Iterator

import lightgbm  # noqa: F401  (its threads are limited below)
import pytest
import torch
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)
