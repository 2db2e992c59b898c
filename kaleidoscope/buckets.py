"""Who is in which bucket and in the canary, and keyed draws: deterministic, sticky by unit, the same on every machine.

Buckets, and only buckets, use GrowthBook's hash; its 10,000 steps are too coarse for anything else, which draws with
`draw64`. The seeds are `{business}/{scene}/bucket` and `{business}/{scene}/canary`: one seed, one independent split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaleidoscope.errors import InputError
from kaleidoscope.vocabulary import Bucket

STEPS = 10_000  # of the hash; a share is kept to within a step at each edge
SUM_TOLERANCE = 1e-9

_OFFSET, _PRIME = 0x811C9DC5, 0x01000193  # of FNV-1a, 32 bits
_CHUNK = 65_536  # values hashed at once
_LONG = 512  # code units; longer values are hashed one by one, so that no column of the chunk is nearly empty

# Where each bucket begins and ends on [0, 1), from the left: control grows from 0 up and random from 1 down, so that
# units move between them and the others only as their own shares change; challenger lies below random.
_LAYOUT = (Bucket.CONTROL, Bucket.MODEL, Bucket.CHALLENGER, Bucket.RANDOM)


# ── GrowthBook's hash ───────────────────────────────────────────────────────────────────────────────────────────────


def gbhash(seed: str, value: str) -> float:
    """GrowthBook's hash, version 2: a multiple of 1/10,000 in [0, 1).

    `fnv1a32(str(fnv1a32(seed + value))) % 10000 / 10000`, over UTF-16 code units as its JavaScript SDK does.

    >>> gbhash("seed", "a"), gbhash("foo", "def")
    (0.0505, 0.2019)
    """
    return _fnv1a32(str(_fnv1a32(seed + value))) % STEPS / STEPS


def gbhash_many(seed: str, values: Sequence[str]) -> NDArray[np.float64]:
    """(n,) `gbhash` of every value, vectorised; memory grows with the text of 65,536 values at most."""
    begun = _fnv1a32(seed)  # a hash goes from left to right, so all values share the seed's part of it
    hashes = np.empty(len(values), np.uint32)
    for start in range(0, len(values), _CHUNK):
        hashes[start : start + _CHUNK] = _hash_chunk(begun, values[start : start + _CHUNK])
    return (_hash_decimals(hashes) % np.uint32(STEPS)).astype(np.float64) / STEPS


def _fnv1a32(text: str, begun: int = _OFFSET) -> int:
    for unit in memoryview(_code_units(text)).cast("H"):
        begun = ((begun ^ unit) * _PRIME) & 0xFFFFFFFF
    return begun


def _code_units(text: str) -> bytes:
    # Native order, as the readers of these bytes assume. JavaScript lets surrogates stand alone, and so does JSON.
    return text.encode(_UTF16, "surrogatepass")


_UTF16 = "utf-16-le" if np.little_endian else "utf-16-be"


def _hash_chunk(begun: int, values: Sequence[str]) -> NDArray[np.uint32]:
    encoded = [_code_units(value) for value in values]
    length = np.fromiter(map(len, encoded), np.int64, len(encoded)) // 2
    units = np.frombuffer(b"".join(encoded), np.uint16)
    start = np.cumsum(length) - length
    order = np.argsort(-length, kind="stable")  # the longest first: those that still have a column are a prefix
    is_long = int(np.count_nonzero(length > _LONG))
    by_length, start = length[order], start[order]
    hashes = np.full(len(values), begun, np.uint32)
    prime = np.uint32(_PRIME)
    columns = range(int(by_length[is_long]) if is_long < len(by_length) else 0)
    going = np.searchsorted(-by_length, -np.arange(len(columns)), side="left")  # rows longer than each column
    for column in columns:
        rows = slice(is_long, int(going[column]))
        hashes[rows] = (hashes[rows] ^ units[start[rows] + column]) * prime
    for row in range(is_long):
        hashes[row] = _fnv1a32(values[int(order[row])], begun)
    result = np.empty_like(hashes)
    result[order] = hashes
    return result


def _hash_decimals(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """(n,) FNV-1a of each number written in decimal."""
    hashes = np.full(len(numbers), _OFFSET, np.uint32)
    for power in (np.uint32(10**digit) for digit in range(9, -1, -1)):
        digit = (numbers // power) % np.uint32(10)
        longer = (hashes ^ (digit + np.uint32(ord("0")))) * np.uint32(_PRIME)
        hashes = np.where((numbers >= power) | (power == 1), longer, hashes)
    return hashes


# ── assignment ──────────────────────────────────────────────────────────────────────────────────────────────────────


def assign(shares: Mapping[Bucket, float], seed: str, unit: str) -> Bucket:
    """The bucket of a unit: the same at every call, and after a change of shares for as many units as can be.

    Changing the share of control or random moves in or out of it no unit but the difference. A bucket that is not in
    `shares` gets nothing. Raises InputError for shares that are not in 0..1 or do not sum to 1.
    """
    at = gbhash(seed, unit)
    return next(bucket for bucket, end in zip(_LAYOUT, _ends(shares), strict=True) if at < end)


def assign_many(shares: Mapping[Bucket, float], seed: str, units: Sequence[str]) -> NDArray[Any]:
    """(n,) object array of `assign` for every unit."""
    place = np.searchsorted(np.array(_ends(shares)), gbhash_many(seed, units), side="right")
    return np.array(_LAYOUT, dtype=object)[place]


def in_canary(seed: str, unit: str, share: float) -> bool:
    """Whether a unit is among this share of the traffic; who is in at 5 % is in at 20 %, and everybody at 1.

    Raises InputError for a share that is not in 0..1.
    """
    _check_share("share", share)
    return gbhash(seed, unit) < share


def _ends(shares: Mapping[Bucket, float]) -> list[float]:
    """Where each bucket of the layout ends on [0, 1)."""
    for bucket, share in shares.items():
        _check_share(f"shares: {bucket}", share)
    control, challenger, random = (
        shares.get(bucket, 0.0) for bucket in (Bucket.CONTROL, Bucket.CHALLENGER, Bucket.RANDOM)
    )
    total = math.fsum(shares.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise InputError(f"shares: they sum to {total:.12g}, not to 1. Say where all of the traffic goes.")
    has_model = shares.get(Bucket.MODEL, 0.0) > 0
    ends = [control, 1 - random - challenger if has_model else control, 1 - random, 1.0]
    # Rounded (by more than the tolerance), so that an edge that is a whole number of steps is exactly the float that
    # the hash yields for it, and a bucket without a share is empty.
    return list(accumulate((round(end, 8) for end in ends), max))


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"{name} is {share}. Give a share between 0 and 1.")


# ── keyed draws ─────────────────────────────────────────────────────────────────────────────────────────────────────


def keyed_digest(key: bytes, *parts: str, size: int = 8) -> bytes:
    """The keyed BLAKE2b hash of the parts, in `size` bytes (1..64); ("ab", "c") and ("a", "bc") differ.

    Raises InputError for a key that is empty or longer than 64 bytes.
    """
    if not 0 < len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise InputError(f"key: it has {len(key)} bytes. Give a secret of 1 to {hashlib.blake2b.MAX_KEY_SIZE}.")
    encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
    text = b"".join(len(part).to_bytes(8, "big") + part for part in encoded)
    return hashlib.blake2b(text, digest_size=size, key=key).digest()


def draw64(key: bytes, *parts: str) -> int:
    """A number in 0..2⁶⁴ − 1, the same for the same parts; without the key nobody can tell it from a random one."""
    return int.from_bytes(keyed_digest(key, *parts), "big")


def draw01(key: bytes, *parts: str) -> float:
    """`draw64` as a number in [0, 1), of its upper 53 bits."""
    return (draw64(key, *parts) >> 11) * 2.0**-53
