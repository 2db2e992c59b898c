"""Which of the 64 replicates a unit is in: in every log, process and machine the same."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

REPLICATES = 64


def replicate_of(texts: pa.Array, start: int = 0) -> NDArray[np.uint16]:
    """(n,) the replicate, 0..63, of the text of each unit; of one that is null that of its number, from `start` on.

    The lowest six bits of a hash of the text in UTF-8: h = 0; for every 8 bytes (little-endian, the last filled up with
    zeros) h = mix(h XOR bytes); at last h = mix(h XOR number of bytes). `mix` adds 0x9E3779B97F4A7C15, and then is the
    finaliser of splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195). Of a number it is mix(number).
    """
    h = _hash(texts) if texts.null_count < len(texts) else np.zeros(len(texts), np.uint64)
    if texts.null_count:
        unknown = np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False))
        h[unknown] = mix((unknown + start).astype(np.uint64))
    return (h % np.uint64(REPLICATES)).astype(np.uint16)


def _hash(texts: pa.Array) -> NDArray[np.uint64]:
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    size = int(ends[-1])
    held = np.zeros(size + 8, np.uint8)  # so that 8 bytes can be read from everywhere
    held[:size] = np.frombuffer(data, np.uint8)[:size] if size else 0
    words = np.lib.stride_tricks.as_strided(held[:8].view("<u8"), (size + 1,), (1,))
    mask = np.array([(1 << 8 * k) - 1 for k in range(9)], np.uint64)
    out = np.empty(len(texts), np.uint64)
    for start in range(0, len(texts), 1 << 16):  # in pieces that stay in the cache
        part = slice(start, min(start + (1 << 16), len(texts)))
        at, length = ends[part].astype(np.int64), np.diff(ends[part.start : part.stop + 1]).astype(np.int64)
        h = np.zeros(len(at), np.uint64)
        for j in range(0, int(length.max()), 8):
            rows = slice(None) if length.min() > j else np.flatnonzero(length > j)
            h[rows] = mix(h[rows] ^ (words[at[rows] + j] & mask[np.minimum(length[rows] - j, 8)]))
        out[part] = mix(h ^ length.astype(np.uint64))
    return out


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A well-mixed number of each."""
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
