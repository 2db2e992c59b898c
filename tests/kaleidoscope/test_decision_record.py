from __future__ import annotations

import base64
import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaleidoscope.decision_record import (
    MAX_TOKEN,
    DecisionRecord,
    Keyring,
    Reason,
    TokenClaims,
    TokenError,
    canonical_values,
)
from kaleidoscope.errors import InputError
from kaleidoscope.vocabulary import Bucket

OLD, NEW = b"an old secret, 16+", b"a new secret of 16+"
KEYS = Keyring({"k1": OLD})
AT = datetime(2026, 3, 1, 12, 30, 15, 123457, tzinfo=UTC)
RECORD = DecisionRecord(
    id="0" * 32,
    business="acme",
    scene="welcome",
    unit="unit-1",
    at=AT,
    bucket=Bucket.MODEL,
    variant="v1",
    propensity=0.9 + 0.1 / 7,
    learn=True,
    reason=Reason.RANKED,
    release=3,
    release_hash="f" * 64,
    model_version="ctr-7",
    candidates=7,
)


def claims(record: DecisionRecord) -> TokenClaims:
    return TokenClaims(
        record.business,
        record.scene,
        record.id,
        record.unit,
        record.variant,
        record.bucket,
        record.propensity,
        record.learn,
        record.release,
        record.model_version,
        record.at,
    )


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    unit=st.text(st.characters(), max_size=80),  # surrogates too: JavaScript sends them
    variant=st.text(max_size=30),
    bucket=st.sampled_from(Bucket),
    propensity=st.floats(0, 1, exclude_min=True),
    learn=st.booleans(),
    model=st.none() | st.text(max_size=30),
    at=st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)),
)
def test_a_token_says_what_was_signed(
    unit: str, variant: str, bucket: Bucket, propensity: float, learn: bool, model: str | None, at: datetime
) -> None:
    record = replace(
        RECORD, unit=unit, variant=variant, bucket=bucket, propensity=propensity, learn=learn, model_version=model,
        at=at.replace(tzinfo=UTC),
    )  # fmt: skip
    token = KEYS.sign(record)
    assert KEYS.read(token) == claims(record)
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@given(at=st.integers(0, len(KEYS.sign(RECORD)) - 1), other=st.characters(max_codepoint=126, min_codepoint=33))
def test_a_token_with_any_other_character_in_it_is_not_believed(at: int, other: str) -> None:
    token = KEYS.sign(RECORD)
    changed = token[:at] + other + token[at + 1 :]
    if changed != token:
        with pytest.raises(TokenError):
            KEYS.read(changed)


def test_claims_that_we_did_not_sign_are_forged() -> None:
    name, body, mac = KEYS.sign(RECORD).split(".")
    said = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    lie = base64.urlsafe_b64encode(json.dumps([*said[:6], 0.001, *said[7:]]).encode()).decode().rstrip("=")
    other = Keyring({"k1": NEW}).sign(RECORD)
    for token in (f"{name}.{lie}.{mac}", f"{name}.{body}.", f"{name}.{body}.{mac[:-1]}", other):
        with pytest.raises(TokenError) as caught:
            KEYS.read(token)
        assert caught.value.kind == "forged"


@pytest.mark.parametrize("token", ["", "x", "a.b", "a.b.c.d", "k1.é.x", "k1." + "a" * MAX_TOKEN + ".x", "\0.\0"])
def test_what_is_no_token_is_malformed(token: str) -> None:
    with pytest.raises(TokenError) as caught:
        KEYS.read(token)
    assert caught.value.kind == "malformed" and caught.value.code == "bad_token"


def test_a_unit_too_long_for_a_token_is_refused_when_signing_not_when_its_events_come() -> None:
    assert KEYS.read(KEYS.sign(replace(RECORD, unit="ü" * 500))).unit == "ü" * 500
    with pytest.raises(InputError, match=r"unit: its decision's token would have .* these 2,000 characters"):
        KEYS.sign(replace(RECORD, unit="u" * 2000))


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_replaced_without_losing_what_is_on_its_way() -> None:
    old = KEYS.sign(RECORD)
    both = Keyring({"k2": NEW, "k1": OLD})
    assert both.current == "k2" and both.sign(RECORD).startswith("k2.")
    assert both.read(old) == both.read(both.sign(RECORD)) == claims(RECORD)
    with pytest.raises(TokenError) as caught:
        Keyring({"k2": NEW}).read(old)
    assert caught.value.kind == "unknown_key"


def test_every_purpose_and_every_secret_has_a_key_of_its_own() -> None:
    both = Keyring({"k2": NEW, "k1": OLD})
    derived = {both.derived(purpose, name) for purpose in ("draw", "decision token") for name in ("k1", "k2")}
    assert len(derived) == 4 and {len(key) for key in derived} == {32}
    assert both.derived("draw") == both.derived("draw", "k2") == both.derived("draw")
    assert both.derived("draw", "k1") == KEYS.derived("draw")
    with pytest.raises(InputError, match="no key 'k0'"):
        both.derived("draw", "k0")


def test_a_ring_is_read_from_text() -> None:
    ring = Keyring.parse(f" k2:{NEW.decode()} , k1:{OLD.decode().replace(',', '')},")
    assert ring.current == "k2"
    assert ring.derived("draw") == Keyring({"k2": NEW}).derived("draw")
    assert Keyring.parse("a:0123456789:abcdef").derived("draw") == Keyring({"a": b"0123456789:abcdef"}).derived("draw")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is none"),
        (" , ", "there is none"),
        ("k1:short", "5 bytes"),
        ("k1", "0 bytes"),
        (":0123456789abcdef", "cannot be a key's name"),
        ("k.1:0123456789abcdef", "cannot be a key's name"),
        ("ä:0123456789abcdef", "cannot be a key's name"),
        ("k" * 17 + ":0123456789abcdef", "cannot be a key's name"),
        ("k1:0123456789abcdef,k1:0123456789abcdeg", "k1 is there more than once"),
    ],
)
def test_a_ring_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Keyring.parse(text)


def test_a_ring_does_not_show_its_secrets() -> None:
    with pytest.raises(InputError) as caught:
        Keyring.parse("k1:hunter2")
    assert "hunter2" not in str(caught.value) and "secret" not in repr(KEYS)


# ── values and reasons ──────────────────────────────────────────────────────────────────────────────────────────────

VALUES = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    max_size=5,
)  # fmt: skip


@given(VALUES, st.randoms())
def test_equal_values_have_one_text(values: dict[str, Any], random: Any) -> None:
    items = list(values.items())
    random.shuffle(items)
    text = canonical_values(dict(items))
    assert text == canonical_values(values) == canonical_values(json.loads(json.dumps(values)))
    assert json.loads(text) == values


@given(VALUES, VALUES)
def test_different_values_have_different_texts(a: dict[str, Any], b: dict[str, Any]) -> None:
    if a != b:
        assert canonical_values(a) != canonical_values(b)


def test_a_number_is_the_same_with_and_without_a_point_and_is_not_text_or_truth() -> None:
    assert canonical_values({"a": 3.0}) == canonical_values({"a": 3}) == '{"a":3}'
    assert canonical_values({"a": -0.0}) == canonical_values({"a": 0})
    assert len({canonical_values({"a": one}) for one in (1, "1", True, None, 1.5)}) == 5


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(number: float) -> None:
    with pytest.raises(InputError, match=r"income: .* send null"):
        canonical_values({"age": 1.0, "income": number})


def test_fallbacks_are_known_as_such() -> None:
    assert {reason for reason in Reason if reason.is_fallback} == {
        Reason.FALLBACK_LAST_GOOD,
        Reason.FALLBACK_BEST_SINGLE,
        Reason.FALLBACK_BASELINE,
        Reason.FALLBACK_ELIGIBLE,
    }


def test_a_moment_elsewhere_is_the_same_moment() -> None:
    token = KEYS.sign(replace(RECORD, at=AT + timedelta(hours=1)))
    assert KEYS.read(token).at - AT == timedelta(hours=1)
