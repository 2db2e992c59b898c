"""One shape, one exit code and one HTTP status for every error on purpose."""

from __future__ import annotations

import re

import pytest

from kaleidoscope import errors
from kaleidoscope.errors import (
    AccessError,
    ConflictError,
    InputError,
    JobError,
    KaleidoscopeError,
    NotFoundError,
    TooManyRequestsError,
)

TREE = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, KaleidoscopeError)]


@pytest.mark.parametrize("error", TREE)
def test_an_error_renders_in_the_one_shape(error: type[KaleidoscopeError]) -> None:
    assert error("what, where, remedy").as_dict() == {"error": {"code": error.code, "message": "what, where, remedy"}}
    detailed = error("what", details={"yours": 1}).as_dict()["error"]
    assert detailed == {"code": error.code, "message": "what", "details": {"yours": 1}}
    assert re.fullmatch("[a-z_]+", error.code)


def test_codes_are_unique() -> None:
    assert len({error.code for error in TREE}) == len(TREE)


@pytest.mark.parametrize("error", TREE)
def test_the_callers_fault_is_exit_2_and_ours_is_exit_1(error: type[KaleidoscopeError]) -> None:
    theirs = issubclass(error, InputError | AccessError | NotFoundError | ConflictError | TooManyRequestsError)
    assert error.exit_code == (2 if theirs else 1)
    assert error.http_status // 100 == (4 if theirs else 5)


def test_the_docstring_draws_the_whole_tree() -> None:
    assert JobError in TREE
    for error in TREE:
        assert error.__name__ in (errors.__doc__ or "")
