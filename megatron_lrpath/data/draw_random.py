"""Seeded permutations that are identical on every machine and with every numpy.

numpy guarantees stable streams only for bit generators, not for the methods of `Generator`, and its sorts
differ between processors if keys are equal. So everything here uses Philox's raw words and sorts without
equal keys.
"""

from __future__ import annotations

import hashlib

import numpy as np

type Words = np.ndarray[tuple[int], np.dtype[np.uint64]]
type Numbers = np.ndarray[tuple[int], np.dtype[np.uint32]]
type Fractions = np.ndarray[tuple[int], np.dtype[np.float64]]

MAX_LENGTH = 2**32


def random_words(count: int, *key: object) -> Words:
    """Return `count` random 64-bit words that depend only on `key` (any values with a stable `str`)."""
    text = "\0".join(str(part) for part in key)
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def permutation(count: int, *key: object) -> Numbers:
    """Return a random order of 0 … count-1 (uint32), determined by `key`; uses 12 bytes per number
    temporarily.

    Each number is packed below random high bits and the words are sorted in place: no two are equal, so
    that the result does not depend on the sorting algorithm. At least 32 random bits are used.
    """
    if count > MAX_LENGTH:
        raise ValueError(f"cannot permute more than {MAX_LENGTH} numbers, got {count}")
    bits = np.uint64(max(count - 1, 1).bit_length())
    words = random_words(count, *key)
    words >>= bits
    words <<= bits
    words |= np.arange(count, dtype=np.uint64)
    words.sort()
    words &= (np.uint64(1) << bits) - np.uint64(1)
    return words.astype(np.uint32)


def uniforms(count: int, *key: object) -> Fractions:
    """Return `count` random numbers in [0, 1), 53 bits each, determined by `key`."""
    return (random_words(count, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53
