"""What is known of a decision afterwards: the record that the log keeps, and the signed token that events carry back.

How a decision is taken is `decide.py`; what becomes of the events is `events.py`.
"""

from __future__ import annotations

import base64
import hmac
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from kaleidoscope.errors import InputError
from kaleidoscope.vocabulary import Bucket

Value = str | float | int | bool | None
MIN_SECRET_BYTES = 16
MAX_TOKEN = 2_000  # characters
_MAC_BYTES = 16  # of HMAC-SHA-256: 128 bits


class Reason(StrEnum):
    """Why a decision fell as it did: by the policy of its bucket, by a rule, or by what was left when that failed."""

    CONTROL = "control"  # the bucket shows the baseline
    EXPLORED = "explored"  # drawn uniformly
    RANKED = "ranked"  # first by the model
    PINNED = "pinned"
    FORCED = "forced"  # asked for by a tester
    FALLBACK_LAST_GOOD = "fallback_last_good"  # ranked by the last model that worked
    FALLBACK_BEST_SINGLE = "fallback_best_single"
    FALLBACK_BASELINE = "fallback_baseline"
    FALLBACK_ELIGIBLE = "fallback_eligible"  # the first that the rules leave, where they leave none of these

    @property
    def is_fallback(self) -> bool:
        """Whether what the bucket was to show could not be had."""
        return self.value.startswith("fallback_")


@dataclass(frozen=True)
class DecisionRecord:
    """One decision, with everything that a replay or an estimate needs. Immutable; `id` names it in every event."""

    id: str  # 32 hex digits
    business: str
    scene: str
    unit: str
    at: datetime  # UTC
    bucket: Bucket
    variant: str
    propensity: float  # P(variant | everything known at the choice); 1 where nothing was drawn
    learn: bool  # whether estimators may read it: not control, nor what was pinned, forced or a fallback
    reason: Reason
    release: int
    release_hash: str
    model_version: str | None  # of the model that ranked; None where none did
    candidates: int  # how many variants it was drawn from
    features: Mapping[str, Value] = field(default_factory=dict)  # of the user, as the model read them
    context: Mapping[str, Value] = field(default_factory=dict)
    rested: tuple[str, ...] = ()  # variants that a frequency rule left out
    key: str = ""  # which key of the ring drew it
    detail: str = ""  # what went wrong, for a fallback; which rule could not be kept


@dataclass(frozen=True)
class TokenClaims:
    """What a decision's token says: enough to count its events where the record itself is lost."""

    business: str
    scene: str
    decision: str
    unit: str
    variant: str
    bucket: Bucket
    propensity: float
    learn: bool
    release: int
    model_version: str | None
    at: datetime


class TokenError(InputError):
    """A decision token that cannot be believed; `kind` says why: malformed, unknown_key, forged."""

    code = "bad_token"

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Keyring:
    """Secrets by name. The first one signs and draws; all of them verify, so that a key can be replaced in peace."""

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        """Raises InputError without a key, for a name that is not plain, or a secret of fewer than 16 bytes."""
        if not secrets:
            raise InputError("keys: there is none. Give at least one, as NAME:SECRET.")
        for name, secret in secrets.items():
            if not name.isascii() or not name.isalnum() or len(name) > 16:
                raise InputError(f"keys: {name!r} cannot be a key's name. Use 1 to 16 letters and digits.")
            if len(secret) < MIN_SECRET_BYTES:
                raise InputError(
                    f"keys: the secret of {name!r} has {len(secret)} bytes; give {MIN_SECRET_BYTES} random ones, or"
                    " more."
                )
        self._secrets = dict(secrets)
        self._derived: dict[tuple[str, str], bytes] = {}
        self.current = next(iter(secrets))

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """The ring in `NAME:SECRET,NAME:SECRET…`, the signing key first."""
        pairs = [part.strip().partition(":") for part in text.split(",") if part.strip()]
        names = [name for name, _, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"keys: {', '.join(twice)} is there more than once. Name every key differently.")
        return cls({name: secret.encode() for name, _, secret in pairs})

    def derived(self, purpose: str, name: str | None = None) -> bytes:
        """A key for one purpose alone (32 bytes), from the current secret or the one of this name.

        Raises InputError for a name that is not in the ring (any more).
        """
        name = self.current if name is None else name
        if name not in self._secrets:
            raise InputError(f"keys: there is no key {name!r} in the ring any more.")
        known = self._derived.get((name, purpose))
        if known is None:
            known = self._derived[name, purpose] = hmac.digest(self._secrets[name], purpose.encode(), "sha256")
        return known

    def sign(self, record: DecisionRecord) -> str:
        """The token of a decision: `NAME.CLAIMS.MAC`, URL-safe.

        Raises InputError where the unit's name is so long that `read` would refuse the token.
        """
        claims = [
            record.business, record.scene, record.id, record.unit, record.variant, record.bucket.value,
            record.propensity, record.learn, record.release, record.model_version, record.at.timestamp(),
        ]  # fmt: skip
        text = json.dumps(claims, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        body = _text64(text.encode("utf-8", "surrogatepass"))  # JSON lets surrogates stand alone
        token = f"{self.current}.{body}.{self._mac(self.current, body)}"
        if len(token) > MAX_TOKEN:
            raise InputError(
                f"unit: its decision's token would have {len(token):,} characters, and {MAX_TOKEN:,} are the most. Use"
                f" a shorter id than these {len(record.unit):,} characters, such as a hash of it."
            )
        return token

    def read(self, token: str) -> TokenClaims:
        """What a token claims; raises TokenError unless one of our keys signed it.

        Whether it is of this business, or too old, is for the caller to judge.
        """
        parts = token.split(".") if len(token) <= MAX_TOKEN and token.isascii() else []
        if len(parts) != 3:
            raise TokenError("malformed", "token: this is not a decision's token. Send back the one in its metadata.")
        name, body, mac = parts
        if name not in self._secrets:
            raise TokenError("unknown_key", "token: it was signed with a key that is not in use any more.")
        if not hmac.compare_digest(mac, self._mac(name, body)):
            raise TokenError("forged", "token: its signature is not ours. Send back the token as it was answered.")
        business, scene, decision, unit, variant, bucket, propensity, learn, release, model, at = json.loads(
            base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        )
        return TokenClaims(
            business, scene, decision, unit, variant, Bucket(bucket), propensity, learn, release, model,
            datetime.fromtimestamp(at, UTC),
        )  # fmt: skip

    def _mac(self, name: str, body: str) -> str:
        key = self.derived("decision token", name)
        return _text64(hmac.digest(key, body.encode(), "sha256")[:_MAC_BYTES])


def _text64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def canonical_values(values: Mapping[str, Value]) -> str:
    """One text for equal values, whatever the order they came in; raises InputError for a number that is none.

    >>> canonical_values({"income": 3.0, "age": 41}) == canonical_values({"age": 41, "income": 3})
    True
    """
    return _canonical({name: _plain(name, value) for name, value in values.items()})


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def _plain(name: str, value: Value) -> Value:
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise InputError(f"{name}: {value} is no number that can be compared. Leave it out, or send null.")
    # JavaScript, and many a store of JSON, writes 3.0 as 3.
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
